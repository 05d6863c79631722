"""Where a run has its source files from, and where its finished files go.

A run asks for a source file when it comes to it, gives it back when it has been read, and says of
every output file when it is complete.  Here is the transport of a run whose source lies on this
disk and whose output stays there; that of the Hub is hub/carrier.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from ..checkpoint.reader import LocalShards, ShardSource
from ..output.manifest import Manifest
from ..planning.model_plan import ModelPlan
from .output_place import disk_bytes
from .resume import Standing
from .workspace import Workspace


class Carriage(ShardSource, Protocol):
    """What moves the files of one run while it converts; a context, used from any thread."""

    def copy(self, source: str, target: Path) -> None:
        """Put a file that is not converted where it goes to.

        Args:
            source: its path under the source's root.
            target: in a directory that is there.

        Raises:
            InputError, MachineError: it cannot be had.
        """
        ...

    def file_done(self, name: str, path: Path, digest: str) -> None:
        """Take an output file that is complete.

        Args:
            name: its path in the output.
            path: where it lies, until it is taken away.
            digest: of its bytes, in the run's algorithm.

        Raises:
            InputError, MachineError: another file could not be brought where it goes to.
        """
        ...

    def __enter__(self) -> Carriage:
        """Begin to move files."""
        ...

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Wait until every file is where it goes to; after an error, stop.

        Raises:
            InputError, MachineError: one cannot be brought there.
        """
        ...


class Transport(Protocol):
    """See the module.

    Attributes:
        leaving: finished files are taken away, and no output stays here.
        destination: what they leave for, as the journal names it; None where they stay.
        scratch: nothing is of worth but to the next run of the same (see `Workspace`).
    """

    @property
    def leaving(self) -> bool: ...

    @property
    def destination(self) -> str | None: ...

    @property
    def scratch(self) -> bool: ...

    def disk_needed(self, model: ModelPlan, workers: int) -> int:
        """Return the bytes of the output's disk that are enough.

        Raises:
            UsageError: the bound that was asked for is below that.
        """
        ...

    def prepare(self, model: ModelPlan) -> None:
        """See, before anything is written, that the source can come and the output can go.

        Raises:
            UsageError, InputError, MachineError: it cannot.
        """
        ...

    def published(
        self, model: ModelPlan, is_same: Callable[[str, Manifest], bool]
    ) -> dict[str, Manifest] | None:
        """Return the manifests by part of the output that is where this one would go to.

        Args:
            is_same: whether the manifest of a part is that of what this run would write.

        Returns:
            None where it is not there, is not whole, or is another.
        """
        ...

    def carry(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], algorithm: str,
        workers: int,
    ) -> Carriage:  # fmt: skip
        """Return what moves the files of a run, ready to begin.

        Args:
            standings: by part, what an earlier run finished; of it may be forgotten what does not
                fit on the disk beside what comes first now.
            algorithm: of the digests that `file_done` will be given.

        Raises:
            UsageError: the bound on the disk is too small.
        """
        ...

    def publish(
        self,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
        lost: Callable[[tuple[str, ...]], None],
    ) -> None:
        """Let others see the output.

        Args:
            directory: holds every file that was not taken away.
            lost: told of taken files that are not where they went to, before an error about them.

        Raises:
            InputError, MachineError: it cannot be published.
        """
        ...


class LocalCarriage(LocalShards):
    """Source files where they lie, output files where they are written.

    Args:
        root: of the source.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root

    def copy(self, source: str, target: Path) -> None:
        shutil.copyfile(self._root / source, target)

    def file_done(self, name: str, path: Path, digest: str) -> None:
        """Leave it where it is."""

    def __enter__(self) -> LocalCarriage:
        return self


class LocalTransport:
    """See `Transport`: everything is here, and stays here."""

    leaving = False
    destination: str | None = None
    scratch = False

    def disk_needed(self, model: ModelPlan, workers: int) -> int:
        return disk_bytes(model, workers)

    def prepare(self, model: ModelPlan) -> None:
        """Ask nothing."""

    def published(
        self, model: ModelPlan, is_same: Callable[[str, Manifest], bool]
    ) -> dict[str, Manifest] | None:
        return None

    def carry(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], algorithm: str,
        workers: int,
    ) -> Carriage:  # fmt: skip
        return LocalCarriage(model.root)

    def publish(
        self,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
        lost: Callable[[tuple[str, ...]], None],
    ) -> None:
        """Leave it where it is."""


LOCAL = LocalTransport()
