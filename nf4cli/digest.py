"""Digests: a cryptographic one for every file, a fast one for every tensor.

A file's digest (BLAKE3, or SHA-256 on request, the Hub's own) is the proof, and any tool can
check it (`b3sum`, `sha256sum`).  A tensor's digest (XXH3, 128 bits) only names the tensor that
differs; it is not cryptographic and costs a quarter of BLAKE3's time, so that both are had in one
pass over the bytes.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .reader import ByteReader
from .records import Shard, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ALGORITHMS = ("blake3", "sha256")
TENSOR_ALGORITHM = "xxh3_128"
_PIECE = 4 << 20  # bytes read at a time


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


class ShardDigest:
    """The digest of a file and of each of its tensors, from its bytes in order.

    Args:
        tensors: in offset order, without holes, up to the end of the file.
    """

    def __init__(self, tensors: Collection[TensorInfo], algorithm: str) -> None:
        self._file = new_file_hash(algorithm)
        self._pending = [t for t in tensors if t.nbytes][::-1]
        self._hash = new_tensor_hash()
        self.position = 0
        self.tensors: dict[str, str] = {
            t.name: self._hash.hexdigest() for t in tensors if not t.nbytes
        }

    def update(self, data: NDArray[np.uint8] | bytes) -> None:
        """The next bytes of the file."""
        view = memoryview(data)
        self._file.update(view)
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

    def hexdigest(self) -> str:
        """The file's digest so far."""
        return self._file.hexdigest()


class OrderedDigest:
    """A ShardDigest (`digest`) fed by several threads: each waits for its turn by offset.

    No thread can wait for ever: pieces are handed out in order, so the one before mine is
    already in another thread's hands, or `abort` was called.
    """

    def __init__(self, digest: ShardDigest) -> None:
        self.digest = digest
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
    digest = new_file_hash(algorithm)
    for start in range(0, shard.size, _PIECE):
        digest.update(memoryview(reader.read(start, min(_PIECE, shard.size - start))))
    return digest.hexdigest()


def digest_shard(
    shard: Shard,
    algorithm: str,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[str, dict[str, str]]:
    """Read a file once: its digest, and its tensors' by name.

    Args:
        progress: told the bytes read after each piece.

    Raises:
        InputError: the file changed in size since `shard` was read.
    """
    import numpy as np

    digest = ShardDigest(shard.tensors, algorithm)
    buffer = np.empty(_PIECE, np.uint8)
    with ByteReader(shard.path, shard.size) as reader:
        while digest.position < shard.size:
            piece = buffer[: min(_PIECE, shard.size - digest.position)]
            reader.read_into(piece, digest.position)
            digest.update(piece)
            progress(piece.nbytes)
    return digest.hexdigest(), digest.tensors


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
