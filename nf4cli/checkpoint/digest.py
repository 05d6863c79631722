"""Digests: a cryptographic one for every file, a fast one for every tensor.

A file's digest (BLAKE3, or SHA-256 on request, the Hub's own) is the proof, and any tool can
check it (`b3sum`, `sha256sum`).  A tensor's digest (XXH3, 128 bits) only names the tensor that
differs; it is not cryptographic and costs a quarter of BLAKE3's time, so that both are had in one
pass over the bytes.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ..callbacks import Progress, no_progress
from ..threads import run
from .reader import ByteReader
from .types import Shard, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALGORITHMS = ("blake3", "sha256")
TENSOR_ALGORITHM = "xxh3_128"
_PIECE = 1 << 20  # bytes read at a time: they stay in the cache for both digests

Item = TypeVar("Item")


class _Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


def new_file_hash(algorithm: str) -> _Hash:
    """A hash object of one of ALGORITHMS."""
    if algorithm == "blake3":
        import blake3

        return blake3.blake3()
    return hashlib.new(algorithm)


def new_tensor_hash() -> _Hash:
    """A hash object of TENSOR_ALGORITHM."""
    import xxhash

    return xxhash.xxh3_128()


class TensorDigests:
    """The digest of every tensor of a file, from the file's bytes in order.

    Args:
        tensors: in offset order, without holes, up to the end of the file.

    Attributes:
        position: bytes of the file seen so far.
        tensors: digest by name, of the tensors that are complete.
    """

    def __init__(self, tensors: Collection[TensorInfo]) -> None:
        self._pending = [t for t in tensors if t.nbytes][::-1]
        self._hash = new_tensor_hash()
        self.position = 0
        self.tensors: dict[str, str] = {
            t.name: self._hash.hexdigest() for t in tensors if not t.nbytes
        }

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        while view.nbytes:
            tensor = self._pending[-1] if self._pending else None
            if tensor is None:
                break
            if self.position < tensor.start:
                count = min(view.nbytes, tensor.start - self.position)
            else:
                count = min(view.nbytes, tensor.stop - self.position)
                self._hash.update(view[:count])
            self.position += count
            view = view[count:]
            if self.position == tensor.stop:
                self.tensors[tensor.name] = self._hash.hexdigest()
                self._hash = new_tensor_hash()
                self._pending.pop()
        self.position += view.nbytes


class FileDigest:
    """The digest of a file, from its bytes in order.

    Attributes:
        position: bytes of the file seen so far.
    """

    def __init__(self, algorithm: str) -> None:
        self._hash = new_file_hash(algorithm)
        self.position = 0

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        self._hash.update(view)
        self.position += view.nbytes

    def hexdigest(self) -> str:
        """Of the bytes so far."""
        return self._hash.hexdigest()


class ShardDigest:
    """Both in one: the digest of a file and of each of its tensors, from its bytes in order.

    Args:
        tensors: see `TensorDigests`.
    """

    def __init__(self, tensors: Collection[TensorInfo], algorithm: str) -> None:
        self._file = FileDigest(algorithm)
        self._tensors = TensorDigests(tensors)

    @property
    def position(self) -> int:
        """Bytes of the file seen so far."""
        return self._file.position

    @property
    def tensors(self) -> dict[str, str]:
        """Digest by name, of the tensors that are complete."""
        return self._tensors.tensors

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """The next bytes of the file."""
        self._file.update(data)
        self._tensors.update(data)

    def hexdigest(self) -> str:
        """The file's digest so far."""
        return self._file.hexdigest()


Digest = TypeVar("Digest", FileDigest, TensorDigests, ShardDigest)


class _Ordered(Generic[Digest]):
    """A digest (`digest`) fed by several threads: each waits for its turn by offset.

    No thread can wait for ever: pieces are handed out in order, so the one before mine is
    already in another thread's hands, or `abort` was called.
    """

    def __init__(self, digest: Digest) -> None:
        self.digest: Digest = digest
        self._turn = threading.Condition()
        self._position = digest.position
        self._aborted = False

    def update(self, start: int, data: NDArray[np.uint8] | bytes) -> int:
        """Add the bytes that stand at `start` in the file; returns the place behind them."""
        stop = start + memoryview(data).nbytes
        with self._turn:
            self._turn.wait_for(lambda: self._position == start or self._aborted)
            if self._aborted:
                return start
        self.digest.update(data)  # outside the lock: nobody else has this turn
        with self._turn:
            self._position = stop
            self._turn.notify_all()
        return stop

    def abort(self) -> None:
        """Let every waiting thread go; the digests are of no use any more."""
        with self._turn:
            self._aborted = True
            self._turn.notify_all()


def tensor_digest(data: NDArray[np.uint8]) -> str:
    """The digest of a tensor's bytes."""
    digest = new_tensor_hash()
    digest.update(memoryview(data))
    return digest.hexdigest()


def digest_open(reader: ByteReader, shard: Shard, algorithm: str) -> str:
    """The digest of a file that is open already."""
    return _digest_range(new_file_hash(algorithm), reader, 0, shard.size, lambda count: None)


def digest_tensor(
    reader: ByteReader,
    tensor: TensorInfo,
    progress: Callable[[int], None] = lambda count: None,
) -> str:
    """The digest of one tensor of an open file.

    Args:
        progress: told the bytes read after each piece.
    """
    return _digest_range(new_tensor_hash(), reader, tensor.start, tensor.stop, progress)


def _digest_range(
    digest: _Hash, reader: ByteReader, start: int, stop: int, progress: Callable[[int], None]
) -> str:
    for place in range(start, stop, _PIECE):
        piece = reader.read(place, min(_PIECE, stop - place))
        digest.update(memoryview(piece))
        progress(piece.nbytes)
    return digest.hexdigest()


class OrderedDigest(_Ordered[ShardDigest]):
    """A ShardDigest fed by several threads, see above."""


class ShardHashing:
    """One file being read once, by several threads, for its digest and its tensors'.

    The two digests take turns of their own, so that one thread computes the file's while another
    computes the tensors' or reads.

    Args:
        tensors: whether the tensors' are wanted.
    """

    def __init__(self, shard: Shard, algorithm: str, tensors: bool) -> None:
        self.shard = shard
        self.file = _Ordered(FileDigest(algorithm))
        self.tensors = _Ordered(TensorDigests(shard.tensors if tensors else ()))
        self._with_tensors = tensors
        self._reader: ByteReader | None = None
        self._lock = threading.Lock()

    def pieces(self) -> Iterator[tuple[ShardHashing, int]]:
        """Every piece of the file by its offset; hand them out in this order."""
        return ((self, start) for start in range(0, self.shard.size, _PIECE))

    def add(self, start: int, buffer: NDArray[np.uint8]) -> int:
        """Read and digest the piece at `start`; returns its bytes.

        Raises:
            InputError: the file changed in size since `shard` was read.
        """
        with self._lock:
            if self._reader is None:
                self._reader = ByteReader(self.shard.path, self.shard.size)
        piece = buffer[: min(_PIECE, self.shard.size - start)]
        self._reader.read_into(piece, start)
        self.file.update(start, piece)
        if self._with_tensors:
            self.tensors.update(start, piece)
        return piece.nbytes

    def abort(self) -> None:
        """Let go of every thread that waits."""
        self.file.abort()
        self.tensors.abort()

    def close(self) -> None:
        """Let go of the file, which no thread reads any more."""
        if self._reader is not None:
            self._reader.close()


def digest_shards(
    shards: Sequence[Shard],
    algorithm: str,
    workers: int = 1,
    progress: Progress = no_progress,
    tensors: bool = True,
) -> list[tuple[str, dict[str, str]]]:
    """Read files once: of each its digest, and its tensors' by name.

    As many files are read at a time as there are workers; where there are fewer, several
    workers share a file.

    Args:
        workers: threads; each holds a piece of 1 MiB.
        tensors: False leaves the tensors' digests out.

    Raises:
        InputError: a file changed in size since its header was read.
    """
    import numpy as np

    hashings = [ShardHashing(shard, algorithm, tensors) for shard in shards]

    def make_worker() -> Callable[[tuple[ShardHashing, int]], None]:
        buffer = np.empty(_PIECE, np.uint8)

        def work(item: tuple[ShardHashing, int]) -> None:
            hashing, start = item
            progress(hashing.shard.path.name, hashing.add(start, buffer))

        return work

    def abort() -> None:
        for hashing in hashings:
            hashing.abort()

    try:
        run(_in_turn([h.pieces() for h in hashings], workers), make_worker, workers, abort)
    finally:
        for hashing in hashings:
            hashing.close()
    return [(h.file.digest.hexdigest(), h.tensors.digest.tensors) for h in hashings]


def digest_shard(
    shard: Shard,
    algorithm: str,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[str, dict[str, str]]:
    """The same of one file, in this thread.

    Args:
        progress: told the bytes read after each piece.
    """
    (found,) = digest_shards([shard], algorithm, 1, lambda _, count: progress(count))
    return found


def _in_turn(sequences: Iterable[Iterator[Item]], width: int) -> Iterator[Item]:
    """Items of `width` sequences in turn; where one ends, the next begins."""
    waiting = iter(sequences)
    active = deque(islice(waiting, width))
    while active:
        sequence = active.popleft()
        for item in islice(sequence, 1):
            yield item
            active.append(sequence)
            break
        else:
            active.extend(islice(waiting, 1))


def digest_file(path: Path, algorithm: str) -> str:
    """The digest of any file."""
    return digests_of_file(path, [algorithm])[1][algorithm]


def digests_of_file(
    path: Path,
    algorithms: Collection[str],
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[int, dict[str, str]]:
    """Read any file once: its size in bytes, and its digest by algorithm.

    Args:
        progress: told the bytes read after each piece.
    """
    hashes = {algorithm: new_file_hash(algorithm) for algorithm in algorithms}
    size = 0
    with path.open("rb") as file:
        while data := file.read(_PIECE):
            for digest in hashes.values():
                digest.update(memoryview(data))
            size += len(data)
            progress(len(data))
    return size, {algorithm: digest.hexdigest() for algorithm, digest in hashes.items()}
