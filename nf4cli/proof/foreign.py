"""Compare a source with a checkpoint that bitsandbytes itself wrote.

bitsandbytes' kernels agree with each other on 4-bit codes, but not on double-quantized scales.  The
default (pure torch) implementation takes the nearest of the 256 codes for a scale, as nf4 does.
The native CPU kernel looks the scale up in 65,536 bins between -1 and 1, and takes a neighbour of
the nearest code for about 0.2% of them; CUDA kernels divide approximately.  The offset is a mean,
whose last bits depend on the order of the sum.

So the file's own offset is used where it differs from the mean by rounding alone.  A code is
accepted where the scale lies within a bin of the code's own range.  Everything else is compared
byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.packed import PackedWeight
from ..checkpoint.reader import ShardReaders
from ..convert.conversion import Conversion, Tools
from ..convert.worker import Sink
from ..format.codebook import ABSMAX_FLOOR, NESTED_BLOCKSIZE, nested_map
from ..planning.plan import Plan

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8

_BIN = 2.0**-15  # width of one of 65,536 bins between -1 and 1
_MEAN_TOLERANCE = 1e-5  # relative: the most that the order of a float32 sum changes of a mean


class ForeignConversion(Conversion):
    """A conversion for comparison with a checkpoint that another program wrote.

    Args:
        weights: packed weights of that checkpoint, by name.
        readers: read its files.
        plan, tools, sink, digest: see `Conversion`.

    Attributes:
        codes: number of double-quantized scales that were compared.
        neighbours: number of those whose code was accepted although it is not ours.
        offsets: number of weights whose offset differs from the mean by rounding.
    """

    def __init__(
        self, weights: Mapping[str, PackedWeight], readers: ShardReaders, plan: Plan, tools: Tools,
        sink: Sink, digest: str | None,
    ) -> None:  # fmt: skip
        super().__init__(plan, tools, sink, digest)
        self._weights = weights
        self._files = readers
        self.codes = self.neighbours = self.offsets = 0

    def choose_offset(self, name: str, mean: float) -> float:
        """Return the file's own offset where it differs from the mean by rounding alone."""
        weight = self._weights.get(name)
        if weight is None or not weight.state.nested:
            return mean
        offset = weight.state.nested_offset
        if offset == mean or abs(offset - mean) > _MEAN_TOLERANCE * abs(mean):
            return mean
        with self._lock:
            self.offsets += 1
        return offset

    def write_nested(
        self, name: str, start: int, values: F32, offset: float, codes: U8, nested: F32
    ) -> None:
        """Put the file's own code in place of ours wherever it is accepted, then compare."""
        weight = self._weights.get(name)
        neighbours = 0
        if weight is not None and start + codes.size <= weight.absmax[1].nbytes:
            shard, tensor = weight.absmax
            theirs = self._files[shard].read(tensor.start + start, codes.size)
            differ = np.flatnonzero(theirs != codes)
            if differ.size:
                scales = nested[differ // NESTED_BLOCKSIZE]
                accepted = differ[
                    _is_near(values[differ] - np.float32(offset), scales, theirs[differ])
                ]
                codes[accepted] = theirs[accepted]
                neighbours = accepted.size
        with self._lock:
            self.codes += codes.size
            self.neighbours += neighbours
        super().write_nested(name, start, values, offset, codes, nested)

    def note(self) -> str:
        """Return what was accepted, in a sentence; "" for nothing."""
        if not self.neighbours and not self.offsets:
            return ""
        return (
            f"{self.neighbours:,} of {self.codes:,} double-quantized scales have the neighbour of "
            f"the nearest code, and {self.offsets:,} offsets the mean in another rounding: "
            "bitsandbytes' native kernels write them so; nf4 would write the nearest"
        )


def _is_near(values: F32, scales: F32, codes: U8) -> Any:
    """Return, for each value, whether value / scale lies within a bin of its code's own range.

    Args:
        values, scales: float32 [n].
        codes: uint8 [n].

    Returns:
        bool [n].
    """
    table = nested_map().astype(np.float64)
    between = (table[1:] + table[:-1]) / 2
    lowest = np.concatenate([[-np.inf], between])[codes] - _BIN
    highest = np.concatenate([between, [np.inf]])[codes] + _BIN
    ratio = values.astype(np.float64) / np.maximum(scales.astype(np.float64), ABSMAX_FLOOR)
    return (lowest <= ratio) & (ratio <= highest)
