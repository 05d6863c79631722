"""Comparing with what bitsandbytes itself wrote, whose kernels agree on 4-bit codes only.

The default (pure torch) implementation takes the nearest of the 256 codes for a scale, as nf4
does.  The native CPU kernel looks the scale up in 65,536 bins between -1 and 1, and takes a
neighbour of the nearest for about 0.2% of them; CUDA kernels divide approximately.  And the offset
is a mean whose last bits depend on the order of the sum.  So the offset is taken from the file
where it is the mean but for rounding, and a code is as good as ours where the scale is within a
bin of what that code is nearest to.  Everything else is compared byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.packed import PackedWeight
from ..checkpoint.reader import ShardReaders
from ..convert.conversion import Conversion
from ..format.codebook import ABSMAX_FLOOR, NESTED_BLOCKSIZE, nested_map

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8

_BIN = 2.0**-15  # width of one of 65,536 bins between -1 and 1
_MEAN_TOLERANCE = 1e-5  # of the offset: what orders of a float32 sum make, at most


class ForeignConversion(Conversion):
    """A conversion for comparison with a checkpoint that another program wrote.

    Args:
        weights: of that checkpoint.
        readers: its files.
        arguments: see Conversion.

    Attributes:
        codes: double-quantized scales compared.
        neighbours: those whose code is as good as ours, but another.
        offsets: weights whose offset is the mean but for rounding.
    """

    def __init__(
        self, weights: Mapping[str, PackedWeight], readers: ShardReaders, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self._weights = weights
        self._files = readers
        self.codes = self.neighbours = self.offsets = 0

    def choose_offset(self, name: str, mean: float) -> float:
        """The file's own, where it is the mean but for rounding."""
        weight = self._weights.get(name)
        if weight is None or not weight.state.nested:
            return mean
        there = weight.state.nested_offset
        if there == mean or abs(there - mean) > _MEAN_TOLERANCE * abs(mean):
            return mean
        with self._lock:
            self.offsets += 1
        return there

    def write_nested(
        self, name: str, start: int, values: F32, offset: float, codes: U8, nested: F32
    ) -> None:
        """The file's own code wherever it is as good as ours, so that the comparison accepts it."""
        weight = self._weights.get(name)
        good = 0
        if weight is not None and start + codes.size <= weight.absmax[1].nbytes:
            shard, tensor = weight.absmax
            there = self._files[shard].read(tensor.start + start, codes.size)
            differ = np.flatnonzero(there != codes)
            if differ.size:
                scales = nested[differ // NESTED_BLOCKSIZE]
                accepted = differ[
                    _is_near(values[differ] - np.float32(offset), scales, there[differ])
                ]
                codes[accepted] = there[accepted]
                good = accepted.size
        with self._lock:
            self.codes += codes.size
            self.neighbours += good
        super().write_nested(name, start, values, offset, codes, nested)

    def note(self) -> str:
        """What was accepted, in a sentence; "" for nothing."""
        if not self.neighbours and not self.offsets:
            return ""
        return (
            f"{self.neighbours:,} of {self.codes:,} double-quantized scales have the neighbour of "
            f"the nearest code, and {self.offsets:,} offsets the mean in another rounding: "
            "bitsandbytes' native kernels write them so; nf4 would write the nearest"
        )


def _is_near(values: F32, scales: F32, codes: U8) -> Any:
    """Whether each value / scale lies within a bin of what its code is nearest to."""
    table = nested_map().astype(np.float64)
    between = (table[1:] + table[:-1]) / 2
    lowest = np.concatenate([[-np.inf], between])[codes] - _BIN
    highest = np.concatenate([between, [np.inf]])[codes] + _BIN
    place = values.astype(np.float64) / np.maximum(scales.astype(np.float64), ABSMAX_FLOOR)
    return (lowest <= place) & (place <= highest)
