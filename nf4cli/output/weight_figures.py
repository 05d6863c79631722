"""Count codes and scales of a whole checkpoint, and find the blocks that stand out."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..callbacks import Progress, no_progress
from ..checkpoint.packed import PackedReader, PackedWeight, find_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint
from ..engines.protocol import Engine
from ..format.codebook import codebook
from ..threads import each
from .inspection import count_codes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 20  # blocks read at a time
_PER_OCTAVE = 16  # bins of absmax, each 4.4% wide
_LOWEST, _HIGHEST = -64, 64  # octaves that have bins
OUTLIER = 4
"""How many times the median absmax of its weight a block's is above, to stand out."""
_FAR = 2 * _PER_OCTAVE  # bins that OUTLIER is


@dataclass(frozen=True, slots=True)
class Stored:
    """How a weight is stored, and its scales if it is packed.

    Attributes:
        short, words: how it is stored, in five characters and in words.
        nbytes: with all tensors of its state.
        elements: as it decodes.
        blocks: that have a scale; 0 of a weight that is not packed.
        outliers: blocks whose absmax is above OUTLIER times the median, within 5%.
        median, largest: of the absmax; the median within 5%.
        block: the first block that has the largest one.
        broken: blocks whose absmax is no finite number.
    """

    short: str
    words: str
    nbytes: int
    elements: int
    blocks: int = 0
    outliers: int = 0
    median: float = 0.0
    largest: float = 0.0
    block: int = 0
    broken: int = 0


@dataclass(slots=True)
class WeightFigures:
    """What all weights of a checkpoint hold.

    Attributes:
        weights: by name.
        codes: quant_type -> (value of a code, how often it occurs), by value.
        absmax: (from, to, number of blocks), an octave each, from the first to the last in use.
    """

    weights: dict[str, Stored] = field(default_factory=dict)
    codes: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    absmax: list[tuple[float, float, int]] = field(default_factory=list)


def weight_figures(
    checkpoint: Checkpoint, engine: Engine, workers: int = 1, progress: Progress = no_progress
) -> WeightFigures:
    """Read every packed weight of a checkpoint, some MB at a time.

    Args:
        engine: decodes the scales.
        workers: threads.
        progress: told the bytes of each packed weight that is done.
    """
    found = WeightFigures()
    codes: dict[str, NDArray[np.int64]] = {}
    octaves = np.zeros(_HIGHEST - _LOWEST, np.int64)
    lock = threading.Lock()
    with ShardReaders(checkpoint.shards) as readers:
        packed, _ = find_weights(checkpoint, readers)
        parts = {part[1].name for weight in packed.values() for part in weight.parts()}
        for name, (_, tensor) in checkpoint.tensors.items():
            if name not in parts:
                short = tensor.dtype.removeprefix("F8_")[:5]
                found.weights[name] = Stored(short, tensor.dtype, tensor.nbytes, tensor.numel)
        reader = PackedReader(readers, engine)

        def look(weight: PackedWeight, stop: threading.Event) -> None:
            counted = np.array(count_codes(reader, weight), np.int64)
            stored, bins = _scales(reader, weight)
            with lock:
                kind = weight.state.quant_type
                codes[kind] = codes.get(kind, np.zeros(16, np.int64)) + counted
                octaves[:] += bins.reshape(-1, _PER_OCTAVE).sum(axis=1)
                found.weights[weight.name] = stored
            progress(weight.name, weight.nbytes)

        each(packed.values(), look, workers)
    found.weights = dict(sorted(found.weights.items()))
    for kind, counts in sorted(codes.items()):
        values = codebook(kind).decode.tolist()
        found.codes[kind] = sorted(zip(values, map(int, counts), strict=True))
    used = np.flatnonzero(octaves)
    for i in range(used[0], used[-1] + 1) if used.size else ():
        found.absmax.append((2.0 ** (i + _LOWEST), 2.0 ** (i + 1 + _LOWEST), int(octaves[i])))
    return found


def _scales(reader: PackedReader, weight: PackedWeight) -> tuple[Stored, NDArray[np.int64]]:
    """Return what is known of a weight's scales, and how many are in each bin."""
    bins = np.zeros((_HIGHEST - _LOWEST) * _PER_OCTAVE, np.int64)
    largest, block, broken, zeros = 0.0, 0, 0, 0
    for first in range(0, weight.blocks, _PIECE):
        absmax = np.abs(reader.absmax(weight, first, min(_PIECE, weight.blocks - first)))
        finite = np.isfinite(absmax)
        broken += int(absmax.size - np.count_nonzero(finite))
        absmax = np.where(finite, absmax, 0)
        zeros += int(absmax.size - np.count_nonzero(absmax))
        place = int(absmax.argmax())
        if absmax[place] > largest:
            largest, block = float(absmax[place]), first + place
        logs = np.log2(absmax[absmax > 0].astype(np.float64))
        which = np.floor((logs - _LOWEST) * _PER_OCTAVE).astype(np.int64)
        bins += np.bincount(which.clip(0, bins.size - 1), minlength=bins.size)
    middle, median, outliers = 0, 0.0, 0
    if bins.any():
        middle = int(np.searchsorted(np.cumsum(bins), bins.sum() / 2))
        median = 2.0 ** ((middle + 0.5) / _PER_OCTAVE + _LOWEST)
        outliers = int(bins[middle + _FAR + 1 :].sum())
    return Stored(
        weight.state.short, weight.state.words, weight.nbytes, weight.numel, weight.blocks,
        outliers, median, largest, block, broken,
    ), bins  # fmt: skip
