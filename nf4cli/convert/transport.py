"""Define how a run gets its source files, and where its finished files go.

A run opens a source file when it needs it, closes it when it has been read, and hands over every
output file that is complete.  `LocalTransport` is for a source on this disk and an output that
stays there; hub/carrier.py has the transport from and to a Hub.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..checkpoint.reader import LocalShards, ShardSource
from ..output.manifest import Manifest
from ..planning.model_plan import ModelPlan
from ..planning.plan import Plan
from .journal import Upload
from .make_units import Place, place_for_units
from .output_place import disk_bytes
from .resume import Standing
from .tasks import Check, SeesFiles
from .transfers import Transfers
from .units import SharedSources, Sources, Unit, source_files
from .workspace import Workspace


class Carriage(ShardSource, Protocol):
    """Moves the files of one run while it converts; a context, used from any thread."""

    def copy(self, source: str, target: Path) -> None:
        """Copy a file that is not converted.

        Args:
            source: its path under the source's root.
            target: in a directory that exists.

        Raises:
            InputError, MachineError: it cannot be fetched.
        """
        ...

    def file_done(self, name: str, path: Path, digest: str) -> None:
        """Take an output file that is complete.

        Args:
            name: its path in the output.
            path: where it lies, until it is taken away.
            digest: of its bytes, in the run's algorithm.

        Raises:
            InputError, MachineError: an earlier file could not be moved.
        """
        ...

    def __enter__(self) -> Carriage:
        """Begin to move files."""
        ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Wait until every file is moved; after an error, stop.

        Raises:
            InputError, MachineError: a file could not be moved.
        """
        ...


class Transport(Protocol):
    """Brings the source of a run, and takes its output to its destination.

    Attributes:
        leaving: finished files are taken away, and no output stays on this disk.
        destination: where they go, as the journal names it; None where they stay.
        scratch: the output is made for its digests alone (see `Workspace`).
    """

    @property
    def leaving(self) -> bool: ...

    @property
    def destination(self) -> str | None: ...

    @property
    def scratch(self) -> bool: ...

    def disk_needed(self, model: ModelPlan, workers: int) -> int:
        """Return the smallest number of bytes of the output's disk that is enough.

        Args:
            workers: threads.

        Raises:
            UsageError: the user's bound on the disk is smaller.
        """
        ...

    def prepare(self, model: ModelPlan) -> None:
        """Check, before anything is written, that source and output can be moved.

        Raises:
            UsageError, InputError, MachineError: they cannot.
        """
        ...

    def published(
        self, model: ModelPlan, is_same: Callable[[str, Manifest], bool]
    ) -> dict[str, Manifest] | None:
        """Return the manifests, by part, of the same output that is at the destination already.

        Args:
            is_same: (part, manifest) -> whether this run would write the same part.

        Returns:
            None where the destination holds none, another one, or less than the whole.
        """
        ...

    def carry(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], algorithm: str,
        workers: int,
    ) -> Carriage:  # fmt: skip
        """Return what moves the files of a run, ready to begin.

        Args:
            work: where the run works.
            standings: finished work of an earlier run, by part.  Some of it may be dropped, where
                it does not fit on the disk beside the first files of this run.
            algorithm: of the digests that `file_done` will get.
            workers: threads.

        Raises:
            UsageError: the bound on the disk is too small.
        """
        ...

    def elsewhere(
        self, plan: Plan, part: str, units: Sequence[Unit], directory: Path, algorithm: str,
        fsync: bool,
    ) -> AbstractContextManager[Means]:  # fmt: skip
        """Return how units are made on other machines, which move their files themselves.

        Args:
            plan, part: that the units are of.
            directory: of the finished output files, where they stay.
            algorithm: of the files' digests.
            fsync: wait for the disk.

        Raises:
            UsageError: the bound on the disk is too small.
        """
        ...

    def uploaded(self, name: str, upload: Upload) -> None:
        """Hear that another machine uploaded an output file.

        Args:
            name: its path in the output.
        """
        ...

    def publish(
        self,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
        lost: Callable[[tuple[str, ...]], None],
    ) -> None:
        """Make the output visible to others.

        Args:
            directory: holds every file that was not taken away.
            manifests: of the output, by part.
            lost: told the names of files that were taken away and are lost, before an error about
                them.

        Raises:
            InputError, MachineError: it cannot be published.
        """
        ...


@dataclass(frozen=True, slots=True)
class Means:
    """How units are made on other machines.

    Attributes:
        place: takes their files.
        sources: bring their source files.
        check: every machine has to pass it.
        shared: whether all machines read the same source files, which must not change.
        moved: counts what they fetch and upload; None where nothing is.
    """

    place: Place
    sources: Sources
    check: Check
    shared: bool
    moved: Transfers | None = None


class LocalCarriage(LocalShards):
    """Reads source files where they lie, and leaves output files where they are written.

    Args:
        root: of the source.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def copy(self, source: str, target: Path) -> None:
        shutil.copyfile(self._root / source, target)

    def file_done(self, name: str, path: Path, digest: str) -> None:
        """Leave the file where it is."""

    def __enter__(self) -> LocalCarriage:
        return self


class LocalTransport:
    """The `Transport` of a source on this disk and an output that stays there."""

    leaving = False
    destination: str | None = None
    scratch = False

    def disk_needed(self, model: ModelPlan, workers: int) -> int:
        return disk_bytes(model, workers)

    def prepare(self, model: ModelPlan) -> None:
        """Do nothing: source and output are on this disk."""

    def published(
        self, model: ModelPlan, is_same: Callable[[str, Manifest], bool]
    ) -> dict[str, Manifest] | None:
        return None

    def carry(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], algorithm: str,
        workers: int,
    ) -> Carriage:  # fmt: skip
        return LocalCarriage(model.root)

    @contextmanager
    def elsewhere(
        self, plan: Plan, part: str, units: Sequence[Unit], directory: Path, algorithm: str,
        fsync: bool,
    ) -> Iterator[Means]:  # fmt: skip
        with place_for_units(directory, algorithm, fsync) as place:
            check = SeesFiles(source_files(units), place.tries)
            yield Means(place, SharedSources(), check, shared=True)

    def uploaded(self, name: str, upload: Upload) -> None:
        """Do nothing: no output file is uploaded."""

    def publish(
        self,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
        lost: Callable[[tuple[str, ...]], None],
    ) -> None:
        """Leave the output where it is."""


LOCAL = LocalTransport()
