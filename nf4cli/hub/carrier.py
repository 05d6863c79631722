"""A run whose source comes from a Hub, or whose output goes to one, within a bound on the disk.

Three things overlap: source files are fetched ahead, the conversion reads them, and output files
are uploaded as they are complete.  The budget couples them: who needs room waits for the others.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import stopping
from ..callbacks import Notify
from ..checkpoint.discovery import MANIFEST, PIPELINE_RECORD
from ..checkpoint.reader import ByteReader, LocalShards
from ..checkpoint.types import Shard, TensorInfo
from ..convert.journal import Journal, Part, Upload
from ..convert.output_place import base_bytes, room_for
from ..convert.resume import Standing
from ..convert.transfers import Transfers
from ..convert.workspace import Workspace
from ..errors import InputError, InterruptedRunError, UsageError
from ..output.manifest import FileRecord, Manifest
from ..output.pipeline_record import Record
from ..planning.model_plan import ModelPlan, path_in_model
from ..units import size_for_option
from . import client
from .budget import Budget, Step, smallest, steps_of
from .client import Name, Snapshot
from .errors import endpoint, in_mid_run
from .fetching import Fetcher, is_right
from .publish import LostUploadError, Publication, Published, Uploaded
from .repository import read_whole

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a conversion from a Hub needs, in bytes.

    Attributes:
        fetch_bytes, cached_bytes: of weight files, which have to be fetched or are in the cache.
        smallest_disk_bytes: the smallest --disk with an output that stays.
        smallest_disk_bytes_when_pushed: that with one that leaves, file by file.
    """

    repo: str
    commit: str
    fetch_bytes: int
    cached_bytes: int
    smallest_disk_bytes: int
    smallest_disk_bytes_when_pushed: int


class HubTransport:
    """See the module, and `Transport`.

    Args:
        snapshot: where the source comes from; None for one that lies here.
        limit: bytes that the run may hold on the disk; source files are then removed when they
            have been read.  None for no bound: they come to the user's cache and stay there.
        publication: where the output goes to; None for nowhere.
        leaving: output files are removed when they are uploaded, and no output stays here; without
            a publication when they are complete, of an output that is made for its digests.
        transfers: told of everything that is moved and held.
        proved: what is proved by an output that leaves for nowhere, for the journal.

    Attributes:
        outcome: where the output is published, at the end.
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
    ) -> None:
        self.snapshot = snapshot
        self.publication = publication
        self.leaving = leaving
        self.transfers = transfers
        self.notify = notify
        self.outcome: Published | None = None
        self._limit = limit
        self._proved = proved

    @property
    def destination(self) -> str | None:
        if not self.leaving:
            return None
        return self.publication.repo if self.publication else f"a proof of {self._proved}"

    @property
    def scratch(self) -> bool:
        return self.leaving and self.publication is None

    def prepare(self, model: ModelPlan) -> None:
        """See that the user's cache has room for what comes there, and that we may publish.

        Raises:
            MachineError: the cache is too full.
            UsageError, InputError, MachineError: see Publication.prepare.
        """
        if self.snapshot is not None and self._limit is None:
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
        """Return the manifests of what is published there now, if it is whole and the same."""
        if self.publication is None:
            return None
        repo = self.publication.repo
        head = client.persist(lambda: client.resolve(Name(repo, None)), self.notify)
        found: dict[str, Manifest] = {}
        try:
            for part in model.parts:
                name = path_in_model(part, MANIFEST)
                found[part] = self._read(head, name, Manifest.from_file)
                if not _is_whole(head, part, found[part].digest, found[part].output_files):
                    return None
            if model.is_pipeline:
                record = self._read(head, PIPELINE_RECORD, Record.from_file)
                if not _is_whole(head, "", record.digest, record.files):
                    return None
        except InputError:
            return None
        if not all(is_same(part, manifest) for part, manifest in found.items()):
            return None
        stays = "; its README.md stays as well" * self.publication.replaces_card
        self.notify(f"{repo} has this already, as this would write it{stays}")
        url, private = f"{endpoint()}/{repo}", self.publication.private
        self.outcome = Published(repo, head.commit, url, private, changed=False, deleted=())
        return found

    def _read(self, head: Snapshot, name: str, parse: Callable[[Path], Parsed]) -> Parsed:
        """Return a record of a commit.

        Raises:
            InputError: there is none, or it is damaged.
        """
        with stopping.whole(lambda: tempfile.TemporaryDirectory(prefix="nf4-")) as place:
            path = Path(place) / name.rpartition("/")[2]
            path.write_bytes(client.persist(lambda: read_whole(head, name), self.notify))
            return parse(path)

    def disk_needed(self, model: ModelPlan, workers: int) -> int:
        steps = steps_of(model, self._fetched(model))
        need = smallest(steps, model.file_sizes, base_bytes(model, workers), self.leaving)
        if self._limit is not None and self._limit < need:
            raise UsageError(self._too_little(model, need))
        return need

    def outlook(self, model: ModelPlan, pushed: ModelPlan, workers: int) -> Outlook:
        """Return what a run would move and need; of a source that comes from a Hub.

        Args:
            pushed: the plan of a run whose output leaves the disk.
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
        """Return the paths of the source files that take room of the run's."""
        if self.snapshot is None or self._limit is None:
            return set()
        files = self.snapshot.files
        names = (step.name for step in steps_of(model, ()))
        return {name for name in names if client.cached(self.snapshot, files[name]) is None}

    def carry(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], algorithm: str,
        workers: int,
    ) -> HubCarriage:  # fmt: skip
        load = self._load(work, model, standings, workers)
        return HubCarriage(self, work, model, load, algorithm)

    def _load(
        self, work: Workspace, model: ModelPlan, standings: Mapping[str, Standing], workers: int
    ) -> Load:
        """Return what is left to be moved, in a form that fits the bound.

        Under a bound, an earlier run's unfinished output files may have to go: two files that it
        had begun at once need not fit beside what comes first now.
        """
        limit, fetched = self._limit_on(work), self._fetched(model)
        uploads = _uploads_of(work, model, standings)
        present = self._present(work, model, uploads)
        sizes, base = model.file_sizes, base_bytes(model, workers)
        while True:
            steps = steps_of(model, fetched, standings, {*uploads, *present})
            here = (_begun(model, standings) - uploads.keys()) | present
            need = smallest(steps, sizes, base, self.leaving, here)
            if limit is None or not self.leaving or need <= limit:
                return Load(limit, steps, fetched, sizes, base, here, uploads, present)
            complete = {
                path_in_model(part, name) for part, s in standings.items() for name in s.shards
            }
            stale = here - present - complete - (steps[0].outputs if steps else frozenset())
            if not stale:  # the cache had files that are gone
                raise UsageError(self._too_little(model, need))
            for part, name in map(model.part_and_name, stale):
                standings[part].forget(model.parts[part], [name])

    def _limit_on(self, work: Workspace) -> int | None:
        """Return the bound, lowered to what the disk has: what is fetched ahead would fill it."""
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
        """Return the paths of files that an earlier run copied and that are as the Hub has them."""
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
        """Commit everything: from here on others see it, and a stop comes too late.

        Raises:
            TransferError, MachineError: see Publication.commit.
            InterruptedRunError: a stop was asked for; the Hub may have taken the commit or not.
        """
        if self.publication is None:
            return
        with in_mid_run():
            try:
                self.outcome = stopping.leave_behind(
                    partial(self._commit, self.publication, model, directory, manifests)
                )
            except LostUploadError:  # it names one of perhaps many; what is there is not sent again
                lost(self.publication.restored)
                raise

    def _commit(
        self,
        publication: Publication,
        model: ModelPlan,
        directory: Path,
        manifests: Mapping[str, Manifest],
    ) -> Published:
        """Send what was not sent yet, and commit it all."""
        known = {
            path_in_model(part, name): record.digest
            for part, manifest in manifests.items()
            for name, record in manifest.output_files.items()
            if manifest.digest == "sha256"
        }
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            name = path.relative_to(directory).as_posix()
            if not publication.has(name):
                publication.add(path, name, known.get(name))
        version = next(iter(manifests.values())).tool_version
        return publication.commit(f"{model.name} in 4 bit, by nf4 {version}")


def _is_whole(head: Snapshot, part: str, algorithm: str, records: Mapping[str, FileRecord]) -> bool:
    """Whether a commit has the files of a manifest, as far as the Hub states it."""
    for name, record in records.items():
        file = head.files.get(path_in_model(part, name))
        digest = file and (file.sha256 if algorithm == "sha256" else None)
        if file is None or file.size != record.size or digest not in (None, record.digest):
            return False
    return True


def _uploads_of(
    work: Workspace, model: ModelPlan, standings: Mapping[str, Standing]
) -> dict[str, Upload]:
    """Return the output files that were taken away, by path."""
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
        limit: bytes that may lie on the disk, None for no bound.
        steps: the source files, in order.
        fetched: paths of those that take room of the run's.
        sizes: bytes of the output files, by path.
        base: bytes that lie on the disk all the time.
        here: output files that an earlier run began.
        uploads: output files that an earlier run had taken away, by path.
        present: files that an earlier run copied, and that are whole.
    """

    limit: int | None
    steps: list[Step]
    fetched: Collection[str]
    sizes: Mapping[str, int]
    base: int
    here: Collection[str]
    uploads: Mapping[str, Upload]
    present: Collection[str]


class HubCarriage:
    """See `Carriage`: fetches and uploads while the run converts.

    Args:
        algorithm: of the digests that `file_done` is given.
    """

    def __init__(
        self, transport: HubTransport, work: Workspace, model: ModelPlan, load: Load, algorithm: str
    ) -> None:
        self._load, self._model = load, model
        self._publication, self._transfers = transport.publication, transport.transfers
        budget = Budget(
            load.limit, load.sizes, load.base, transport.leaving, self._transfers, load.here
        )
        self._source: Fetcher | _Paced
        if transport.snapshot is None:
            self._source = _Paced(model.root, load.steps, budget)
        else:
            self._source = Fetcher(
                transport.snapshot, model.root, load.steps,
                None if load.limit is None else work.fetched, load.fetched, budget,
                self._transfers, transport.notify,
            )  # fmt: skip
            files = transport.snapshot.files
            self._transfers.to_download = sum(files[step.name].size for step in load.steps)
        self._uploads: _Uploads | None = None
        if transport.publication is not None or transport.leaving:
            self._uploads = _Uploads(
                transport.publication, work.journal, model, algorithm, transport.leaving,
                budget, self._source,
            )  # fmt: skip
        self._taken = {step.name for step in load.steps if step.shard is None}
        self._directory = work.directory
        self._stack = ExitStack()

    def __enter__(self) -> HubCarriage:
        with ExitStack() as stack:
            stack.enter_context(self._source)
            if self._publication is not None:
                self._transfers.to_upload = sum(self._load.sizes.values())
                for name, upload in self._load.uploads.items():
                    sent = Uploaded(name, upload.size, upload.sha256, upload.sample, True)
                    self._publication.restore(sent)
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
        if source in self._taken:
            self._source.take(source, target)
        else:
            shutil.copyfile(self._model.root / source, target)

    def file_done(self, name: str, path: Path, digest: str) -> None:
        if self._uploads is not None:
            self._uploads.put(name, path, digest)


class _Paced(LocalShards):
    """Local source files, each opened when there is room for what is made of it."""

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
        """Copy a file that goes into the output as it is, when there is room."""
        self._wait_for_room(name)
        shutil.copyfile(self._root / name, target)

    def _wait_for_room(self, name: str) -> None:
        if not self._budget.admit(self._steps[name]):
            raise self._failure or InterruptedRunError("interrupted")

    def fail(self, error: BaseException) -> None:
        self._failure = error
        self.abort()

    def abort(self) -> None:
        self._budget.fail()


class _Uploads:
    """A thread that uploads files in the order in which they are complete."""

    def __init__(
        self,
        publication: Publication | None,
        journal: Journal,
        model: ModelPlan,
        algorithm: str,
        leaving: bool,
        budget: Budget,
        source: Fetcher | _Paced,
    ) -> None:
        self._publication, self._journal, self._model = publication, journal, model
        self._algorithm = algorithm
        self._leaving, self._budget = leaving, budget
        self._source = source
        self._queue: queue.Queue[tuple[str, Path, str] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="nf4-upload", daemon=True)

    def __enter__(self) -> _Uploads:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)  # one that waits for the network ends with the process

    def put(self, name: str, path: Path, digest: str) -> None:
        """Hand a file over.

        Raises:
            InputError, MachineError: an earlier one could not be uploaded.
        """
        if self._failure is not None:
            raise self._failure
        self._queue.put((name, path, digest))

    def drain(self) -> None:
        """Wait until everything is uploaded.

        Raises:
            InputError, MachineError: it cannot be.
        """
        self._queue.put(None)
        stopping.join([self._thread])
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                with in_mid_run():
                    self._upload(*item)
        except BaseException as error:
            self._failure = error
            self._source.fail(error)

    def _upload(self, name: str, path: Path, digest: str) -> None:
        if self._publication is None:
            self._leave(name, path, Upload(digest, path.stat().st_size, digest, b""))
            return
        known = digest if self._algorithm == "sha256" else None
        uploaded = self._publication.add(path, name, known)
        if self._leaving and self._budget.bounded and not uploaded.stored:
            raise UsageError(
                f"{self._publication.repo} wants {name} in git itself, not in LFS, where it "
                "would have to stay on this disk until the commit: name *.safetensors in its "
                ".gitattributes, or do without --disk"
            )
        if self._leaving and uploaded.stored:
            self._leave(name, path, Upload(digest, uploaded.size, uploaded.sha256, uploaded.sample))

    def _leave(self, name: str, path: Path, upload: Upload) -> None:
        self._journal.uploaded(*self._model.part_and_name(name), upload)
        path.unlink()
        self._budget.output_gone(name)
