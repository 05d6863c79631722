"""A run whose source comes from a Hub, or whose output goes to one, within a bound on the disk.

Three things overlap: source files are fetched ahead, the conversion reads them, and output files
are uploaded as they are complete.  The budget couples them: who needs room waits for the others.
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import stopping
from ..engines import Notify
from ..errors import InputError, InterruptedRunError, UsageError
from ..journal import Upload
from ..limits import base_bytes
from ..manifest import Manifest
from ..planned import Plan
from ..reader import ByteReader, LocalShards, ShardSource
from ..records import Shard
from ..resume import Standing
from ..source import CARD, MANIFEST
from ..transfers import Transfers
from ..workspace import Workspace
from . import client
from .budget import Budget, Step, smallest, steps_of
from .client import Name, Snapshot
from .explaining import endpoint, in_mid_run
from .fetching import Fetcher
from .publish import LostUploadError, Publication, Published, Uploaded
from .repository import read_whole

_BESIDE = (CARD, MANIFEST)


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


class Carrier:
    """See the module.

    Args:
        snapshot: where the source comes from; None for one that lies here.
        limit: bytes that the run may hold on the disk; source files are then removed when they
            have been read.  None for no bound: they come to the user's cache and stay there.
        publication: where the output goes to; None for nowhere.
        leaving: output files are removed when they are uploaded, and no output stays here; without
            a publication when they are complete, of an output that is made for its digests.
        transfers: told of everything that is moved and held.

    Attributes:
        published: at the end.
    """

    def __init__(
        self,
        snapshot: Snapshot | None,
        limit: int | None,
        publication: Publication | None,
        leaving: bool,
        transfers: Transfers,
        notify: Notify,
    ) -> None:
        self._snapshot = snapshot
        self._limit = limit
        self._publication = publication
        self.leaving = leaving
        self._notify = notify
        self.transfers = transfers
        self.published: Published | None = None
        self._uploads: _Uploads | None = None
        self._sent: set[str] = set()  # names of files that need no other way

    @property
    def replaces_card(self) -> bool:
        """Whether a model card that is published should make room for ours."""
        return self._publication is not None and self._publication.replaces_card

    @property
    def destination(self) -> str | None:
        """The repository that output files leave the disk for."""
        return self._publication.repo if self._publication and self.leaving else None

    def require_room(self, plan: Plan) -> None:
        """Raises MachineError where the user's cache would be too full for what comes there."""
        if self._snapshot is None or self._limit is not None:
            return
        files = self._snapshot.files
        names = [shard.path.name for shard in plan.checkpoint.shards]
        missing = [n for n in names if client.cached(self._snapshot, files[n]) is None]
        client.require_room_in_cache(self._snapshot.repo, sum(files[n].size for n in missing))

    def prepare(self) -> None:
        """Have the repository that the output goes to, and see that we may write there.

        Raises:
            UsageError, InputError, MachineError: see Publication.prepare.
        """
        if self._publication is not None:
            self._publication.prepare()

    def manifest_there(self) -> Manifest | None:
        """The manifest of what is published there now; None where it is not whole."""
        assert self._publication is not None
        repo = self._publication.repo
        head = client.persist(lambda: client.resolve(Name(repo, None)), self._notify)
        try:
            with tempfile.TemporaryDirectory(prefix="nf4-") as place:
                path = Path(place) / MANIFEST
                path.write_bytes(client.persist(lambda: read_whole(head, MANIFEST), self._notify))
                found = Manifest.from_file(path)
        except InputError:
            return None
        for name, record in found.output_files.items():
            file = head.files.get(name)
            digest = file and (file.sha256 if found.digest == "sha256" else None)
            if file is None or file.size != record.size or digest not in (None, record.digest):
                return None
        url = f"{endpoint()}/{repo}"
        private = self._publication.private
        self.published = Published(repo, head.commit, url, private, changed=False, deleted=())
        return found

    def disk_needed(self, plan: Plan, workers: int) -> int:
        """Bytes of the output's disk that are enough.

        Raises:
            UsageError: the bound is below that.
        """
        steps = steps_of(plan, plan.checkpoint.shards, self._fetched(plan))
        sizes = {layout.filename: layout.size for layout in plan.shards}
        need = smallest(steps, sizes, base_bytes(plan, workers), self.leaving)
        if self._limit is not None and self._limit < need:
            raise UsageError(self._too_little(plan, workers, need))
        return need

    def outlook(self, plan: Plan, pushed: Plan, workers: int) -> Outlook:
        """What a run would move and need; of a source that comes from a Hub.

        Args:
            pushed: of a run whose output leaves the disk.
        """
        assert self._snapshot is not None
        shards, base = plan.checkpoint.shards, base_bytes(plan, workers)
        cached = {
            s.path.name
            for s in shards
            if client.cached(self._snapshot, self._snapshot.files[s.path.name]) is not None
        }
        to_fetch = {s.path.name for s in shards} - cached

        def bound(plan: Plan, leaving: bool) -> int:
            sizes = {layout.filename: layout.size for layout in plan.shards}
            return smallest(steps_of(plan, shards, to_fetch), sizes, base, leaving)

        return Outlook(
            repo=self._snapshot.repo,
            commit=self._snapshot.commit,
            fetch_bytes=sum(s.size for s in shards if s.path.name in to_fetch),
            cached_bytes=sum(s.size for s in shards if s.path.name in cached),
            smallest_disk_bytes=bound(plan, leaving=False),
            smallest_disk_bytes_when_pushed=bound(pushed, leaving=True),
        )

    def _too_little(self, plan: Plan, workers: int, need: int) -> str:
        largest = max((s.size for s in plan.checkpoint.shards), default=0)
        message = (
            f"--disk {self._limit:,} bytes is too little for {plan.checkpoint.name}: the smallest "
            f"that works is {-(-need // 1_000_000)}MB (its largest file has {largest:,} bytes)"
        )
        if self._publication is None and self.leaving:
            return message
        if self.leaving:
            return f"{message}; a smaller --max-shard-size may help"
        return (
            f"{message}. With --push-to and no OUTPUT, where files leave the disk as they are "
            f"uploaded, less is enough"
        )

    def _fetched(self, plan: Plan) -> set[str]:
        """Names of the source files that take room of the run's."""
        if self._snapshot is None or self._limit is None:
            return set()
        files = self._snapshot.files
        names = (shard.path.name for shard in plan.checkpoint.shards)
        return {n for n in names if client.cached(self._snapshot, files[n]) is None}

    def stay_below(self, room: int) -> None:
        """Lower the bound to what the disk has: what is fetched ahead would fill it."""
        if self._limit is not None and room < self._limit:
            self._notify(
                f"--disk allows {self._limit:,} bytes and the disk has {room:,} free: no more than "
                "those are used"
            )
            self._limit = room

    def fit(self, plan: Plan, standing: Standing, workers: int) -> None:
        """Decide how the rest of a run goes on, before any file of it is opened.

        Under a bound, an earlier run's unfinished output files may have to go: two files that it
        had begun at once need not fit beside what comes first now.
        """
        done = standing.results
        left = {t.weight.shard.path for t in plan.tensors if t.outputs and t.name not in done}
        self._shards = [
            shard
            for shard in plan.checkpoint.shards
            if shard.path in left or shard.path.name not in standing.sources
        ]
        fetched, base = self._fetched(plan), base_bytes(plan, workers)
        sizes = {layout.filename: layout.size for layout in plan.shards}
        self._steps = steps_of(plan, self._shards, fetched, done)
        here = {plan.shards[t.file].filename for t in plan.tensors if t.name in done}
        here -= standing.uploads.keys()
        if self._limit is not None and self.leaving:
            need = smallest(self._steps, sizes, base, True, here)
            if need > self._limit:
                first = self._steps[0].outputs if self._steps else frozenset()
                stale = here - standing.shards.keys() - first
                if not stale:  # the cache had files that are gone
                    raise UsageError(self._too_little(plan, workers, need))
                standing.forget(plan, stale)
                return self.fit(plan, standing, workers)
        self._here = here
        self._sizes, self._base = sizes, base
        self._gone = standing.uploads
        return None

    @contextmanager
    def carrying(self, work: Workspace, part: str, algorithm: str) -> Iterator[ShardSource]:
        """Fetch and upload while the body runs; at its end every upload is done.

        Args:
            algorithm: of the digests that `shard_done` is given.
        """
        transfers = self.transfers
        transfers.to_download = sum(s.size for s in self._shards) if self._snapshot else 0
        budget = Budget(self._limit, self._sizes, self._base, self.leaving, transfers, self._here)
        with ExitStack() as stack:
            source: Fetcher | _Paced
            if self._snapshot is None:
                source = _Paced(self._shards, self._steps, budget)
                stack.enter_context(source)
            else:
                source = stack.enter_context(
                    Fetcher(
                        self._snapshot,
                        self._shards,
                        None if self._limit is None else work.fetched,
                        budget,
                        self._steps,
                        transfers,
                        self._notify,
                    )
                )
            if self._publication is not None:
                transfers.to_upload = sum(self._sizes.values())
            if self._publication is not None or self.leaving:
                self._uploads = stack.enter_context(
                    _Uploads(
                        self._publication,
                        work,
                        part,
                        algorithm,
                        self.leaving,
                        self._limit is not None,
                        budget,
                        source,
                    )
                )
                for name, upload in self._gone.items():
                    if self._publication is not None:
                        sent = Uploaded(name, upload.size, upload.sha256, upload.sample, True)
                        self._publication.restore(sent)
                    self._sent.add(name)
            yield source
            if self._uploads is not None:
                self._uploads.drain()

    def shard_done(self, path: Path, digest: str) -> None:
        """An output file is complete; from any thread.

        Raises:
            InputError, MachineError: an upload failed meanwhile.
        """
        if self._uploads is not None:
            self._sent.add(path.name)
            self._uploads.put(path, digest)

    def publish(self, directory: Path, manifest: Manifest) -> None:
        """Commit everything: from here on others see it, and a stop comes too late.

        Args:
            directory: holds what was not uploaded yet.

        Raises:
            TransferError, MachineError: see Publication.commit.
            InterruptedRunError: a stop was asked for; the Hub may have taken the commit or not.
        """
        if self._publication is None:
            return
        with in_mid_run():
            try:
                self.published = stopping.leave_behind(partial(self._commit, directory, manifest))
            except LostUploadError:  # it names one of perhaps many; what is there is not sent again
                if self._uploads is not None:
                    self._uploads.forget(tuple(self._gone))
                raise

    def _commit(self, directory: Path, manifest: Manifest) -> Published:
        """Send what was not sent yet, and commit it all."""
        assert self._publication is not None
        for name in (*manifest.output_files, *_BESIDE):
            path = directory / name
            if name not in self._sent and path.is_file():
                self._publication.add(path, name)
        message = f"{manifest.source_name} in 4 bit, by nf4 {manifest.tool_version}"
        return self._publication.commit(message)


class _Paced(LocalShards):
    """Local source files, each opened when there is room for what is made of it."""

    def __init__(self, shards: list[Shard], steps: list[Step], budget: Budget) -> None:
        super().__init__()
        self._steps = dict(zip((s.path for s in shards), steps, strict=True))
        self._budget = budget
        self._failure: BaseException | None = None

    def open(self, shard: Shard) -> ByteReader:
        if not self._budget.admit(self._steps[shard.path]):
            raise self._failure or InterruptedRunError("interrupted")
        return super().open(shard)

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
        work: Workspace,
        part: str,
        algorithm: str,
        leaving: bool,
        bounded: bool,
        budget: Budget,
        source: Fetcher | _Paced,
    ) -> None:
        self._publication, self._journal, self._part = publication, work.journal, part
        self._algorithm = algorithm
        self._leaving, self._bounded, self._budget = leaving, bounded, budget
        self._source = source
        self._queue: queue.Queue[tuple[Path, str] | None] = queue.Queue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="nf4-upload", daemon=True)

    def __enter__(self) -> _Uploads:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(None)  # one that waits for the network ends with the process

    def put(self, path: Path, digest: str) -> None:
        if self._failure is not None:
            raise self._failure
        self._queue.put((path, digest))

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

    def forget(self, names: tuple[str, ...]) -> None:
        """Have a run that is continued make files again that the Hub has lost."""
        self._journal.lost(self._part, names)

    def _upload(self, path: Path, digest: str) -> None:
        if self._publication is None:
            self._leave(path, Upload(digest, path.stat().st_size, digest, b""))
            return
        known = digest if self._algorithm == "sha256" else None
        uploaded = self._publication.add(path, path.name, known)
        if self._leaving and self._bounded and not uploaded.stored:
            raise UsageError(
                f"{self._publication.repo} wants {path.name} in git itself, not in LFS, where it "
                "would have to stay on this disk until the commit: name *.safetensors in its "
                ".gitattributes, or do without --disk"
            )
        if self._leaving and uploaded.stored:
            self._leave(path, Upload(digest, uploaded.size, uploaded.sha256, uploaded.sample))

    def _leave(self, path: Path, upload: Upload) -> None:
        self._journal.uploaded(self._part, path.name, upload)
        path.unlink()
        self._budget.output_gone(path.name)
