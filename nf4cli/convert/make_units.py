"""Make the files of units: where the machine that makes them writes, and who takes them.

make_units.py runs on any machine; what it makes is put together in write_model.py.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from ..checkpoint.file_io import sync
from .conversion import Conversion, Tools
from .journal import Journal, Upload
from .listener import NOBODY
from .resume import Standing
from .shard_files import ShardFiles
from .transfers import Transfers
from .units import Made, SharedSources, Sources, UnitTask, standing_of, with_own_progress

_TRIES = ".tries"


class Place(Protocol):
    """Where the units of one run make their files, and who takes these; pickled and sent."""

    @property
    def algorithm(self) -> str:
        """Algorithm of the files' digests."""
        ...

    def aside(self) -> AbstractContextManager[Path]:
        """Return a directory that nobody else writes to, which is gone afterwards.

        Raises:
            FileNotFoundError: the run that asked for it has ended, or another one has begun.
        """
        ...

    def take(self, path: Path, digest: str, moved: Transfers) -> Upload | None:
        """Take a file that is whole, so that it appears under its name or is on a Hub.

        Args:
            digest: of its bytes.
            moved: counts what is uploaded.
        """
        ...


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """The `Place` in a directory that all machines share.

    Attributes:
        directory: of the finished output files.
        tries: a directory in it, of this run alone, for files that are not finished.  Once it is
            removed, a try that was left behind can make nothing more: it has no place to rename
            its file from.
        algorithm: of the files' digests.
        fsync: wait for the disk.
    """

    directory: Path
    tries: Path
    algorithm: str
    fsync: bool

    @contextmanager
    def aside(self) -> Iterator[Path]:
        """Yield a directory of one try: tries of the same unit do not meet."""
        aside = self.tries / uuid.uuid4().hex
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def take(self, path: Path, digest: str, moved: Transfers) -> Upload | None:
        """Rename a file into the directory."""
        if self.fsync:
            sync(path)
        path.replace(self.directory / path.name)
        if self.fsync:
            sync(self.directory)
        return None


@contextmanager
def place_for_units(directory: Path, algorithm: str, fsync: bool) -> Iterator[SharedPlace]:
    """Yield a place for the units of one run, after every earlier one in the directory is gone.

    Args:
        directory: of the finished output files.  Other machines work in directories of their own,
            so the place has its absolute path.
    """
    directory = directory.absolute()
    shutil.rmtree(directory / _TRIES, ignore_errors=True)
    tries = directory / _TRIES / uuid.uuid4().hex
    tries.mkdir(parents=True)
    try:
        yield SharedPlace(directory, tries, algorithm, fsync)
    finally:
        shutil.rmtree(directory / _TRIES, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class MakeFile(UnitTask):
    """The `Task` that makes a unit; `do` returns a `Made`.

    Attributes:
        sources: bring its source files.
        place: takes its file.
    """

    place: Place
    sources: Sources = field(default_factory=SharedSources)

    def do(self, tools: Tools, moved: Transfers) -> Made:
        """Make the unit's output file, which its place takes when it is whole.

        Raises:
            InputError, OSError: see `Conversion.run`.
        """
        unit, place = self.unit, self.place
        own = replace(unit.plan, tensors=tuple(t for t in unit.plan.tensors if t.name in unit.made))
        with place.aside() as aside, self.sources.opened(unit, aside, moved) as opened:
            files = ShardFiles(
                own, aside, place.algorithm, _NoJournal(), "", Standing(), lambda *_: None, NOBODY
            )
            try:
                files.open()
                conversion = Conversion(
                    unit.plan, with_own_progress(unit, tools), files, place.algorithm,
                    standing_of(unit), opened, scratch=aside,
                )  # fmt: skip
                conversion.run()
            finally:
                files.close()
            upload = None
            for name, digest in files.shard_digests.items():
                upload = place.take(aside / name, digest, moved)
        return Made(
            {name: conversion.results[name] for name in unit.made},
            files.tensor_digests,
            next(iter(files.shard_digests.values()), ""),
            {name: conversion.digested[name] for name in unit.digested},
            upload,
        )


class _NoJournal(Journal):
    """The journal of a unit: none."""

    def __init__(self) -> None:
        """Open no file."""

    def weight(self, *_: object) -> None:
        """Record nothing."""

    def source_file(self, *_: object) -> None:
        """Record nothing."""
