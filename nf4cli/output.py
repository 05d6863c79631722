"""A directory that appears complete or not at all, and what is copied into it as it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


class new_directory:  # noqa: N801 - used like a function, in a with statement
    """A directory that is built under a temporary name beside `output`, then renamed to it.

    On any exception nothing is left behind.
    """

    def __init__(self, output: Path, fsync: bool) -> None:
        self._output = output.absolute()
        self._fsync = fsync

    def __enter__(self) -> Path:
        self._output.parent.mkdir(parents=True, exist_ok=True)
        self._directory = Path(
            tempfile.mkdtemp(prefix=f".{self._output.name[:100]}.partial-", dir=self._output.parent)
        )
        self._directory.chmod(0o777 & ~_umask())
        return self._directory

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            return
        try:
            if self._fsync:
                for path in sorted(self._directory.rglob("*")):
                    _fsync(path)
                _fsync(self._directory)
            self._directory.rename(self._output)
            if self._fsync:
                _fsync(self._output.parent)
        except BaseException:
            shutil.rmtree(self._directory, ignore_errors=True)
            raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def copy_files(root: Path, names: tuple[str, ...], directory: Path) -> None:
    """Copy files, with their subdirectories, content only; config.json is left to the caller."""
    for name in names:
        if name == "config.json":
            continue
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
