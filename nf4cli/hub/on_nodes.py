"""Move the files of units on the machines that make them: from a Hub, and to one.

Each machine fetches the source files of its unit, and uploads the file that it made, with its own
token.  The commit is the driver's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..callbacks import no_notice
from ..checkpoint.reader import ShardSource
from ..convert.journal import Upload
from ..convert.make_units import SharedPlace
from ..convert.tasks import SeesFiles
from ..convert.transfers import Transfers
from ..convert.units import Unit
from ..errors import InputError, MachineError, UsageError
from ..planning.model_plan import path_in_model
from ..units import size_for_option
from . import client
from .budget import Budget, Step, smallest
from .client import Name, Snapshot
from .errors import endpoint, in_mid_run
from .fetching import Channel, Fetcher
from .publish import Publication


@dataclass(frozen=True, slots=True)
class HubSources:
    """The `Sources` that a machine fetches from a Hub, one unit at a time.

    Attributes:
        snapshot: the commit that they are of.
        root: of the source where the plan was made; paths under it are names in the snapshot.
        disk: bytes that a unit may hold on the disk, fetched source files and its output file; they
            are then removed when they have been read.  None for no bound: they go to the machine's
            cache and stay there.
        leaving: the output file is on the disk of the machine until it is uploaded.
    """

    snapshot: Snapshot
    root: Path
    disk: int | None
    leaving: bool

    @contextmanager
    def opened(self, unit: Unit, aside: Path, moved: Transfers) -> Iterator[ShardSource]:
        steps = self.steps_of(unit)
        budget = Budget(self.disk, _sizes(unit) if self.leaving else {}, 0, True, moved)
        names = {step.name for step in steps}
        fetched = {n for n in names if client.cached(self.snapshot, self.snapshot.files[n]) is None}
        with tempfile.TemporaryDirectory(prefix="nf4-") as directory, Fetcher(
            Channel(self.snapshot, moved, no_notice), self.root, steps,
            None if self.disk is None else Path(directory), fetched, budget,
        ) as fetcher:  # fmt: skip
            yield fetcher

    def steps_of(self, unit: Unit) -> list[Step]:
        """Return a step for each source file of a unit, in the order of reading."""
        outputs = frozenset(_sizes(unit) if self.leaving else ())
        return [
            Step(
                0 if self.disk is None else shard.size, outputs,
                shard.path.relative_to(self.root).as_posix(), shard,
            )
            for shard in unit.plan.checkpoint.shards
        ]  # fmt: skip

    def require_room(self, units: Sequence[Unit]) -> None:
        """Raise UsageError if a unit needs more of the disk than the bound."""
        if self.disk is None or not units:
            return
        need = max(
            smallest(self.steps_of(unit), _sizes(unit) if self.leaving else {}, 0, True)
            for unit in units
        )
        if need > self.disk:
            raise UsageError(
                f"--disk {self.disk:,} bytes is too little for one output file and the source "
                f"files that it is made of: the smallest that works is {size_for_option(need)}"
            )


def _sizes(unit: Unit) -> dict[str, int]:
    """Return the bytes of a unit's output file, by name; {} without one."""
    return {layout.filename: layout.size for layout in unit.plan.shards}


@dataclass(frozen=True, slots=True)
class UploadingPlace:
    """The `Place` that uploads each file.

    Attributes:
        repo: `org/name`.
        head: its commit when the driver looked at it.
        part: component of a pipeline, "" without one.
        algorithm: of the files' digests.
        stays: takes the file when it is uploaded; None where it leaves the disk.
    """

    repo: str
    head: Snapshot
    part: str
    algorithm: str
    stays: SharedPlace | None

    def aside(self) -> AbstractContextManager[Path]:
        """Return a directory of the output, or a temporary one of this machine."""
        return self.stays.aside() if self.stays else _temporary()

    def take(self, path: Path, digest: str, moved: Transfers) -> Upload | None:
        """Upload a file.

        Raises:
            UsageError: the Hub wants it in git itself.
            InputError, MachineError: see `Publication.add`.
        """
        publication = Publication.joined(self.repo, self.head, moved.add_uploaded)
        sha256 = digest if self.algorithm == "sha256" else None
        with in_mid_run():
            sent = publication.add(path, path_in_model(self.part, path.name), sha256)
            if not sent.stored:
                raise wanted_in_git(self.repo, sent.name)
        if self.stays is not None:
            self.stays.take(path, digest, moved)
        return Upload(digest, sent.size, sent.sha256, sent.sample)


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nf4-") as directory:
        yield Path(directory)


def wanted_in_git(repo: str, name: str) -> UsageError:
    """Return the error about a file that a Hub would not store before the commit."""
    return UsageError(
        f"{repo} wants {name} in git itself, not in LFS, where it would have to stay on this disk "
        "until the commit: name *.safetensors in its .gitattributes, or do without --disk and --ray"
    )


@dataclass(frozen=True, slots=True)
class ReachesHub:
    """Check that a machine reaches the Hub with the rights that it needs, and sees files.

    Attributes:
        address: of the Hub where nf4 runs.
        snapshot: the source that it fetches from; None for one in a shared directory.
        repo: that it uploads to, None for none.
        files: the check of shared files and directories.
    """

    address: str
    snapshot: Snapshot | None
    repo: str | None
    files: SeesFiles

    def fault(self) -> str | None:
        if (fault := self.files.fault()) is not None:
            return fault
        if endpoint() != self.address:
            return (
                f"its Hub is {endpoint()}, and {self.address} where nf4 runs: set the same "
                "HF_ENDPOINT for `ray start`"
            )
        try:
            if self.snapshot is not None:
                client.resolve(Name(self.snapshot.repo, self.snapshot.commit))
            if self.repo is not None:
                Publication(self.repo).require_write_access()
        except (InputError, MachineError, UsageError) as error:
            return f"{error} (every node needs its own token: set HF_TOKEN for `ray start`)"
        return None
