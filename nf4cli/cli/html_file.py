"""Write a page with charts (--html FILE); whether that can be done is found out before the work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoint.atomic_file import AtomicFile


class HtmlFile:
    """The page's file, to be used in a with statement around the work.

    Args:
        place: the file, None for no page.
        models: the models read or written, in whose directories the file must not lie.

    Raises:
        UsageError: the place is `-`, or see AtomicFile.
        MachineError: nothing can be written there, or the library that draws is missing.
    """

    def __init__(self, place: Path | None, *models: Path | None) -> None:
        self._stack = ExitStack()
        self._file: AtomicFile | None = None
        if place is None:
            return
        from ..checkpoint.atomic_file import AtomicFile
        from ..errors import UsageError
        from ..pictures import charts

        if str(place) == "-":
            raise UsageError("--html writes a file, and not to stdout: give it a name")
        charts.require()
        apart = [path for path in models if path is not None and path.is_dir()]
        self._file = self._stack.enter_context(AtomicFile(place, "--html", apart))

    @property
    def asked(self) -> bool:
        """Return whether a page is wanted."""
        return self._file is not None

    def write(self, page: Callable[[], bytes]) -> None:
        """Write the page; it is not made where none is wanted."""
        if self._file is not None:
            self._file.write(page())

    def __enter__(self) -> HtmlFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
