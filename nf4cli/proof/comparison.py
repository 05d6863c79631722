"""Compare the bytes that a conversion makes with those of a finished checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint import bnb_format
from ..checkpoint.packed import read_state
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint, FileDigests, Placed, Shard
from ..errors import InputError
from ..output.manifest import Result
from ..planning.plan import TensorPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 19  # bytes compared at a time


@dataclass(frozen=True, slots=True)
class Compared:
    """What a conversion gave, and where a finished checkpoint differs from it.

    Attributes:
        results: of the weights, by name.
        sources: digests of the source files, by name.
        first: by tensor, the offset in bytes of the first byte that differs.
        states: by tensor, how a quant_state differs, in words.
        nbytes: bytes that were compared.
    """

    results: Mapping[str, Result]
    sources: Mapping[str, FileDigests]
    first: Mapping[str, int]
    states: Mapping[str, str]
    nbytes: int


class Comparison:
    """The sink that compares instead of writing.

    Tensors that the checkpoint lacks, or has in another size, are left to the comparison of the
    headers (output/against_source.py).

    Args:
        checkpoint: the finished one.
        readers: read its files.

    Attributes:
        first: by tensor, the offset in bytes of the first byte that differs.
        states: by tensor, how a quant_state differs, in words.
        compared: bytes that were compared.
    """

    def __init__(self, checkpoint: Checkpoint, readers: ShardReaders) -> None:
        self._checkpoint = checkpoint
        self._readers = readers
        self._lock = threading.Lock()
        self.first: dict[str, int] = {}
        self.states: dict[str, str] = {}
        self.compared = 0

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Compare bytes with those of the checkpoint's tensor `key` from byte `offset` on."""
        placed = self._checkpoint.tensors.get(key)
        if placed is not None and bnb_format.is_state_key(key):
            self._compare_states(key, placed, data)
            return
        if placed is None or offset + data.nbytes > placed[1].nbytes:
            return
        shard, tensor = placed
        with self._lock:
            self.compared += data.nbytes
        for start in range(0, data.nbytes, _PIECE):
            piece = data[start : start + _PIECE]
            stored = self._readers[shard].read(tensor.start + offset + start, piece.nbytes)
            if not np.array_equal(stored, piece):
                first = offset + start + int(np.argmax(stored != piece))
                with self._lock:
                    self.first[key] = min(first, self.first.get(key, first))
                return

    def _compare_states(self, key: str, placed: Placed, data: NDArray[np.uint8]) -> None:
        """Compare what two quant_state blobs say; spaces and padding may differ."""
        expected = bnb_format.decode_state(data.tobytes(), key)
        stored = b""
        try:
            stored = read_state(self._readers, placed)
            same = bnb_format.decode_state(stored, key) == expected
        except InputError:
            same = False
        with self._lock:
            self.compared += data.nbytes
            if not same:
                self.states[key] = f"{key} is {stored[:300]!r}, the source gives {expected}"

    def outcome(
        self, results: Mapping[str, Result], sources: Mapping[str, FileDigests]
    ) -> Compared:
        """Return what was found, with the conversion's results and digests."""
        return Compared(results, sources, self.first, self.states, self.compared)

    def finish(self, plan: TensorPlan, result: Result) -> None: ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None: ...

    def abort(self) -> None: ...
