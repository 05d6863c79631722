"""Round a matrix as the conversion will: its chosen scales, and the nearest codes under them."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...engines.protocol import GRANULE, ChosenScales, Engine, Importance, NestedAbsmax
from ...format.codebook import codebook, ladder
from ...format.config import QuantConfig

if TYPE_CHECKING:
    from ...engines.protocol import F32, U8


@dataclass(frozen=True, slots=True)
class Rounded:
    """A matrix rounded to the nearest values of the table.

    Attributes:
        scale: float32 [rows, columns], what each element's value is multiplied by.
        ranks: uint8 [rows, columns], places of the values in the ascending table.
    """

    scale: F32
    ranks: U8


def round_matrix(
    weight: F32, importance: F32, engine: Engine, config: QuantConfig, threads: int = 1
) -> Rounded:
    """Return the scales that a conversion will choose for a matrix, and the nearest codes.

    Args: see `search_matrix`.
    """
    packed, absmax = search_matrix(weight, importance, engine, config, threads)
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: weight.size]
    return Rounded(
        scale=np.repeat(absmax, config.blocksize)[: weight.size].reshape(weight.shape),
        ranks=rank_of_code(config.quant_type)[codes].reshape(weight.shape),
    )


def search_matrix(
    weight: F32, importance: F32, engine: Engine, config: QuantConfig, threads: int = 1
) -> tuple[U8, F32]:
    """Return the codes and the decoded scales that `--scale search` will choose for a matrix.

    Args:
        weight: float32 [rows, columns], n elements.
        importance: float32 [columns]; all zeros weigh all columns alike.
        engine: the one that will convert.
        threads: that search at a time, each a part of the matrix.

    Returns:
        Packed codes, uint8 [(n+1)//2], and absmax, float32 [ceil(n/blocksize)].

    Raises:
        NonFiniteError: a weight is a NaN or an infinity.
    """
    n, blocksize = weight.size, config.blocksize
    weighted = bool(importance.any())
    steps = ladder(config.double_quant, weighted)
    packed = np.empty((n + 1) // 2, np.uint8)
    index = np.empty(-(-n // blocksize), np.uint8)
    unit = np.empty(-(-index.size // steps.run), np.float32)
    values = weight.reshape(-1)
    unit_elements = math.lcm(GRANULE, blocksize * steps.run)
    step = -(-n // threads // unit_elements) * unit_elements

    def search(start: int) -> None:
        stop = min(start + step, n)
        blocks = slice(start // blocksize, -(-stop // blocksize))
        runs = slice(blocks.start // steps.run, -(-blocks.stop // steps.run))
        engine.search(
            values[start:stop].view(np.uint8), "F32", blocksize, config.quant_type, steps,
            Importance(importance, start) if weighted else None,
            packed[start // 2 : (stop + 1) // 2], ChosenScales(index[blocks], unit[runs]),
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(search, range(0, n, step)))
    absmax = engine.nested_dequantize(NestedAbsmax(index, 0, steps.run, steps.table, unit, 0.0))
    return packed, absmax


def search_threads(engine: Engine) -> int:
    """Return how many threads should search a matrix at a time.

    One call keeps a GPU busy, and each thread would hold memory of its own there.
    """
    import torch

    return 1 if engine.spare_threads else torch.get_num_threads()


def rank_of_code(quant_type: str) -> U8:
    """Return uint8 [16]: the place of each code's value in the ascending table."""
    return np.argsort(codebook(quant_type).codes).astype(np.uint8)


def pack(ranks: U8, quant_type: str) -> U8:
    """Return the packed codes of ranks, the first of a pair in the high nibble.

    Args:
        ranks: uint8, any shape, n elements.

    Returns:
        uint8 [(n+1)//2]; an odd end is filled up with the code of 0.0.
    """
    codes = codebook(quant_type).codes[ranks.reshape(-1)]
    if codes.size % 2:
        zero = codebook(quant_type).codes[np.searchsorted(codebook(quant_type).values, 0.0)]
        codes = np.append(codes, zero)
    return (codes[::2] << np.uint8(4)) | codes[1::2]
