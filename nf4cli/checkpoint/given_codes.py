"""4-bit codes that the conversion takes as they are, instead of choosing the nearest ones.

A calibration with GPTQ leaves such codes in files; a proof takes them from the output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..engines.protocol import GRANULE, Engine
from ..format.dtypes import ITEMSIZE
from .packed import PackedWeight
from .reader import ByteReader, read_shard
from .types import Shard, TensorInfo

if TYPE_CHECKING:
    from ..engines.protocol import F32, F64, U8

PACKED = "packed:"
"""Prefix of the keys of packed codes in the files of a calibration."""


class CodeSource(Protocol):
    """Packed codes of some weights; the methods are thread-safe."""

    def read(self, name: str, start: int, count: int) -> U8 | None:
        """Return packed bytes [start, start + count) of a weight, uint8 [count].

        Returns None for a weight without given codes; its codes are the nearest ones.

        Raises:
            InputError: the file has another size than before.
        """
        ...

    def only(self, names: Collection[str]) -> CodeSource:
        """Return the codes of some weights alone: few enough to be sent to another machine."""
        ...


class _CodesInFiles:
    """The `CodeSource` whose codes are tensors of safetensors files.

    Args:
        places: shard and tensor of the codes, by weight.
    """

    def __init__(self, places: Mapping[str, tuple[Shard, TensorInfo]]) -> None:
        self._places = places

    def read(self, name: str, start: int, count: int) -> U8 | None:
        if name not in self._places:
            return None
        shard, tensor = self._places[name]
        with ByteReader(shard.path, shard.size) as reader:
            return reader.read(tensor.start + start, count)

    def only(self, names: Collection[str]) -> CodeSource:
        return _CodesInFiles({name: p for name, p in self._places.items() if name in names})


def calibrated(files: Iterable[Path]) -> CodeSource:
    """Return the codes that a calibration left in safetensors files.

    Raises:
        InputError: a file is damaged.
    """
    shards = [read_shard(path) for path in files]
    return _CodesInFiles(
        {
            tensor.name.removeprefix(PACKED): (shard, tensor)
            for shard in shards
            for tensor in shard.tensors
            if tensor.name.startswith(PACKED)
        }
    )


def written(weights: Mapping[str, PackedWeight]) -> CodeSource:
    """Return the codes of packed weights, which lie in an output."""
    return _CodesInFiles({name: weight.packed for name, weight in weights.items()})


def errors_of(
    codes: U8, values: U8, dtype: str, blocksize: int, quant_type: str, scales: F32, engine: Engine
) -> tuple[F64, float]:
    """Measure the errors of given codes.

    Args:
        codes: packed codes of n elements, uint8 [(n+1)//2].
        values: raw bytes of n elements of `dtype`, from the start of a granule.
        scales: float32 [ceil(n/blocksize)], the scale of each block.

    Returns:
        (float64 [ceil(n/GRANULE), 2], for each granule the sum of the squared errors and the
        largest error; the largest root mean square error of a block, in units of its scale).
    """
    itemsize = ITEMSIZE[dtype]
    n, rows, worst = values.nbytes // itemsize, [], 0.0
    for start in range(0, n, GRANULE):
        count = min(GRANULE, n - start)
        blocks = slice(start // blocksize, -(-(start + count) // blocksize))
        decoded, source = (np.empty(count, np.float32) for _ in range(2))
        engine.dequantize(
            codes[start // 2 : (start + count + 1) // 2], count, blocksize, quant_type,
            scales[blocks], "F32", decoded.view(np.uint8),
        )  # fmt: skip
        part = values[start * itemsize : (start + count) * itemsize]
        engine.cast(part, dtype, source.view(np.uint8), "F32")
        error = source - decoded
        squares = error * error
        rows.append((engine.sum(squares, 0.0), float(np.abs(error).max())))
        worst = max(worst, _worst_block(squares, scales[blocks], blocksize))
    return np.array(rows, np.float64), worst


def _worst_block(squares: F32, scales: F32, blocksize: int) -> float:
    """Return the largest root mean square of a block's errors, in units of its scale."""
    sums = np.add.reduceat(squares.astype(np.float64), np.arange(0, squares.size, blocksize))
    sizes = np.full(sums.size, blocksize)
    sizes[-1] = squares.size - blocksize * (sums.size - 1)
    units = np.abs(scales.astype(np.float64))
    ratio = np.sqrt(sums / sizes) / np.where(units > 0, units, np.inf)
    return float(ratio.max())
