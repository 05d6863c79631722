"""A small output file, such as a report, that appears complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ..errors import MachineError, UsageError


class AtomicFile:
    """A small file that appears complete or not at all.

    Use it in a with statement around long work: whether the place can be written is found out
    before the work.  If the block ends without `write`, or with an exception, nothing is left
    behind.

    Args:
        place: path of the file.
        option: the command-line option that named it, for messages.
        apart: directories that the file must not lie in.
        replace: whether an existing file may be replaced.

    Raises:
        UsageError: the place is a directory, a device, a loop of links, or lies in one of `apart`;
            or the file exists and `replace` is false.
        MachineError: raised at the start of the block: nothing can be written there.
    """

    def __init__(
        self, place: Path, option: str, apart: Iterable[Path] = (), replace: bool = True
    ) -> None:
        self._option, self._given = option, place
        try:
            self._place = place.resolve()
            inside = next((d for d in apart if d.resolve() in self._place.parents), None)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{option} {place} is a loop of symbolic links") from error
        if inside is not None:
            raise UsageError(
                f"{option} {place} lies in {inside}, which must stay as it is: choose a "
                "place beside it"
            )
        if os.path.lexists(self._place) and not self._place.is_file():
            raise UsageError(f"{option} {place} is no ordinary file: choose another name")
        if self._place.exists() and not replace:
            raise UsageError(f"{option} {place} exists: remove it first, or choose another name")

    def __enter__(self) -> AtomicFile:
        try:
            fd, name = tempfile.mkstemp(
                prefix=f".{self._place.name[:100]}.partial-", dir=self._place.parent
            )
        except OSError as error:
            raise self._failed(error) from error
        os.close(fd)
        self._partial = Path(name)
        return self

    def write(self, data: bytes) -> None:
        """Write the whole content and make the file appear.

        Raises:
            MachineError: the disk is full or fails.
        """
        try:
            self._partial.write_bytes(data)
            mask = os.umask(0o022)  # the only way to read the mask is to set it
            os.umask(mask)
            self._partial.chmod(0o666 & ~mask)
            self._partial.replace(self._place)
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> MachineError:
        return MachineError(
            f"{self._option} {self._given} cannot be written: {error.strerror or error}"
        )

    def __exit__(self, *_: object) -> None:
        self._partial.unlink(missing_ok=True)
