"""--junit FILE: the report of a verification for CI, whether it ends well or not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..atomic_file import AtomicFile
    from ..report import Report


class JUnitFile:
    """The file, tried out before the long work; an error that ends the work is reported in it.

    Args:
        place: None for no report at all.
        path, source: what is verified, and must not have the report among its files.

    Raises:
        UsageError, MachineError: see AtomicFile.
    """

    def __init__(self, place: Path | None, path: Path, source: Path | None) -> None:
        from ..atomic_file import AtomicFile
        from ..fileio import name_of

        self._name = name_of(path)
        self._stack = ExitStack()
        apart = [p for p in (path, source) if p is not None and p.is_dir()]
        self._file: AtomicFile | None = (
            None
            if place is None
            else self._stack.enter_context(AtomicFile(place, "--junit", apart))
        )

    def write(self, reports: Mapping[str, Report]) -> None:
        """The report of a verification that came to an end."""
        from .. import junit

        if self._file is not None:
            self._file.write(junit.of_reports(reports))

    def __enter__(self) -> JUnitFile:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from .. import junit
        from ..errors import InterruptedRunError, Nf4Error

        with self._stack:
            broken = isinstance(error, (Nf4Error, OSError))
            if self._file and broken and not isinstance(error, InterruptedRunError):
                self._file.write(junit.of_error(self._name, type(error).__name__, str(error)))
