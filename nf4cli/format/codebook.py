"""The tables of the format, typed once.

The C engine, the GPU kernels and the torch engine get these arrays passed in; none of them holds
a copy.  Every table is bit-equal to bitsandbytes 0.50.2's (`functional.get_4bit_type`,
`functional.create_dynamic_map`), which the tests check against bitsandbytes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import config

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Written down there, where a shell that completes a word need not wait for numpy.
QUANT_TYPES, BLOCKSIZES = config.QUANT_TYPES, config.BLOCKSIZES
NESTED_BLOCKSIZE = 256
"""Elements of the absmax vector that share one nested_absmax (bitsandbytes fixes it)."""
ABSMAX_FLOOR = 1e-38
"""The least that a block is divided by, as bitsandbytes' default implementation has it."""
MAX_STEPS = 256
"""Of a `Ladder`: a step's number is a byte."""

# Quantiles of N(0, 1), Dettmers et al., QLoRA, appendix E; the digits are bitsandbytes'.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Sign, two exponent bits, one mantissa bit, in code order, before division by the largest.
_FP4_TIMES_12 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# FP4 codes by ascending value; of the two zeros, code 0 takes values <= 0 and code 8 those above,
# as torch.argsort orders them in bitsandbytes' default implementation.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@dataclass(frozen=True, slots=True)
class Codebook:
    """One 4-bit table.

    Attributes:
        quant_type: "nf4" or "fp4".
        decode: float32 [16], the value of each stored code (this is the file's `quant_map`).
        values: float32 [16], the same values in ascending order.
        midpoints: float32 [15], (values[i] + values[i+1]) / 2, rounded to float32.
        codes: uint8 [16], the stored code of values[i].
    """

    quant_type: str
    decode: F32
    values: F32
    midpoints: F32
    codes: U8


@cache
def codebook(quant_type: str) -> Codebook:
    """The table of `quant_type`.

    Raises:
        KeyError: quant_type is neither "nf4" nor "fp4".
    """
    decode, order = {
        "nf4": (np.array(_NF4, np.float32), np.arange(16)),
        "fp4": (
            np.array(_FP4_TIMES_12 + tuple(-x for x in _FP4_TIMES_12), np.float32) / np.float32(12),
            np.array(_FP4_ORDER),
        ),
    }[quant_type]
    decode = decode + np.float32(0)  # -0.0 + 0.0 is 0.0: bitsandbytes' FP4 zero has no sign
    values = decode[order]
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    return Codebook(quant_type, decode, values, midpoints, order.astype(np.uint8))


def _linspace(count: int) -> F32:
    """torch.linspace(0.1, 1, count) in float32 as torch's vectorised CPU path rounds it.

    It walks up from the start in the first half and down from the end in the second, each with
    one fused multiply-add; float64 holds those products and sums exactly before the rounding.
    """
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    up = np.float64(start) + step * index
    down = np.float64(end) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


@cache
def nested_map() -> F32:
    """float32 [256], ascending: bitsandbytes' signed dynamic 8-bit map (`nested_quant_map`).

    Seven decades below 1, each with twice the steps of the one below (Dettmers, "8-bit
    approximations for parallelism in deep learning", 2015), and 0 and 1.
    """
    parts = [np.array([0, 1], np.float32)]
    for decade in range(7):
        edges = _linspace(2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        parts += [means, -means]
    return np.sort(np.concatenate(parts))


@cache
def nested_midpoints() -> F32:
    """float32 [255]: the value above which the next entry of `nested_map()` is the nearer one."""
    values = nested_map()
    return (values[:-1] + values[1:]) / np.float32(2)


@dataclass(frozen=True, eq=False, slots=True)
class Ladder:
    """The scales that a block may take: a step times the unit of its run (cuda/codec.h).

    Attributes:
        steps: float32 [size <= MAX_STEPS], ascending, of both signs, 0 among them.
        run: blocks that share a unit, the largest magnitude of their elements.
        low, high: in units of the block's own absmax, how small and how large a scale is tried.
    """

    steps: F32
    run: int
    low: float
    high: float

    @property
    def zero(self) -> int:
        """The place of the step 0."""
        return int(np.searchsorted(self.steps, 0.0))

    @property
    def table(self) -> F32:
        """float32 [MAX_STEPS]: the steps, then zeros."""
        return np.pad(self.steps, (0, MAX_STEPS - self.steps.size))


_PLAIN_LADDER = 63  # of 48ths: up to 1.3125
_WITHOUT_DATA, _WITH_IMPORTANCE = (0.9, 1.02), (0.3, 1.3)


@cache
def ladder(double_quant: bool, importance: bool) -> Ladder:
    """The ladder of `--scale search`.

    With double quantization its steps are `nested_map()` itself: offset 0, nested_absmax the
    largest magnitude of 256 blocks, so that what is compared is what will be decoded. Without it
    they are 48ths of the block's own absmax.

    The ranges are those of the least KL divergence on SmolLM2-135M (docs/quality.md): without data
    a wider one lowers the squared error and raises the divergence.
    """
    low, high = _WITH_IMPORTANCE if importance else _WITHOUT_DATA
    if double_quant:
        return Ladder(nested_map(), NESTED_BLOCKSIZE, low, high)
    steps = np.arange(-_PLAIN_LADDER, _PLAIN_LADDER + 1, dtype=np.float32) / np.float32(48)
    return Ladder(steps, 1, low, high)


@cache
def float8_e4m3() -> F32:
    """float32 [256]: the value of every byte in float8 e4m3fn, as torch casts it.

    Sign, four exponent bits (bias 7), three mantissa bits; no infinities, and NaN only where all
    seven lower bits are set (Micikevicius et al., "FP8 formats for deep learning", 2022).
    """
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    subnormal = mantissa * 2.0**-9
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    magnitude = np.where(exponent == 0, subnormal, normal).astype(np.float32)
    magnitude.view(np.uint32)[127] = 0x7FF00000  # the NaN that torch's cast gives
    return np.concatenate([magnitude, -magnitude])
