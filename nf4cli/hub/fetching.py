"""Source files from a Hub, ahead of the conversion that reads them, and gone behind it."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..callbacks import Notify
from ..checkpoint.reader import ByteReader, read_shard
from ..checkpoint.types import Shard, TensorInfo
from ..convert.transfers import Transfers
from ..errors import InputError, InterruptedRunError, MachineError
from . import client
from .budget import Budget, Step
from .client import RemoteFile, Snapshot
from .errors import endpoint, in_mid_run, is_offline

if TYPE_CHECKING:
    from numpy.typing import NDArray

_THREADS = 2  # files that are fetched at a time
_ATTEMPTS = 5  # without a byte between them, before a download is given up
_WRONG = 3  # times that a whole file may come with a wrong digest
_PIECE = 1 << 20  # bytes
_WATCH_EVERY = 0.5  # seconds
_LONGEST_END = 0.7  # seconds that a run which ends waits for its threads


class Fetcher:
    """The files of a snapshot as a conversion's ShardSource.

    Args:
        root: of the source; paths under it are names of the snapshot's files.
        steps: the files to be read, in the order in which they will be.
        directory: where files are fetched to, and removed from when they have been read; None
            for the user's cache, where they stay.
        fetched: names of those that go to `directory`; the others are in the cache.
        budget: asked before a file is begun.
        transfers: told of every byte.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        root: Path,
        steps: Sequence[Step],
        directory: Path | None,
        fetched: Collection[str],
        budget: Budget,
        transfers: Transfers,
        notify: Notify,
    ) -> None:
        self._snapshot = snapshot
        self._root = root
        self._directory = directory
        self._fetched = fetched
        self._budget = budget
        self._transfers = transfers
        self._notify = notify
        self._waiting = list(steps)[::-1]
        self._steps = {step.name: step for step in steps}
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._here: dict[str, Path] = {}  # name -> where its bytes are
        self._readers: dict[str, ByteReader] = {}
        self._admitted: set[str] = set()  # before the first thread asks
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"nf4-fetch-{i}", daemon=True)
            for i in range(_THREADS)
        ]

    def _name_of(self, shard: Shard) -> str:
        return shard.path.relative_to(self._root).as_posix()

    def __enter__(self) -> Fetcher:
        if self._directory is not None:
            self._directory.mkdir(exist_ok=True)
            self._take_over(self._directory)
        else:
            watch = threading.Thread(target=self._watch_cache, name="nf4-watch", daemon=True)
            self._threads.append(watch)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
        until = time.monotonic() + _LONGEST_END
        for thread in self._threads:  # one that waits for the network ends with the process
            thread.join(max(0.0, until - time.monotonic()))
        for reader in self._readers.values():
            reader.close()

    def _take_over(self, directory: Path) -> None:
        """Keep what an earlier run fetched of the files that come first, as far as it fits."""
        wanted: set[Path] = set()
        for step in self._waiting[::-1]:
            places = _places(directory, step.name) if step.name in self._fetched else ()
            if places and not any(place.exists() for place in places):
                break
            if not self._budget.try_admit(step):
                break
            self._admitted.add(step.name)
            wanted.update(places)
        for place in directory.rglob("*"):
            if place not in wanted and not place.is_dir():
                place.unlink()

    def _watch_cache(self) -> None:
        """Count what comes to the cache while it comes: huggingface_hub tells of whole files."""
        blobs, counted = client.blobs_of(self._snapshot.repo), 0
        while True:
            ended = self._stop.wait(_WATCH_EVERY)
            here = 0
            for file in () if ended else blobs.glob("*.incomplete"):
                with suppress(OSError):
                    here += file.stat().st_size
            self._transfers.add_downloaded(here - counted)
            counted = here
            if ended:
                return

    def open(self, shard: Shard) -> ByteReader:
        """Wait until a file is here, with the digest that the Hub states.

        Raises:
            TransferError, MachineError: it cannot be had.
        """
        name = self._name_of(shard)
        reader = self._readers[name] = ByteReader(self._wait_for(name), shard.size)
        return reader

    def take(self, name: str, target: Path) -> None:
        """Wait for a file that goes into the output as it is, and put it there.

        Raises:
            TransferError, MachineError: it cannot be had.
        """
        place = self._wait_for(name)
        if self._lies_here(place):
            place.replace(target)
        else:
            shutil.copyfile(place, target)

    def _wait_for(self, name: str) -> Path:
        with self._changed:
            self._changed.wait_for(
                lambda: name in self._here or self._failure or self._stop.is_set()
            )
            if name not in self._here:
                raise self._failure or InterruptedRunError("interrupted")
            return self._here[name]

    def _lies_here(self, place: Path) -> bool:
        """Whether a file was fetched for this run alone."""
        return self._directory is not None and self._directory in place.parents

    def read_tensor(self, shard: Shard, tensor: TensorInfo) -> NDArray[np.uint8]:
        """A small tensor, from the Hub: the file that it is in may be far ahead, or gone."""
        file = self._snapshot.files[self._name_of(shard)]
        local = client.cached(self._snapshot, file)
        if local is not None and local.stat().st_size == shard.size:
            with ByteReader(local, shard.size) as reader:
                return reader.read(tensor.start, tensor.nbytes)
        read = partial(client.read_range, self._snapshot, file, tensor.start, tensor.stop)
        with in_mid_run():
            data = client.persist(read, self._notify, self._stop)
        return np.frombuffer(data, np.uint8)

    def close(self, shard: Shard) -> None:
        """Remove a file that has been read."""
        name = self._name_of(shard)
        reader = self._readers.pop(name)
        reader.close()
        if self._lies_here(reader.path):
            reader.path.unlink()
            self._budget.source_gone(self._steps[name])

    def fail(self, error: BaseException) -> None:
        """Something else of the run has failed: `open` raises it."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        self._budget.fail()

    def abort(self) -> None:
        self._stop.set()
        self._budget.fail()
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while True:
                with self._turn:  # admission is in order
                    if not self._waiting or self._stop.is_set():
                        return
                    step = self._waiting.pop()
                    if step.name not in self._admitted and not self._budget.admit(step):
                        return
                with in_mid_run():
                    place = self._fetch(self._snapshot.files[step.name])
                if step.shard is not None:
                    _require_header(step.shard, place)
                with self._changed:
                    self._here[step.name] = place
                    self._changed.notify_all()
        except BaseException as error:
            self.fail(error)

    def _fetch(self, file: RemoteFile) -> Path:
        """Have a file on the disk, and its digest right."""
        if self._directory is None:
            return to_cache(self._snapshot, file, self._transfers, self._stop, self._notify)
        local = client.cached(self._snapshot, file)
        if local is not None:
            if not is_right(local, file, self._stop):
                raise MachineError(
                    f"{local}, in the cache, has another digest than {endpoint()} states: remove it"
                )
            self._transfers.add_downloaded(file.size)
            return local
        (self._directory / file.name).parent.mkdir(parents=True, exist_ok=True)
        download = Download(self._snapshot, file, self._directory, self._transfers, self._stop)
        return download.run(self._notify)


def _require_header(shard: Shard, place: Path) -> None:
    """The plan was made from a header that came alone, before anything could be compared with a
    digest; the file's own has to be the same.

    Raises:
        InputError: it is another.
    """
    if read_shard(place).tensors != shard.tensors:
        raise InputError(
            f"{shard.path.name}: the header that {endpoint()} sent first is another than that of "
            "the whole file, whose digest is right: something on the way is damaged. Start again"
        )


def to_cache(
    snapshot: Snapshot,
    file: RemoteFile,
    transfers: Transfers,
    stop: threading.Event,
    notify: Notify,
) -> Path:
    """Have a file in the user's cache, with the digest that the Hub states.

    Raises:
        InputError, MachineError: it cannot be had.
    """
    place, again = client.cached(snapshot, file), False
    for _ in range(_WRONG):
        if place is None:
            place = client.persist(
                partial(client.fetch_to_cache, snapshot, file, again), notify, stop
            )
        if is_right(place, file, stop):
            transfers.add_downloaded(file.size)
            return place
        if is_offline():
            raise MachineError(
                f"{place}, in the cache, has another digest than it was fetched with, and "
                "HF_HUB_OFFLINE forbids to fetch it again: unset that"
            )
        notify(f"{place} has another digest than {endpoint()} states: fetching it again")
        place, again = None, True
    raise InputError(_wrong(snapshot, file))


def is_right(place: Path, file: RemoteFile, stop: threading.Event) -> bool:
    """Whether a file has the size and the digest that the Hub states."""
    if place.stat().st_size != file.size:
        return False
    expected = expected_digest(file)
    if expected is None:
        return True  # a cache without links does not tell
    digest = new_digest(file)
    with place.open("rb") as opened:
        while data := opened.read(_PIECE):
            if stop.is_set():
                raise InterruptedRunError("interrupted")
            digest.update(data)
    return bool(digest.hexdigest() == expected)


def fetch_all(
    snapshot: Snapshot, names: Sequence[str], transfers: Transfers, notify: Notify
) -> Path:
    """Have files of a model in the user's cache; returns the directory that they lie in.

    Raises:
        InputError, MachineError: see `to_cache`.
    """
    stop = threading.Event()
    transfers.to_download = sum(snapshot.files[name].size for name in names)
    root = Path()
    for name in names:
        place = to_cache(snapshot, snapshot.files[name], transfers, stop, notify)
        root = place.parents[name.count("/")]
    return root


class Download:
    """One file, appended to until it is whole; what is there of an earlier attempt, or of an
    earlier run, is not fetched again.

    Args:
        directory: where it goes; unfinished as NAME.part.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        file: RemoteFile,
        directory: Path,
        transfers: Transfers,
        stop: threading.Event,
    ) -> None:
        self._snapshot, self._file, self._stop = snapshot, file, stop
        self._transfers = transfers
        self._place, self._part = _places(directory, file.name)
        self._digest = new_digest(file)

    def run(self, notify: Notify) -> Path:
        """Fetch what is missing.

        Raises:
            InputError: the bytes are not those that the Hub states, again and again.
            MachineError: the connection fails, again and again.
        """
        if self._place.exists():  # an earlier run had it whole
            self._place.rename(self._part)
        for attempt in range(_WRONG):
            with self._part.open("ab+") as out:
                self._continue(out)
                self._persist(out, notify)
            if expected_digest(self._file) in (None, self._digest.hexdigest()):
                self._part.rename(self._place)
                return self._place
            self._forget(self._file.size)
            if attempt + 1 < _WRONG:
                notify(f"{self._file.name} came with a wrong digest: fetching it again")
        raise InputError(_wrong(self._snapshot, self._file))

    def _continue(self, out: Any) -> None:
        """Digest what is there."""
        self._digest = new_digest(self._file)
        if os.fstat(out.fileno()).st_size > self._file.size:
            out.truncate(0)
        out.seek(0)
        while data := out.read(_PIECE):
            self._digest.update(data)
            self._transfers.add_downloaded(len(data))

    def _persist(self, out: Any, notify: Notify) -> None:
        """Append the rest; an attempt that brought something counts for none."""
        failures = 0
        while (before := out.tell()) < self._file.size:
            try:
                self._append(out)
            except MachineError as error:
                failures = 0 if out.tell() > before else failures + 1
                if failures >= _ATTEMPTS:
                    raise
                notify(f"{error}; attempt {failures + 1} goes on from byte {out.tell():,}")
                if self._stop.wait(client.waits(failures + 1)[-1]):
                    raise InterruptedRunError("interrupted") from None

    def _append(self, out: Any) -> None:
        start = out.tell()
        with client.open_at(self._snapshot, self._file, start) as (position, chunks):
            skip = start - position
            if skip < 0:
                raise MachineError(
                    f"{self._file.name}: asked for bytes from {start:,} on, got some from "
                    f"{position:,} on"
                )
            for chunk in chunks:
                if self._stop.is_set():
                    raise InterruptedRunError("interrupted")
                data = chunk[skip:]
                skip = max(0, skip - len(chunk))
                data = data[: self._file.size - out.tell()]
                out.write(data)
                self._digest.update(data)
                self._transfers.add_downloaded(len(data))
                if out.tell() == self._file.size:
                    break  # whatever else would come
        out.flush()
        if out.tell() < self._file.size:
            raise MachineError(f"{self._file.name}: the connection ended early")

    def _forget(self, count: int) -> None:
        self._transfers.add_downloaded(-count)
        with suppress(FileNotFoundError):
            self._part.unlink()


def _places(directory: Path, name: str) -> tuple[Path, Path]:
    """Where a file lies when it is whole, and while it is not."""
    return directory / name, directory / f"{name}.part"


def new_digest(file: RemoteFile) -> Any:
    """What digests a file as the Hub does: SHA-256, or git's own for a file that lies in git."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def expected_digest(file: RemoteFile) -> str | None:
    """What the Hub states."""
    return file.sha256 or file.blob


def _wrong(snapshot: Snapshot, file: RemoteFile) -> str:
    return (
        f"{file.name} of {snapshot.name} came {_WRONG} times with another digest than "
        f"{endpoint()} states ({expected_digest(file)}): the file there, or something on "
        "the way, is damaged"
    )
