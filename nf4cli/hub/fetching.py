"""Fetch source files from a Hub ahead of the conversion, and remove them when they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
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
from .retries import Retries, persist

if TYPE_CHECKING:
    from numpy.typing import NDArray

_THREADS = 2  # files that are fetched at a time
_WRONG = 3  # times that a whole file may come with a wrong digest
_PIECE = 1 << 20  # bytes
_WATCH_EVERY = 0.5  # seconds
_LONGEST_END = 0.7  # seconds that a run which ends waits for its threads


@dataclass(frozen=True, slots=True)
class Channel:
    """How the files of a snapshot are fetched.

    Attributes:
        snapshot: the commit that they are of.
        transfers: counts every byte that arrives.
        notify: told of every failure that is not the last.
        stop: set it to end every fetch.
    """

    snapshot: Snapshot
    transfers: Transfers
    notify: Notify
    stop: threading.Event = field(default_factory=threading.Event)


class Fetcher:
    """The files of a snapshot as a conversion's ShardSource.

    Args:
        channel: see `Channel`.
        root: of the source; paths under it are names of the snapshot's files.
        steps: the files to fetch, in the order of reading.
        directory: where files are fetched to, and removed from when they have been read; None
            for the user's cache, where they stay.
        fetched: names of the files that go to `directory`; the others are in the cache.
        budget: admits each file before it is begun.
    """

    def __init__(
        self,
        channel: Channel,
        root: Path,
        steps: Sequence[Step],
        directory: Path | None,
        fetched: Collection[str],
        budget: Budget,
    ) -> None:
        self._channel = channel
        self._root = root
        self._directory = directory
        self._fetched = fetched
        self._budget = budget
        self._waiting = list(steps)[::-1]
        self._steps = {step.name: step for step in steps}
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._paths: dict[str, Path] = {}  # of the files that are fetched, by name
        self._readers: dict[str, ByteReader] = {}
        self._admitted: set[str] = set()  # names of files admitted before the threads start
        self._failure: BaseException | None = None
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
        """Keep the files that an earlier run fetched and that are read first, as far as they fit.

        All other files in `directory` are removed.
        """
        kept: set[Path] = set()
        for step in self._waiting[::-1]:
            paths = _paths_of(directory, step.name) if step.name in self._fetched else ()
            if paths and not any(path.exists() for path in paths):
                break
            if not self._budget.try_admit(step):
                break
            self._admitted.add(step.name)
            kept.update(paths)
        for path in directory.rglob("*"):
            if path not in kept and not path.is_dir():
                path.unlink()

    def _watch_cache(self) -> None:
        """Count the bytes of unfinished files in the cache, until the run ends.

        huggingface_hub itself reports whole files only.
        """
        blobs, counted = client.blobs_of(self._channel.snapshot.repo), 0
        while True:
            ended = self._channel.stop.wait(_WATCH_EVERY)
            unfinished = 0
            for file in () if ended else blobs.glob("*.incomplete"):
                with suppress(OSError):
                    unfinished += file.stat().st_size
            self._channel.transfers.add_downloaded(unfinished - counted)
            counted = unfinished
            if ended:
                return

    def open(self, shard: Shard) -> ByteReader:
        """Wait until a file is fetched, with the digest that the Hub states, and open it.

        Raises:
            TransferError, MachineError: it cannot be fetched.
        """
        name = self._name_of(shard)
        reader = self._readers[name] = ByteReader(self._wait_for(name), shard.size)
        return reader

    def take(self, name: str, target: Path) -> None:
        """Wait for a file that is not converted, and move or copy it to `target`.

        Raises:
            TransferError, MachineError: it cannot be fetched.
        """
        path = self._wait_for(name)
        if self._is_temporary(path):
            path.replace(target)
        else:
            shutil.copyfile(path, target)

    def _wait_for(self, name: str) -> Path:
        """Wait until a file is fetched, and return its path."""
        with self._changed:
            self._changed.wait_for(
                lambda: name in self._paths or self._failure or self._channel.stop.is_set()
            )
            if name not in self._paths:
                raise self._failure or InterruptedRunError("interrupted")
            return self._paths[name]

    def _is_temporary(self, path: Path) -> bool:
        """Return whether a file was fetched for this run alone."""
        return self._directory is not None and self._directory in path.parents

    def read_tensor(self, shard: Shard, tensor: TensorInfo) -> NDArray[np.uint8]:
        """Read a small tensor by a range request: its file may not be fetched yet, or be removed.

        Returns:
            uint8 [tensor.nbytes].

        Raises:
            TransferError, MachineError: it cannot be fetched.
        """
        snapshot, file = self._channel.snapshot, self._channel.snapshot.files[self._name_of(shard)]
        local = client.cached(snapshot, file)
        if local is not None and local.stat().st_size == shard.size:
            with ByteReader(local, shard.size) as reader:
                return reader.read(tensor.start, tensor.nbytes)
        read = partial(client.read_range, snapshot, file, tensor.start, tensor.stop)
        with in_mid_run():
            data = persist(read, self._channel.notify, self._channel.stop)
        return np.frombuffer(data, np.uint8)

    def close(self, shard: Shard) -> None:
        """Close a file that has been read, and remove it if it was fetched for this run alone."""
        name = self._name_of(shard)
        reader = self._readers.pop(name)
        reader.close()
        if self._is_temporary(reader.path):
            reader.path.unlink()
            self._budget.source_gone(self._steps[name])

    def fail(self, error: BaseException) -> None:
        """Make `open` and `take` raise an error from elsewhere in the run."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()
        self._budget.fail()

    def abort(self) -> None:
        """End every fetch and every wait."""
        self._channel.stop.set()
        self._budget.fail()
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        """Fetch one file after another, until there are none left."""
        try:
            while True:
                with self._turn:  # files are admitted in order
                    if not self._waiting or self._channel.stop.is_set():
                        return
                    step = self._waiting.pop()
                    if step.name not in self._admitted and not self._budget.admit(step):
                        return
                with in_mid_run():
                    path = self._fetch(self._channel.snapshot.files[step.name])
                if step.shard is not None:
                    _require_header(step.shard, path)
                with self._changed:
                    self._paths[step.name] = path
                    self._changed.notify_all()
        except BaseException as error:
            self.fail(error)

    def _fetch(self, file: RemoteFile) -> Path:
        """Fetch a file, or find it in the cache, and return its path; its digest is checked."""
        channel = self._channel
        if self._directory is None:
            return to_cache(channel, file)
        local = client.cached(channel.snapshot, file)
        if local is not None:
            if not is_right(local, file, channel.stop):
                raise MachineError(
                    f"{local}, in the cache, has another digest than {endpoint()} states: remove it"
                )
            channel.transfers.add_downloaded(file.size)
            return local
        (self._directory / file.name).parent.mkdir(parents=True, exist_ok=True)
        return Download(channel, file, self._directory).run()


def _require_header(shard: Shard, path: Path) -> None:
    """Raise InputError unless a file has the header that the plan was made from.

    That header came alone, by a range request, when no digest could be checked.
    """
    if read_shard(path).tensors != shard.tensors:
        raise InputError(
            f"{shard.path.name}: the header that {endpoint()} sent first is another than that of "
            "the whole file, whose digest is right: something on the way is damaged. Start again"
        )


def to_cache(channel: Channel, file: RemoteFile) -> Path:
    """Fetch a file to the user's cache, unless it is there, and return its path.

    Raises:
        InputError: it came with a wrong digest, again and again; see also `client.resolve`.
        MachineError: the Hub cannot be reached.
        InterruptedRunError: the channel was stopped.
    """
    snapshot = channel.snapshot
    path, again = client.cached(snapshot, file), False
    for _ in range(_WRONG):
        if path is None:
            fetch = partial(client.fetch_to_cache, snapshot, file, again)
            path = persist(fetch, channel.notify, channel.stop)
        if is_right(path, file, channel.stop):
            channel.transfers.add_downloaded(file.size)
            return path
        if is_offline():
            raise MachineError(
                f"{path}, in the cache, has another digest than it was fetched with, and "
                "HF_HUB_OFFLINE forbids to fetch it again: unset that"
            )
        channel.notify(f"{path} has another digest than {endpoint()} states: fetching it again")
        path, again = None, True
    raise InputError(_wrong(snapshot, file))


def is_right(path: Path, file: RemoteFile, stop: threading.Event) -> bool:
    """Return whether a file has the size and the digest that the Hub states.

    Raises:
        InterruptedRunError: `stop` was set.
    """
    if path.stat().st_size != file.size:
        return False
    expected = expected_digest(file)
    if expected is None:
        return True  # found offline in a cache without links, which states no digest
    digest = new_digest(file)
    with path.open("rb") as opened:
        while data := opened.read(_PIECE):
            if stop.is_set():
                raise InterruptedRunError("interrupted")
            digest.update(data)
    return bool(digest.hexdigest() == expected)


def fetch_all(
    snapshot: Snapshot, names: Sequence[str], transfers: Transfers, notify: Notify
) -> Path:
    """Fetch files of a model to the user's cache, and return the directory that they lie in.

    Raises:
        InputError, MachineError: see `to_cache`.
    """
    channel = Channel(snapshot, transfers, notify)
    transfers.to_download = sum(snapshot.files[name].size for name in names)
    root = Path()
    for name in names:
        path = to_cache(channel, snapshot.files[name])
        root = path.parents[name.count("/")]
    return root


class Download:
    """Fetches one file, and continues where an earlier attempt, or an earlier run, ended.

    Args:
        channel: see `Channel`.
        file: the file to fetch.
        directory: where it goes; unfinished as NAME.part.
    """

    def __init__(self, channel: Channel, file: RemoteFile, directory: Path) -> None:
        self._channel, self._file = channel, file
        self._path, self._part = _paths_of(directory, file.name)
        self._digest = new_digest(file)

    def run(self) -> Path:
        """Fetch the bytes that are missing, and return the path of the file.

        Raises:
            InputError: the bytes are not those that the Hub states, again and again.
            MachineError: the connection fails, again and again.
            InterruptedRunError: the channel was stopped.
        """
        if self._path.exists():  # an earlier run had it whole
            self._path.rename(self._part)
        for attempt in range(_WRONG):
            with self._part.open("ab+") as out:
                self._digest_present(out)
                self._append_rest(out)
            if expected_digest(self._file) in (None, self._digest.hexdigest()):
                self._part.rename(self._path)
                return self._path
            self._forget(self._file.size)
            if attempt + 1 < _WRONG:
                self._channel.notify(
                    f"{self._file.name} came with a wrong digest: fetching it again"
                )
        raise InputError(_wrong(self._channel.snapshot, self._file))

    def _digest_present(self, out: Any) -> None:
        """Digest the bytes that are there already."""
        self._digest = new_digest(self._file)
        if os.fstat(out.fileno()).st_size > self._file.size:
            out.truncate(0)
        out.seek(0)
        while data := out.read(_PIECE):
            self._digest.update(data)
            self._channel.transfers.add_downloaded(len(data))

    def _append_rest(self, out: Any) -> None:
        """Append all missing bytes; an attempt that brought any counts as none."""
        retries = Retries(self._channel.notify, self._channel.stop)
        while (before := out.tell()) < self._file.size:
            try:
                self._append(out)
            except MachineError as error:
                retries.failed(error, progress=out.tell() > before)

    def _append(self, out: Any) -> None:
        """Append the bytes that one request brings.

        Raises:
            MachineError: some are missing afterwards.
            InterruptedRunError: the channel was stopped.
        """
        start = out.tell()
        with client.open_at(self._channel.snapshot, self._file, start) as (position, chunks):
            skip = start - position
            if skip < 0:
                raise MachineError(
                    f"{self._file.name}: asked for bytes from {start:,} on, got some from "
                    f"{position:,} on"
                )
            for chunk in chunks:
                if self._channel.stop.is_set():
                    raise InterruptedRunError("interrupted")
                data = chunk[skip:]
                skip = max(0, skip - len(chunk))
                data = data[: self._file.size - out.tell()]
                out.write(data)
                self._digest.update(data)
                self._channel.transfers.add_downloaded(len(data))
                if out.tell() == self._file.size:
                    break  # the server may send more
        out.flush()
        if out.tell() < self._file.size:
            raise MachineError(f"{self._file.name}: the connection ended early")

    def _forget(self, count: int) -> None:
        """Remove the unfinished file, and count its bytes as not downloaded."""
        self._channel.transfers.add_downloaded(-count)
        with suppress(FileNotFoundError):
            self._part.unlink()


def _paths_of(directory: Path, name: str) -> tuple[Path, Path]:
    """Return the path of a file when it is whole, and while it is not."""
    return directory / name, directory / f"{name}.part"


def new_digest(file: RemoteFile) -> Any:
    """Return a digest like the one that the Hub states: SHA-256, or git's own for a file in git."""
    if file.sha256 is not None:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def expected_digest(file: RemoteFile) -> str | None:
    """Return the digest that the Hub states; None where it states none."""
    return file.sha256 or file.blob


def _wrong(snapshot: Snapshot, file: RemoteFile) -> str:
    return (
        f"{file.name} of {snapshot.name} came {_WRONG} times with another digest than "
        f"{endpoint()} states ({expected_digest(file)}): the file there, or something on "
        "the way, is damaged"
    )
