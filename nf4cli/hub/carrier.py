"""Move the files of a run from and to a Hub while it converts, within a bound on the disk.

Three things overlap: source files are fetched ahead, the conversion reads them, and output files
are uploaded as they are complete.  The budget couples them: whatever needs room waits for the
others to free some.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import stopping
from ..callbacks import Notify
from ..checkpoint.discovery import MANIFEST, PIPELINE_RECORD
from ..checkpoint.model_files import never_kind
from ..checkpoint.reader import ByteReader, LocalShards
from ..checkpoint.types import Shard, TensorInfo
from ..convert.journal import Journal, Part, Upload
from ..convert.make_units import Place, place_for_units
from ..convert.output_place import base_bytes, disk_bytes, room_for
from ..convert.resume import Standing
from ..convert.tasks import SeesFiles
from ..convert.transfers import Transfers
from ..convert.transport import Carriage, LocalCarriage, Means
from ..convert.units import SharedSources, Sources, Unit, source_files
from ..convert.workspace import Workspace
from ..errors import InputError, InterruptedRunError, UsageError
from ..output.manifest import FileRecord, Manifest
from ..output.pipeline_record import Record
from ..planning.model_plan import ModelPlan, path_in_model
from ..planning.plan import Plan
from ..units import size_for_option
from . import client
from .budget import Budget, Step, smallest, steps_of
from .client import Name, Snapshot
from .errors import endpoint, in_mid_run
from .fetching import Channel, Fetcher, is_right
from .on_nodes import HubSources, ReachesHub, UploadingPlace, wanted_in_git
from .publish import LostUploadError, Publication, Published, Uploaded
from .repository import read_whole
from .retries import persist

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a conversion from a Hub needs, in bytes.

    Attributes:
        repo: `org/name`.
        commit: 40 hexadecimal digits.
        fetch_bytes: of the weight files that have to be fetched.
        cached_bytes: of the weight files that are in the user's cache.
        smallest_disk_bytes: the smallest --disk where the output stays on the disk.
        smallest_disk_bytes_when_pushed: the smallest --disk where each output file leaves the disk
            when it is uploaded.
    """

    repo: str
    commit: str
    fetch_bytes: int
    cached_bytes: int
    smallest_disk_bytes: int
    smallest_disk_bytes_when_pushed: int


class HubTransport:
    """The `Transport` of a source on a Hub, or of an output that goes to one.

    Args:
        snapshot: the source; None for one on this disk.
        limit: bytes that the run may hold on the disk; source files are then removed when they
            have been read.  None for no bound: they go to the user's cache and stay there.
        publication: the output's destination; None where it is not published.
        leaving: output files are removed when they are uploaded, and no output stays here.  Without
            a publication they are removed when they are complete: the output is made for its
            digests alone.
        transfers: counts everything that is moved and held.
        notify: told what the user should know.
        proved: the output that is proved by such digests, for the journal.
        on_nodes: other machines move the weight files (see `elsewhere`); this one moves the rest.

    Attributes:
        outcome: where the output is published, after `publish`; None before.
    """

    def __init__(
        self,
        snapshot: Snapshot | None,
        limit: int | None,
        publication: Publication | None,
        leaving: bool,
        transfers: Transfers,
        notify: Notify,
        proved: str | None = None,
        on_nodes: bool = False,
    ) -> None:
        self.snapshot = snapshot
        self.publication = publication
        self.leaving = leaving
        self.transfers = transfers
        self.notify = notify
        self.outcome: Published | None = None
        self._limit = limit
        self._proved = proved
        self._on_nodes = on_nodes

    @property
    def destination(self) -> str | None:
        if not self.leaving:
            return None
        return self.publication.repo if self.publication else f"a proof of {self._proved}"

    @property
    def scratch(self) -> bool:
        return self.leaving and self.publication is None

    def prepare(self, model: ModelPlan) -> None:
        """Check that the user's cache has room for what is fetched, and prepare the publication.

        Raises:
            MachineError: the cache is too full.
            UsageError, InputError, MachineError: see `Publication.prepare`.
        """
        if self.snapshot is not None and self._limit is None and not self._on_nodes:
            files = self.snapshot.files
            names = [step.name for step in steps_of(model, ())]
            missing = [n for n in names if client.cached(self.snapshot, files[n]) is None]
            client.require_room_in_cache(
                self.snapshot.repo, sum(files[name].size for name in missing)
            )
        if self.publication is not None:
            self.publication.prepare()

    def published(
        self, model: ModelPlan, is_same: Callable[[str, Manifest], bool]
    ) -> dict[str, Manifest] | None:
        if self.publication is None:
            return None
        repo = self.publication.repo
        head = persist(lambda: client.resolve(Name(repo, None)), self.notify)
        manifests: dict[str, Manifest] = {}
        try:
            for part in model.parts:
                name = path_in_model(part, MANIFEST)
                manifest = manifests[part] = self._read(head, name, Manifest.from_file)
                if not _is_whole(head, part, manifest.digest, manifest.output_files):
                    return None
            if model.is_pipeline:
                record = self._read(head, PIPELINE_RECORD, Record.from_file)
                if not _is_whole(head, "", record.digest, record.files):
                    return None
        except InputError:
            return None
        if not all(is_same(part, manifest) for part, manifest in manifests.items()):
            return None
        stays = "; its README.md stays as well" * self.publication.replaces_card
        self.notify(f"{repo} has this already, as this would write it{stays}")
        url, private = f"{endpoint()}/{repo}", self.publication.private
        self.outcome = Published(repo, head.commit, url, private, changed=False, deleted=())
        return manifests

    def _read(self, head: Snapshot, name: str, parse: Callable[[Path], Parsed]) -> Parsed:
        """Fetch and parse a manifest or pipeline record of a commit.

        Raises:
            InputError: there is none, or it is damaged.
            MachineError: the Hub cannot be reached.
        """
        with stopping.whole(lambda: tempfile.TemporaryDirectory(prefix="nf4-")) as directory:
            path = Path(directory) / name.rpartition("/")[2]
            path.write_bytes(persist(lambda: read_whole(head, name), self.notify))
            return parse(path)

    def disk_needed(self, model: ModelPlan, workers: int) -> int:
        if self._on_nodes:
            return base_bytes(model, workers) if self.leaving else disk_bytes(model, workers)
        steps = steps_of(model, self._fetched(model))
        need = smallest(steps, model.file_sizes, base_bytes(model, workers), self.leaving)
        if self._limit is not None and self._limit < need:
            raise UsageError(self._too_little(model, need))
        return need

    def outlook(self, model: ModelPlan, pushed: ModelPlan, workers: int) -> Outlook:
        """Return what a run with a source on a Hub would move and need.

        Args:
            pushed: the plan of a run whose output leaves the disk.
            workers: threads.
        """
        assert self.snapshot is not None
        files, base = self.snapshot.files, base_bytes(model, workers)
        names = [step.name for step in steps_of(model, ())]
        to_fetch = {n for n in names if client.cached(self.snapshot, files[n]) is None}

        def bound(model: ModelPlan, leaving: bool) -> int:
            return smallest(steps_of(model, to_fetch), model.file_sizes, base, leaving)

        return Outlook(
            repo=self.snapshot.repo,
            commit=self.snapshot.commit,
            fetch_bytes=sum(files[name].size for name in to_fetch),
            cached_bytes=sum(files[name].size for name in names if name not in to_fetch),
            smallest_disk_bytes=bound(model, leaving=False),
            smallest_disk_bytes_when_pushed=bound(pushed, leaving=True),
        )

    def _too_little(self, model: ModelPlan, need: int) -> str:
        """Return the message about a bound that is smaller than `need` bytes."""
        largest = max((shard.size for _, shard in model.source_shards()), default=0)
        message = (
            f"--disk {self._limit:,} bytes is too little for {model.name}: the smallest "
            f"that works is {size_for_option(need)} (its largest file has {largest:,} bytes)"
        )
        if self.publication is None and self.leaving:
            return message
        if self.leaving:
            return f"{message}; a smaller --max-shard-size may help"
        return (
            f"{message}. With --push-to and no OUTPUT, where files leave the disk as they are "
            f"uploaded, less is enough"
        )

    def _fetched(self, model: ModelPlan) -> set[str]:
        """Return the paths of the source files that are fetched within the run's bound."""
        if self.snapshot is None or self._limit is None:
            return set()
        files = self.snapshot.files
        names = (step.name for step in steps_of(model, ()))
        return {name for name in names if client.cached(self.snapshot, files[name]) is None}

    def carry(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], algorithm: str,
        workers: int,
    ) -> Carriage:  # fmt: skip
        if self._on_nodes:
            return _BesideNodes(model.root, self, _uploads_of(work, model, standings))
        load = self._load(work, model, standings, workers)
        return HubCarriage(self, work, model, load, algorithm)

    def _load(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], workers: int
    ) -> Load:
        """Return what is left to be moved; drop finished work that does not fit within the bound.

        An earlier run may have begun several output files at once, which need not fit on the disk
        beside the first files of this run.

        Raises:
            UsageError: the bound is too small all the same.
        """
        limit, fetched = self._limit_on(work), self._fetched(model)
        uploads = _uploads_of(work, model, standings)
        present = self._present(work, model, uploads)
        sizes, base = model.file_sizes, base_bytes(model, workers)
        while True:
            steps = steps_of(model, fetched, standings, {*uploads, *present})
            begun = (_begun(model, standings) - uploads.keys()) | present
            need = smallest(steps, sizes, base, self.leaving, begun)
            if limit is None or not self.leaving or need <= limit:
                return Load(limit, steps, fetched, sizes, base, begun, uploads, present)
            complete = {
                path_in_model(part, name) for part, s in standings.items() for name in s.shards
            }
            unfinished = begun - present - complete - (steps[0].outputs if steps else frozenset())
            if not unfinished:  # files that `disk_needed` saw in the cache are gone
                raise UsageError(self._too_little(model, need))
            for part, name in map(model.part_and_name, unfinished):
                standings[part].forget(model.parts[part], [name])

    @contextmanager
    def elsewhere(
        self, plan: Plan, part: str, units: Sequence[Unit], directory: Path, algorithm: str,
        fsync: bool,
    ) -> Iterator[Means]:  # fmt: skip
        sizes = sum(layout.size for unit in units for layout in unit.plan.shards)
        with ExitStack() as stack:
            place: Place | None = None
            stays, tries = None, None
            if not self.leaving:
                place = stays = stack.enter_context(place_for_units(directory, algorithm, fsync))
                tries = stays.tries
            if self.publication is not None:
                repo, head = self.publication.repo, self.publication.head
                place = UploadingPlace(repo, head, part, algorithm, stays)
                self.transfers.to_upload += sizes
            assert place is not None, "without a publication the output stays"
            sources: Sources = SharedSources()
            if self.snapshot is not None:
                sources = fetching = HubSources(
                    self.snapshot, plan.checkpoint.root, self._limit, self.leaving
                )
                fetching.require_room(units)
                files = {}
                self.transfers.to_download += sum(
                    shard.size for unit in units for shard in unit.plan.checkpoint.shards
                )
            else:
                files = source_files(units)
            repo_name = self.publication.repo if self.publication else None
            check = ReachesHub(endpoint(), self.snapshot, repo_name, SeesFiles(files, tries))
            yield Means(place, sources, check, self.snapshot is None, self.transfers)

    def uploaded(self, name: str, upload: Upload) -> None:
        assert self.publication is not None
        self.publication.accept(Uploaded(name, upload.size, upload.sha256, upload.sample, True))

    def _limit_on(self, work: Workspace) -> int | None:
        """Return the bound, lowered to the free space: files fetched ahead would fill the disk."""
        room = room_for(work.output)
        if self._limit is None or room >= self._limit:
            return self._limit
        self.notify(
            f"--disk allows {self._limit:,} bytes and the disk has {room:,} free: no more than "
            "those are used"
        )
        return room

    def _present(
        self, work: Workspace, model: ModelPlan, uploads: Collection[str]
    ) -> frozenset[str]:
        """Return the paths of the files that an earlier run copied, and that are as on the Hub."""
        if self.snapshot is None:
            return frozenset()
        stop, files = threading.Event(), self.snapshot.files
        return frozenset(
            name
            for name in model.copies.weight_files
            if name not in uploads
            and (work.directory / name).is_file()
            and is_right(work.directory / name, files[model.copies.files[name]], stop)
        )

    def publish(
        self,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
        lost: Callable[[tuple[str, ...]], None],
    ) -> None:
        """Upload what is left and commit everything, so that others see it.

        Raises:
            TransferError, MachineError: see `Publication.commit`.
            InterruptedRunError: a stop was asked for; the Hub may have taken the commit or not.
        """
        if self.publication is None:
            return
        with in_mid_run():
            try:
                self.outcome = stopping.leave_behind(
                    partial(self._commit, self.publication, model, directory, manifests)
                )
            except LostUploadError:
                # It may name one file of many.  A file that the Hub has is not sent again.
                lost(self.publication.restored)
                raise

    def _commit(
        self,
        publication: Publication,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
    ) -> Published:
        """Upload every file that was not uploaded, and commit them all."""
        digests = {
            path_in_model(part, name): record.digest
            for part, manifest in manifests.items()
            for name, record in manifest.output_files.items()
            if manifest.digest == "sha256"
        }
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            if kind := never_kind(name):  # somebody put it into a finished output
                self.notify(f"not pushed: {name}, one of the {kind}")
            elif not publication.has(name):
                publication.add(path, name, digests.get(name))
        version = next(iter(manifests.values())).tool_version
        return publication.commit(f"{model.name} in 4 bit, by nf4 {version}")


def _is_whole(head: Snapshot, part: str, algorithm: str, records: Mapping[str, FileRecord]) -> bool:
    """Return whether a commit has every file of a record, as far as the Hub states it.

    Args:
        part: whose record it is; paths in it are within the part.
        algorithm: of the digests in the record.
    """
    for name, record in records.items():
        file = head.files.get(path_in_model(part, name))
        digest = file and (file.sha256 if algorithm == "sha256" else None)
        if file is None or file.size != record.size or digest not in (None, record.digest):
            return False
    return True


def _uploads_of(
    work: Workspace, model: ModelPlan, standings: Mapping[str, Standing]
) -> dict[str, Upload]:
    """Return the output files that an earlier run uploaded, by path."""
    beside = work.earlier.parts.get("", Part()).uploads if model.is_pipeline else {}
    parts = {
        path_in_model(part, name): upload
        for part, standing in standings.items()
        for name, upload in standing.uploads.items()
    }
    copies = model.copies.weight_files
    return {**parts, **{name: upload for name, upload in beside.items() if name in copies}}


def _begun(model: ModelPlan, standings: Mapping[str, Standing]) -> frozenset[str]:
    """Return the paths of output files that hold a finished weight."""
    return frozenset(
        path_in_model(part, plan.shards[t.file].filename)
        for part, plan in model.parts.items()
        for t in plan.tensors
        if t.name in standings[part].results
    )


@dataclass(frozen=True, slots=True)
class Load:
    """What a run has to move.

    Attributes:
        limit: bytes that may lie on the disk; None for no bound.
        steps: the source files that are still needed, in the order of reading.
        fetched: paths of the source files that are fetched within the bound.
        sizes: bytes of each output file, by path.
        base: bytes that lie on the disk all the time.
        begun: paths of the output files on the disk that an earlier run began.
        uploads: the output files that an earlier run uploaded, by path.
        present: paths of the files that an earlier run copied, and that are whole.
    """

    limit: int | None
    steps: list[Step]
    fetched: Collection[str]
    sizes: Mapping[str, int]
    base: int
    begun: Collection[str]
    uploads: Mapping[str, Upload]
    present: Collection[str]


class HubCarriage:
    """The `Carriage` that fetches and uploads while the run converts.

    Args:
        transport: that it is made by.
        work: where the run works.
        model: that is converted.
        load: what has to be moved.
        algorithm: of the digests that `file_done` gets.
    """

    def __init__(
        self, transport: HubTransport, work: Workspace, model: ModelPlan, load: Load, algorithm: str
    ) -> None:
        self._load, self._model = load, model
        self._publication, self._transfers = transport.publication, transport.transfers
        budget = Budget(
            load.limit, load.sizes, load.base, transport.leaving, self._transfers, load.begun
        )
        self._source: Fetcher | _LocalSource
        if transport.snapshot is None:
            self._source = _LocalSource(model.root, load.steps, budget)
        else:
            self._source = Fetcher(
                Channel(transport.snapshot, self._transfers, transport.notify),
                model.root, load.steps, None if load.limit is None else work.fetched,
                load.fetched, budget,
            )  # fmt: skip
            files = transport.snapshot.files
            self._transfers.to_download = sum(files[step.name].size for step in load.steps)
        self._uploads: _Uploads | None = None
        if transport.publication is not None or transport.leaving:
            self._uploads = _Uploads(
                transport, work.journal, model, algorithm, budget, self._source
            )
        self._admitted_copies = {step.name for step in load.steps if step.shard is None}
        self._directory = work.directory
        self._stack = ExitStack()

    def __enter__(self) -> HubCarriage:
        with ExitStack() as stack:
            stack.enter_context(self._source)
            if self._publication is not None:
                self._transfers.to_upload = sum(self._load.sizes.values())
                _restore(self._publication, self._load.uploads)
            if self._uploads is not None:
                stack.enter_context(self._uploads)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._stack:
            if kind is None and self._uploads is not None:
                self._uploads.drain()

    def open(self, shard: Shard) -> ByteReader:
        return self._source.open(shard)

    def read_tensor(self, shard: Shard, tensor: TensorInfo) -> NDArray[np.uint8]:
        return self._source.read_tensor(shard, tensor)

    def close(self, shard: Shard) -> None:
        self._source.close(shard)

    def abort(self) -> None:
        self._source.abort()

    def copy(self, source: str, target: Path) -> None:
        if target.relative_to(self._directory).as_posix() in self._load.present:
            return
        if source in self._admitted_copies:
            self._source.take(source, target)
        else:
            shutil.copyfile(self._model.root / source, target)

    def file_done(self, name: str, path: Path, digest: str) -> None:
        if self._uploads is not None:
            self._uploads.put(name, path, digest)


class _BesideNodes(LocalCarriage):
    """The `Carriage` of a run whose weight files other machines move.

    Args:
        root: of the source.
        transport: that it is made by.
        uploads: the files that an earlier run uploaded, by path.
    """

    def __init__(self, root: Path, transport: HubTransport, uploads: Mapping[str, Upload]) -> None:
        super().__init__(root)
        self._publication, self._uploads = transport.publication, uploads
        transport.transfers.to_upload += sum(upload.size for upload in uploads.values())

    def __enter__(self) -> _BesideNodes:
        if self._publication is not None:
            _restore(self._publication, self._uploads)
        return self


def _restore(publication: Publication, uploads: Mapping[str, Upload]) -> None:
    """Add what an earlier run uploaded to a publication."""
    for name, upload in uploads.items():
        publication.restore(Uploaded(name, upload.size, upload.sha256, upload.sample, True))


class _LocalSource(LocalShards):
    """Source files on this disk, each opened when there is room for what is made of it.

    Args:
        root: of the source.
        steps: the files that are read, in order.
        budget: admits each file.
    """

    def __init__(self, root: Path, steps: Sequence[Step], budget: Budget) -> None:
        super().__init__()
        self._root = root
        self._steps = {step.name: step for step in steps}
        self._budget = budget
        self._failure: BaseException | None = None

    def open(self, shard: Shard) -> ByteReader:
        self._wait_for_room(shard.path.relative_to(self._root).as_posix())
        return super().open(shard)

    def take(self, name: str, target: Path) -> None:
        """Copy a file that is not converted, when there is room."""
        self._wait_for_room(name)
        shutil.copyfile(self._root / name, target)

    def _wait_for_room(self, name: str) -> None:
        if not self._budget.admit(self._steps[name]):
            raise self._failure or InterruptedRunError("interrupted")

    def fail(self, error: BaseException) -> None:
        """Make `open` and `take` raise an error from elsewhere in the run."""
        self._failure = error
        self.abort()

    def abort(self) -> None:
        """End every wait."""
        self._budget.fail()


class _Uploads:
    """A thread that uploads files in the order in which they are complete.

    Where the output leaves the disk, it removes each file that the Hub has.

    Args:
        transport: has the publication; without one, files are only removed.
        journal: told of every file before it is removed.
        model: that is converted.
        algorithm: of the digests that `put` gets.
        budget: gets the room of removed files back.
        source: told of a failure, so that nobody waits for room any more.
    """

    def __init__(
        self,
        transport: HubTransport,
        journal: Journal,
        model: ModelPlan,
        algorithm: str,
        budget: Budget,
        source: Fetcher | _LocalSource,
    ) -> None:
        self._publication, self._leaving = transport.publication, transport.leaving
        self._journal, self._model = journal, model
        self._algorithm = algorithm
        self._budget = budget
        self._source = source
        self._queue: queue.Queue[tuple[str, Path, str] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="nf4-upload", daemon=True)

    def __enter__(self) -> _Uploads:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)  # an upload that waits for the network ends with the process

    def put(self, name: str, path: Path, digest: str) -> None:
        """Queue a file that is complete.

        Raises:
            TransferError, MachineError: an earlier file could not be uploaded.
        """
        if self._failure is not None:
            raise self._failure
        self._queue.put((name, path, digest))

    def drain(self) -> None:
        """Wait until every queued file is uploaded.

        Raises:
            TransferError, MachineError: one could not be uploaded.
        """
        self._queue.put(None)
        stopping.join([self._thread])
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        """Upload queued files, until there comes a None; a failure is told to the source."""
        try:
            while (item := self._queue.get()) is not None:
                with in_mid_run():
                    self._upload(*item)
        except BaseException as error:
            self._failure = error
            self._source.fail(error)

    def _upload(self, name: str, path: Path, digest: str) -> None:
        """Upload a file, and remove it where the output leaves the disk.

        Raises:
            UsageError: the Hub wants the file in git itself, so that it would have to stay here.
            InputError, MachineError: see `Publication.add`.
        """
        if self._publication is None:
            self._remove(name, path, Upload(digest, path.stat().st_size, digest, b""))
            return
        sha256 = digest if self._algorithm == "sha256" else None
        uploaded = self._publication.add(path, name, sha256)
        if self._leaving and self._budget.bounded and not uploaded.stored:
            raise wanted_in_git(self._publication.repo, name)
        if self._leaving and uploaded.stored:
            upload = Upload(digest, uploaded.size, uploaded.sha256, uploaded.sample)
            self._remove(name, path, upload)

    def _remove(self, name: str, path: Path, upload: Upload) -> None:
        """Remove a file once the journal has a line about it on the disk."""
        self._journal.uploaded(*self._model.part_and_name(name), upload)
        path.unlink()
        self._budget.output_gone(name)
