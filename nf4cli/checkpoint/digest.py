"""Compute digests: a cryptographic one of every file, a fast one of every tensor.

The digest of a file is the proof of its bytes.  It is BLAKE3 or, where a Hub is involved, SHA-256,
so common tools can check it (`b3sum`, `sha256sum`).  The digest of a tensor (XXH3, 128 bits) only
tells which tensor differs.  It is not cryptographic and takes a quarter of BLAKE3's time, so both
are computed in one pass over the bytes.
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
_PIECE = 1 << 20  # bytes read at a time, few enough to stay in the cache for both digests

_MANY_WORKERS = 8
"""Workers from which on one thread could not digest what they read."""

Item = TypeVar("Item")


class _Hash(Protocol):
    def update(self, data: memoryview | bytes, /) -> object: ...
    def hexdigest(self) -> str: ...


def hash_threads(workers: int) -> int:
    """Return with how many threads to compute the digest of one file that workers read.

    A file's bytes are digested in order, whoever has read them, so one thread's speed would bound
    all workers.  BLAKE3 is a tree, of which several threads can compute parts.  Each needs about
    four workers to read and encode for it (scripts/bench_scaling.py).
    """
    return max(1, workers // 4) if workers >= _MANY_WORKERS else 1


def new_file_hash(algorithm: str, threads: int = 1) -> _Hash:
    """Return a new hash object of one of ALGORITHMS; threads: that BLAKE3 may use."""
    if algorithm == "blake3":
        import blake3

        return blake3.blake3(max_threads=threads)
    return hashlib.new(algorithm)


def new_tensor_hash() -> _Hash:
    """Return a new hash object of TENSOR_ALGORITHM."""
    import xxhash

    return xxhash.xxh3_128()


class TensorDigests:
    """The digests of a file's tensors, fed with the bytes of the file in order.

    Args:
        tensors: the tensors in offset order, without holes, up to the end of the file.

    Attributes:
        position: bytes of the file so far.
        tensors: name -> digest, of the tensors that are complete.
    """

    def __init__(self, tensors: Collection[TensorInfo]) -> None:
        self._pending = [t for t in tensors if t.nbytes][::-1]
        self._hash = new_tensor_hash()
        self.position = 0
        self.tensors: dict[str, str] = {
            t.name: self._hash.hexdigest() for t in tensors if not t.nbytes
        }

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """Add the next bytes of the file."""
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
    """The digest of a file, fed with its bytes in order.

    Args:
        algorithm: one of ALGORITHMS.
        threads: that BLAKE3 may use.

    Attributes:
        position: bytes of the file so far.
    """

    def __init__(self, algorithm: str, threads: int = 1) -> None:
        self._hash = new_file_hash(algorithm, threads)
        self.position = 0

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """Add the next bytes of the file."""
        view = memoryview(data)
        self._hash.update(view)
        self.position += view.nbytes

    def hexdigest(self) -> str:
        """Return the digest of the bytes so far."""
        return self._hash.hexdigest()


class ShardDigest:
    """The digests of a file and of its tensors, fed with the bytes of the file in order.

    Args:
        tensors: see `TensorDigests`.
        algorithm: of the file's digest, one of ALGORITHMS.
        threads: that BLAKE3 may use.

    Attributes:
        file: the digest of the file.
        by_tensor: those of the tensors.
    """

    def __init__(self, tensors: Collection[TensorInfo], algorithm: str, threads: int = 1) -> None:
        self.file = FileDigest(algorithm, threads)
        self.by_tensor = TensorDigests(tensors)

    @property
    def tensors(self) -> dict[str, str]:
        """Name -> digest, of the tensors that are complete."""
        return self.by_tensor.tensors

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """Add the next bytes of the file."""
        self.file.update(data)
        self.by_tensor.update(data)

    def hexdigest(self) -> str:
        """Return the digest of the file's bytes so far."""
        return self.file.hexdigest()


Digest = TypeVar("Digest", FileDigest, TensorDigests)


class _Ordered(Generic[Digest]):
    """A digest that several threads feed; each waits until the bytes before its own are added.

    No thread waits for ever: pieces are handed out in order, so another thread already has the
    piece before, or `abort` was called.

    Attributes:
        digest: the digest that is fed.
    """

    def __init__(self, digest: Digest) -> None:
        self.digest: Digest = digest
        self._turn = threading.Condition()
        self._position = digest.position
        self._aborted = False

    def update(self, start: int, data: NDArray[np.uint8] | bytes) -> int:
        """Wait for the turn of the bytes at offset `start` of the file, and add them.

        Returns:
            Offset of the byte behind them, or `start` after `abort`.
        """
        stop = start + memoryview(data).nbytes
        with self._turn:
            self._turn.wait_for(lambda: self._position == start or self._aborted)
            if self._aborted:
                return start
        self.digest.update(data)  # outside the lock: no other thread has this turn
        with self._turn:
            self._position = stop
            self._turn.notify_all()
        return stop

    def abort(self) -> None:
        """Release every waiting thread; the digest is then useless."""
        with self._turn:
            self._aborted = True
            self._turn.notify_all()


def tensor_digest(data: NDArray[np.uint8]) -> str:
    """Return the digest of the bytes of a whole tensor."""
    digest = new_tensor_hash()
    digest.update(memoryview(data))
    return digest.hexdigest()


def digest_open(reader: ByteReader, shard: Shard, algorithm: str) -> str:
    """Return the digest of a file that is open already.

    Raises:
        InputError: the file ends too early.
    """
    return _digest_range(new_file_hash(algorithm), reader, 0, shard.size, lambda count: None)


def digest_tensor(
    reader: ByteReader,
    tensor: TensorInfo,
    progress: Callable[[int], None] = lambda count: None,
) -> str:
    """Return the digest of one tensor of an open file.

    Args:
        progress: called with the bytes of each piece that was read.

    Raises:
        InputError: the file ends too early.
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


class OrderedDigest:
    """A ShardDigest that several threads feed, see `_Ordered`.

    The two kinds of digests have turns of their own, so one thread can compute the file's digest
    while another computes the tensors' digests.

    Attributes:
        digest: the digest that is fed.
    """

    def __init__(self, digest: ShardDigest) -> None:
        self.digest = digest
        self._file = _Ordered(digest.file)
        self._tensors = _Ordered(digest.by_tensor)

    def update(self, start: int, data: NDArray[np.uint8] | bytes) -> int:
        """Wait for the turns of the bytes at offset `start` of the file, and add them.

        Returns:
            Offset of the byte behind them, or `start` after `abort`.
        """
        self._file.update(start, data)
        return self._tensors.update(start, data)

    def abort(self) -> None:
        """Release every waiting thread; the digests are then useless.

        The tensors' first: where the file's digest lacks bytes, `update` returns `start`.
        """
        self._tensors.abort()
        self._file.abort()


class ShardHashing:
    """A file that several threads read once, to compute its digest and those of its tensors.

    Args:
        shard: the file.
        turns: what its bytes are fed to.
    """

    def __init__(self, shard: Shard, turns: OrderedDigest) -> None:
        self.shard, self.turns = shard, turns
        self._reader: ByteReader | None = None
        self._lock = threading.Lock()

    def pieces(self) -> Iterator[tuple[ShardHashing, int]]:
        """Yield (self, offset) of every piece of the file, in the order to hand them out in."""
        return ((self, start) for start in range(0, self.shard.size, _PIECE))

    def add(self, start: int, buffer: NDArray[np.uint8]) -> int:
        """Read and digest the piece at offset `start`.

        Args:
            buffer: memory to read into, uint8 [_PIECE].

        Returns:
            Bytes of the piece.

        Raises:
            InputError: the file changed in size since `shard` was read.
        """
        with self._lock:
            if self._reader is None:
                self._reader = ByteReader(self.shard.path, self.shard.size)
        piece = buffer[: min(_PIECE, self.shard.size - start)]
        self._reader.read_into(piece, start)
        self.turns.update(start, piece)
        return piece.nbytes

    def close(self) -> None:
        """Close the file; no thread may read it any more."""
        if self._reader is not None:
            self._reader.close()


def digest_shards(
    shards: Sequence[Shard],
    algorithm: str,
    workers: int = 1,
    progress: Progress = no_progress,
    tensors: bool = True,
) -> list[tuple[str, dict[str, str]]]:
    """Read files once and compute their digests and those of their tensors.

    As many files are read at a time as there are workers; if there are fewer files, several
    workers share one.

    Args:
        algorithm: of the files' digests, one of ALGORITHMS.
        workers: threads; each holds a piece of 1 MiB.
        tensors: whether to compute the tensors' digests.

    Returns:
        For each file: (its digest, tensor name -> digest).

    Raises:
        InputError: a file changed in size since its header was read.
    """
    import numpy as np

    threads = hash_threads(workers // max(1, len(shards)))
    hashings = [
        ShardHashing(
            shard,
            OrderedDigest(ShardDigest(shard.tensors if tensors else (), algorithm, threads)),
        )
        for shard in shards
    ]

    def make_worker() -> Callable[[tuple[ShardHashing, int]], None]:
        buffer = np.empty(_PIECE, np.uint8)

        def work(item: tuple[ShardHashing, int]) -> None:
            hashing, start = item
            progress(hashing.shard.path.name, hashing.add(start, buffer))

        return work

    def abort() -> None:
        for hashing in hashings:
            hashing.turns.abort()

    try:
        run(_in_turn([h.pieces() for h in hashings], workers), make_worker, workers, abort)
    finally:
        for hashing in hashings:
            hashing.close()
    return [(h.turns.digest.hexdigest(), h.turns.digest.tensors) for h in hashings]


def digest_shard(
    shard: Shard,
    algorithm: str,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[str, dict[str, str]]:
    """Read one file once, and return (its digest, tensor name -> digest).

    Args:
        algorithm: of the file's digest, one of ALGORITHMS.
        progress: called with the bytes of each piece that was read.

    Raises:
        InputError: the file changed in size since its header was read.
    """
    (digests,) = digest_shards([shard], algorithm, 1, lambda _, count: progress(count))
    return digests


def _in_turn(sequences: Iterable[Iterator[Item]], width: int) -> Iterator[Item]:
    """Yield items of `width` sequences in turn; when one ends, the next one takes its place."""
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
    """Return the digest of a file of any kind; algorithm: one of ALGORITHMS.

    Raises:
        OSError: the file cannot be read.
    """
    return digests_of_file(path, [algorithm])[1][algorithm]


def digests_of_file(
    path: Path,
    algorithms: Collection[str],
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[int, dict[str, str]]:
    """Read a file of any kind once.

    Args:
        algorithms: of the digests to compute, from ALGORITHMS.
        progress: called with the bytes of each piece that was read.

    Returns:
        (size in bytes, algorithm -> digest).

    Raises:
        OSError: the file cannot be read.
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
