"""Bits a weight: codes, and all that is stored beside them to decode them."""

from __future__ import annotations

import math


def nf4(rows: int, columns: int, blocksize: int, nested: bool) -> int:
    """Return the bits of bitsandbytes' NF4: blocks run through the whole matrix.

    An absmax takes 32 bits, or nested 8, with 32 for each 256 of them and an offset of 32 a matrix.
    """
    blocks = math.ceil(rows * columns / blocksize)
    scales = 8 * blocks + 32 * math.ceil(blocks / 256) + 32 if nested else 32 * blocks
    return 4 * rows * columns + scales


def grouped(rows: int, columns: int, group: int) -> int:
    """Return the bits of GPTQ's and AutoRound's layout: groups of a row.

    A group has a float16 scale and a zero of 4 bits, which the layout stores even where it is the
    same for all.  g_idx, which only an order of columns needs, is not counted.
    """
    return 4 * rows * columns + 20 * rows * math.ceil(columns / group)
