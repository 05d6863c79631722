"""The tables of the format: 4-bit codes, the 8-bit map of scales, the codes of quantized sources.

Each table is typed here and nowhere else: the C++ engine, the GPU kernels and the torch engine get
these arrays passed in.  The 4-bit tables and the 8-bit map are bit-equal to those of bitsandbytes
0.50.2 (`functional.get_4bit_type`, `functional.create_dynamic_map`); tests compare them with
bitsandbytes itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import config

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Defined in config.py, which shell completion can import without numpy.
QUANT_TYPES, BLOCKSIZES = config.QUANT_TYPES, config.BLOCKSIZES
NESTED_BLOCKSIZE = 256
"""Elements of the absmax vector that share one nested_absmax; bitsandbytes always uses 256."""
ABSMAX_FLOOR = 1e-38
"""A block is divided by its absmax, but by no less than this; the same as in bitsandbytes' default
implementation."""
MAX_STEPS = 256
"""Steps that a `Ladder` may have, so that the number of a step fits into a byte."""

# Quantiles of N(0, 1) (Dettmers et al., QLoRA, appendix E), with the digits of bitsandbytes.
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
# FP4: a sign, two exponent bits, one mantissa bit.  The values of codes 0 to 7, before they are
# divided by the largest, 12; codes 8 to 15 are the same values with a minus sign.
_FP4_TIMES_12 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# FP4 codes by ascending value.  Codes 0 and 8 both decode to zero: of the values near zero, those
# <= 0 get code 0 and those above get code 8, since bitsandbytes' default implementation sorts the
# codes with torch.argsort.
_FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@dataclass(frozen=True, slots=True)
class Codebook:
    """One 4-bit table: the values of the codes, and the midpoints between neighbouring values.

    Attributes:
        quant_type: "nf4" or "fp4".
        decode: float32 [16], the value of each stored code; files store it as `quant_map`.
        values: float32 [16], the same values in ascending order.
        midpoints: float32 [15], (values[i] + values[i+1]) / 2, rounded to float32.
        codes: uint8 [16], codes[i] is the stored code of values[i].
    """

    quant_type: str
    decode: F32
    values: F32
    midpoints: F32
    codes: U8


@cache
def codebook(quant_type: str) -> Codebook:
    """Return the 4-bit table of `quant_type`.

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
    """Return torch.linspace(0.1, 1, count) as torch's vectorised CPU code rounds it.

    torch counts up from the start in the first half and down from the end in the second half, with
    one fused multiply-add an element.  float64 holds these products and sums exactly, so there is
    one rounding here as well.

    Returns:
        float32 [count].
    """
    start, end = np.float32(0.1), np.float32(1)
    step = np.float64((end - start) / np.float32(count - 1))
    index = np.arange(count)
    up = np.float64(start) + step * index
    down = np.float64(end) - step * (count - 1 - index)
    return np.where(index < count // 2, up, down).astype(np.float32)


@cache
def nested_map() -> F32:
    """Return bitsandbytes' signed dynamic 8-bit map, the `nested_quant_map` of its files.

    It has seven decades below 1, each with twice the steps of the next smaller one (Dettmers,
    "8-bit approximations for parallelism in deep learning", 2015), and the values 0 and 1.

    Returns:
        float32 [256], ascending.
    """
    parts = [np.array([0, 1], np.float32)]
    for decade in range(7):
        edges = _linspace(2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (decade - 6))
        parts += [means, -means]
    return np.sort(np.concatenate(parts))


@cache
def nested_midpoints() -> F32:
    """Return the midpoints of `nested_map()`: above midpoint i, entry i + 1 is the nearest one.

    Returns:
        float32 [255], ascending.
    """
    values = nested_map()
    return (values[:-1] + values[1:]) / np.float32(2)


@dataclass(frozen=True, eq=False, slots=True)
class Ladder:
    """The scales that a search may choose for a block: one of `steps` times the unit of its run.

    A run is a number of consecutive blocks; its unit is the largest magnitude of their elements.
    cuda/cpu_scales.h defines the search.

    Attributes:
        steps: float32 [at most MAX_STEPS], ascending; negative, zero and positive values.
        run: blocks in a run.
        low, high: the smallest and the largest magnitude of a scale that is tried, in units of the
            block's own absmax.
    """

    steps: F32
    run: int
    low: float
    high: float

    @property
    def zero(self) -> int:
        """Index of the step 0 in `steps`."""
        return int(np.searchsorted(self.steps, 0.0))

    @property
    def table(self) -> F32:
        """The steps, padded with zeros: float32 [MAX_STEPS]."""
        return np.pad(self.steps, (0, MAX_STEPS - self.steps.size))


_PLAIN_LADDER = 63  # largest step without double quantization, in 48ths: 1.3125
_WITHOUT_DATA, _WITH_IMPORTANCE = (0.9, 1.02), (0.3, 1.3)


@cache
def ladder(double_quant: bool, importance: bool) -> Ladder:
    """Return the ladder of `--scale search`.

    With double quantization the steps are `nested_map()`.  The offset is then 0 and nested_absmax
    is the largest magnitude of 256 blocks, so the search compares the scales that will be decoded.
    Without double quantization the steps are 48ths of the block's own absmax.

    The ranges gave the least KL divergence on SmolLM2-135M (docs/quality.md).  Without importance,
    a wider range lowers the squared error but raises the divergence.

    Args:
        double_quant: whether the scales are quantized to 8 bits.
        importance: whether an importance file weights the loss.
    """
    low, high = _WITH_IMPORTANCE if importance else _WITHOUT_DATA
    if double_quant:
        return Ladder(nested_map(), NESTED_BLOCKSIZE, low, high)
    steps = np.arange(-_PLAIN_LADDER, _PLAIN_LADDER + 1, dtype=np.float32) / np.float32(48)
    return Ladder(steps, 1, low, high)


@cache
def float8_e4m3() -> F32:
    """Return the value of every byte in float8 e4m3fn, equal to torch's cast.

    The format has a sign, four exponent bits (bias 7) and three mantissa bits.  It has no
    infinities, and a byte is NaN where its seven lower bits are all set (Micikevicius et al., "FP8
    formats for deep learning", 2022).

    Returns:
        float32 [256].
    """
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    subnormal = mantissa * 2.0**-9
    normal = (8 + mantissa) * 2.0 ** (exponent - 10.0)
    magnitude = np.where(exponent == 0, subnormal, normal).astype(np.float32)
    magnitude.view(np.uint32)[127] = 0x7FF00000  # torch's cast gives a NaN of these bits
    return np.concatenate([magnitude, -magnitude])


@cache
def float8_e5m2() -> F32:
    """Return the value of every byte in float8 e5m2, equal to torch's cast.

    A byte is the upper half of a float16: five exponent bits (bias 15) and two mantissa bits.

    Returns:
        float32 [256].
    """
    halves = (np.arange(256, dtype=np.uint16) << 8).view(np.float16)
    values = halves.astype(np.float32)
    values.view(np.uint32)[[0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF]] |= 0x400000  # quiet, as torch has
    return values


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of a 4-bit float with two exponent bits and one mantissa bit (MXFP4, NVFP4)."""


@cache
def code_values(kind: str) -> F32:
    """Return the values of the codes that a source may store its weights in.

    Args:
        kind: one of `dtypes.CODE_BITS`: "e4m3", "e5m2" (float8), "e2m1" (4-bit floats), "int8"
            (two's complement), "offset8", "offset4" (integers with an offset of 128, or 8),
            "uint8" (integers as they are).

    Returns:
        float32 [256], or [16] for codes of 4 bits.
    """
    if kind == "e4m3":
        return float8_e4m3()
    if kind == "e5m2":
        return float8_e5m2()
    if kind == "e2m1":
        return np.array((*_E2M1, *(-m for m in _E2M1)), np.float32)
    if kind == "int8":
        return np.arange(256).astype(np.uint8).view(np.int8).astype(np.float32)
    first, size = {"offset8": (-128, 256), "offset4": (-8, 16), "uint8": (0, 256)}[kind]
    return np.arange(first, first + size).astype(np.float32)
