"""Every kernel on exactly sized buffers, compared with the CPU engine, byte for byte.

    python -m emulator.exercise LIBRARY [--quick] [--kernel PART]...

is the same as a program, for runs under a sanitizer; "gpu" in place of LIBRARY is the GPU that is
here.  Exits with 1 and says where bytes differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nf4cli.engines import launches
from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.protocol import (
    GRANULE,
    STATS,
    ChosenScales,
    Codes,
    Importance,
    NestedAbsmax,
)
from nf4cli.format import codebook
from nf4cli.format.dtypes import ITEMSIZE

from . import real
from .build import Kernels

CPU = CpuEngine()
QUICK = (1, 33, 64, 96, 1023, 2049, 8257)
SIZES = (*QUICK, 2, 31, 32, 63, 65, 95, 127, 128, 2047, 2048, 4096, 8192, 20_003)
_LAYOUTS = (  # shape, block, first element
    ((8, 96), (4, 32), 0),
    ((80, 256), (128, 128), 256),
    ((6, 1024), (1, 1024), 2048),
    ((64, 8), (8, 8), 256),
    ((24, 64), (8, 64), 256),
)
BEYOND = GRANULE + 4097  # two granules, the second partial


class DifferenceError(AssertionError):
    """Bytes differ, and where."""


def values(dtype: str, n: int, seed: int) -> np.ndarray:
    """Bytes of n elements that are hard to get right: magnitudes from the smallest subnormal to
    the largest float, runs of zeros, zeros of both signs, and every bit pattern that is finite."""
    random = np.random.default_rng(seed)
    width = {"F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}[dtype]
    mild = (
        random.standard_normal(n) * np.repeat(10.0 ** random.uniform(-44, 38, n // 97 + 1), 97)[:n]
    )
    mild = np.clip(mild, -3.4e38, 3.4e38).astype(np.float32)
    if dtype == "BF16":
        bits = (mild.view(np.uint32) >> 16).astype(np.uint16)
    elif dtype == "F16":
        bits = np.clip(mild, -65504, 65504).astype(np.float16).view(np.uint16)
    else:
        bits = mild.view(np.uint32)
    any_bits = random.integers(0, np.iinfo(width).max, n, dtype=width, endpoint=True)
    infinity = width({"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype])
    finite = (any_bits & width(np.iinfo(width).max >> 1)) < infinity
    bits = np.where(finite & (random.random(n) < 0.2), any_bits, bits)
    bits[n // 7 : n // 5] = 0
    bits[n // 5 : n // 4] = width(1 << (8 * bits.itemsize - 1))  # -0.0
    return bits.view(np.uint8)


def outliers(dtype: str, n: int, blocksize: int) -> np.ndarray:
    """Bytes of n elements; in each block one is 2 to 50 times the others' root mean square."""
    random = np.random.default_rng(n)
    x = random.standard_normal(n).astype(np.float32)
    first = np.arange(0, n, blocksize)
    place = np.minimum(first + random.integers(0, blocksize, first.size), n - 1)
    ratios = np.array(
        [50, -20, 12, -9, 11, -5, 2, -8]
    )  # 8: the tail, an outlier among a whole block
    x[place] = ratios[np.arange(first.size) % 8]
    if dtype == "BF16":
        return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return x.astype({"F32": np.float32, "F16": np.float16}[dtype]).view(np.uint8)


def ties(blocksize: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """(bytes of bf16 elements, their weights): in most blocks two scales lose the same, but for
    rounding, so that every rounding decides which is taken.

    The weights of a block's second half are changed to where another scale becomes the best one, of
    the ladder without double quantization.
    """
    random, book = np.random.default_rng(blocksize), codebook.codebook("nf4")
    bits = random.standard_normal((blocks, blocksize), np.float32).view(np.uint32) >> 16
    x = (bits << 16).view(np.float32).astype(np.float64)
    steps = codebook.ladder(double_quant=False, importance=True)
    inside = (np.abs(steps.steps) >= steps.low) & (np.abs(steps.steps) <= steps.high)
    scale = steps.steps[inside].astype(np.float64)[:, None, None]
    scale = scale * np.abs(x).max(axis=1)[:, None]
    nearest = book.values[np.searchsorted(book.midpoints, (x / scale).astype(np.float32))]
    weights = random.exponential(size=x.shape)
    losses = (x - nearest * scale) ** 2 * weights
    first, second = losses[:, :, : blocksize // 2].sum(2), losses[:, :, blocksize // 2 :].sum(2)

    def best(factor: np.ndarray) -> np.ndarray:
        return (first + factor * second).argmin(axis=0)

    below, above = np.full(blocks, 1e-2), np.full(blocks, 1e2)
    start = best(below)
    for _ in range(60):
        middle = (below + above) / 2
        same_best = best(middle) == start
        below, above = np.where(same_best, middle, below), np.where(same_best, above, middle)
    weights[:, blocksize // 2 :] *= below[:, None]
    return bits.astype(np.uint16).view(np.uint8).reshape(-1), weights.astype(np.float32).reshape(-1)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def quantize(
    kernels: Kernels | real.DeviceKernels, src: np.ndarray, dtype: str, blocksize: int,
    quant_type: str, float8: Codes | None = None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """(packed, absmax, stats) by the kernels."""
    n = src.nbytes // ITEMSIZE[dtype] if float8 is None else float8.count(src)
    at = kernels.address
    book = launches.book(quant_type).copy()
    rows = launches.entries(n, blocksize)
    packed, absmax = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // blocksize), np.float32)
    sums, worst = np.empty(2 * rows, np.float32), np.empty(rows, np.float32)
    stats = np.empty((-(-n // GRANULE), STATS))
    place = None
    if float8 is not None:
        wide = -(-float8.columns // float8.block[1])
        row, column = divmod(float8.first, float8.columns)
        place = launches.Codes(
            row, column, float8.columns, float8.block, wide, at(float8.scale), float8.kind,
            0 if float8.zero is None else at(float8.zero),
        )  # fmt: skip
    results = launches.Quantized(at(packed), at(absmax), at(sums), at(worst), at(stats))
    for launch in launches.quantize(
        n, dtype, blocksize, quant_type, at(book), at(src), results, place
    ):
        kernels.run(launch)
    kernels.finish()
    return packed, absmax, stats


def on_cpu(src, dtype, blocksize, quant_type, float8=None) -> tuple[np.ndarray, ...]:
    """The same by the CPU engine."""
    n = src.nbytes // ITEMSIZE[dtype] if float8 is None else float8.count(src)
    packed, absmax = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // blocksize), np.float32)
    stats = CPU.quantize(src, dtype, blocksize, quant_type, packed, absmax, float8)
    return packed, absmax, stats


def search(
    kernels: Kernels | real.DeviceKernels, src: np.ndarray, dtype: str, blocksize: int,
    quant_type: str, steps: codebook.Ladder, importance: Importance | None,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """(packed, index, unit, stats) by the kernels."""
    n, at = src.nbytes // ITEMSIZE[dtype], kernels.address
    blocks, rows = -(-n // blocksize), launches.entries(n, blocksize)
    packed, index = np.empty((n + 1) // 2, np.uint8), np.empty(blocks, np.uint8)
    absmax, scale = np.empty(blocks, np.float32), np.empty(blocks, np.float32)
    unit = absmax if steps.run == 1 else np.empty(-(-blocks // steps.run), np.float32)
    outlier, sums = np.empty(blocks, np.uint8), np.empty(2 * rows, np.float32)
    worst, stats = np.empty(rows, np.float32), np.empty((-(-n // GRANULE), STATS))
    widest = at(absmax)
    out = launches.Searched(
        at(packed), at(index), widest if unit is absmax else at(unit), widest, at(scale),
        at(outlier), at(sums), at(worst), at(stats),
    )  # fmt: skip
    book, ladder = launches.book(quant_type).copy(), launches.ladder(steps).copy()
    tables = launches.Tables(at(book), at(ladder), steps.run)
    weights = None
    if importance is not None:
        count = importance.columns.size
        weights = launches.Weights(at(importance.columns), count, importance.first % count)
    for launch in launches.search(n, dtype, blocksize, quant_type, tables, at(src), out, weights):
        kernels.run(launch)
    kernels.finish()
    return packed, index, unit, stats


def searched_on_cpu(src, dtype, blocksize, quant_type, steps, importance) -> tuple[np.ndarray, ...]:
    """The same by the CPU engine."""
    n = src.nbytes // ITEMSIZE[dtype]
    packed, index = np.empty((n + 1) // 2, np.uint8), np.empty(-(-n // blocksize), np.uint8)
    unit = np.empty(-(-index.size // steps.run), np.float32)
    scales = ChosenScales(index, unit)
    stats = CPU.search(src, dtype, blocksize, quant_type, steps, importance, packed, scales)
    return packed, index, unit, stats


def same(what: str, found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for part, (a, b) in enumerate(zip(found, expected, strict=True)):
        x, y = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
        if not np.array_equal(x, y):
            where = int(np.argmax(x != y)) // a.itemsize
            raise DifferenceError(
                f"{what}: output {part}, element {where} is {a.reshape(-1)[where]!r}, expected "
                f"{b.reshape(-1)[where]!r} ({np.count_nonzero(x != y)} bytes differ)"
            )


def cases(quick: bool) -> Iterator[tuple[str, object]]:
    """(a part of the name of the kernels it runs, the check)."""
    sizes = QUICK if quick else SIZES
    sources = {"F32": 0, "F16": 1, "BF16": 2}
    for dtype, number in sources.items():
        for quant_type, steps in launches.STEPS.items():
            for blocksize in (32, 64, 4096) if quick else codebook.BLOCKSIZES:
                name = f"quantize<{number}, {number}, {steps}, {str(blocksize == 32).lower()}"
                large = () if quick or blocksize not in (32, 64, 128) else (BEYOND,)
                for n in (*sizes, *large):
                    yield name, (check_quantize, dtype, blocksize, quant_type, values(dtype, n, n))
                zeros = np.zeros((blocksize + 1) * ITEMSIZE[dtype], np.uint8)
                yield name, (check_quantize, dtype, blocksize, quant_type, zeros)
                for n in (7 * blocksize + blocksize // 2 + 5, GRANULE + 40)[: 1 if quick else 2]:
                    src = outliers(dtype, n, blocksize)
                    yield name, (check_quantize, dtype, blocksize, quant_type, src)
        for blocksize in (32, 4096):
            for n in sizes:
                for nested in (False, True):
                    name = f"dequantize<{number}, {str(nested).lower()}"
                    yield name, (check_dequantize, dtype, blocksize, nested, n)
        yield from code_cases(dtype, number)
        yield from search_cases(dtype, number, quick)
    for n in (1, 255, 256, 257, 4096, 5000):
        yield "nested_quantize", (check_nested, n)


def code_cases(dtype: str, number: int) -> Iterator[tuple[str, object]]:
    """The same of codes that are decoded to a dtype."""
    for blocksize in (32, 64, 256):
        for quant_type, steps in launches.STEPS.items():
            for kind, source in launches.CODE_SOURCES.items():
                name = f"quantize<{source}, {number}, {steps}, {str(blocksize == 32).lower()}"
                for layout in _LAYOUTS:
                    yield name, (check_codes, dtype, blocksize, quant_type, kind, *layout)


def search_cases(dtype: str, number: int, quick: bool) -> Iterator[tuple[str, object]]:
    """The same of a search for scales."""
    for quant_type, steps in launches.STEPS.items():
        for blocksize in (32, 64, 256) if number == 2 and steps == 1 else ():
            name = f"search_scales<2, 1, {str(blocksize == 32).lower()}, false"
            yield name, (check_ties, blocksize, 100)
        for blocksize in (32, 64, 128, 4096) if quick else (32, 64, 256, 2048, 4096):
            small = str(blocksize == 32).lower()
            for weighted in (False, True):
                sizes = (1, 65, 2 * blocksize + 37, 8257) if blocksize < 4096 else (65, 8192)
                if not quick and blocksize in (32, 64):
                    sizes = (*sizes, BEYOND)
                for n in sizes:
                    plain = str(not weighted).lower()
                    name = f"search_scales<{number}, {steps}, {small}, {plain}"
                    for double in (True, False) if n < BEYOND else (True,):
                        asked = (check_search, dtype, blocksize, quant_type, weighted, double, n)
                        yield name, asked


def check_quantize(kernels, dtype, blocksize, quant_type, src) -> None:
    what = f"quantize {src.size} bytes of {dtype}, {quant_type}, blocksize {blocksize}"
    same_quantized(what, kernels, (src, dtype, blocksize, quant_type))


def same_quantized(what, kernels, arguments) -> None:
    """Outlier blocks may be left to the engine (-1) where the rest of a block rounds to zero."""
    found, expected = quantize(kernels, *arguments), on_cpu(*arguments)
    blocksize, quant_type = arguments[2:4]
    exact = np.isin(np.abs(codebook.codebook(quant_type).decode), (0, 1))
    codes = np.stack([found[0] >> 4, found[0] & 15], axis=1).reshape(-1)
    blocks = np.pad(exact[codes], (0, -codes.size % GRANULE), constant_values=False)
    blocks = blocks.reshape(-1, GRANULE // blocksize, blocksize).all(axis=2)
    last = codes.size % GRANULE // blocksize  # the partial block, and what is behind the end
    blocks[-1, last:] |= codes.size % GRANULE > 0
    unclear = found[2][:, 3] == -1
    if (unclear & ~blocks.any(axis=1)).any():
        raise DifferenceError(f"{what}: the count of outlier blocks is left open without need")
    found[2][unclear, 3] = expected[2][unclear, 3]
    same(what, found, expected)


def check_codes(kernels, dtype, blocksize, quant_type, kind, shape, block, first) -> None:
    random = np.random.default_rng(first)
    count = (shape[0] * shape[1] - first) // blocksize * blocksize
    scales = -(-shape[0] // block[0]) * -(-shape[1] // block[1])
    scale = random.uniform(0, 1e-2, scales).astype(np.float32)
    zeros = random.integers(-7, 8, scales).astype(np.float32)
    for zero in (None, zeros) if kind.startswith(("offset", "int")) else (None,):
        codes = Codes(first, shape[1], scale, block, kind, zero)
        src = random.integers(0, 256, count * codes.bits // 8, np.uint8)
        if kind == "e4m3":
            src[(src & 127) == 127] = 1
        if kind == "e5m2":  # what is left is finite in float16 under these scales, too
            src[(src & 0x7C) == 0x7C] = 1
        what = f"quantize {kind} {shape} by {block} to {dtype}"
        same_quantized(what, kernels, (src, dtype, blocksize, quant_type, codes))


def check_search(kernels, dtype, blocksize, quant_type, weighted, double, n) -> None:
    random = np.random.default_rng(n)
    steps, importance = codebook.ladder(double, weighted), None
    if weighted:  # a column without any input among them
        columns = random.exponential(size=77).astype(np.float32) ** 4
        columns[:5] = 0
        importance = Importance(columns, 13)
    what = f"search {n} of {dtype}, {quant_type}, blocksize {blocksize}, weighted {weighted}"
    for src in (values(dtype, n, n), outliers(dtype, n, blocksize)):
        arguments = (src, dtype, blocksize, quant_type, steps, importance)
        same(what, search(kernels, *arguments), searched_on_cpu(*arguments))


def check_ties(kernels, blocksize, blocks) -> None:
    src, weights = ties(blocksize, blocks)
    steps, importance = codebook.ladder(False, True), Importance(weights, 0)
    arguments = (src, "BF16", blocksize, "nf4", steps, importance)
    what = f"search among ties, blocksize {blocksize}"
    same(what, search(kernels, *arguments), searched_on_cpu(*arguments))


def check_nested(kernels, n) -> None:
    random, at = np.random.default_rng(n), kernels.address
    for absmax in (
        random.uniform(0, 1, n).astype(np.float32),
        (10.0 ** random.uniform(-44, 38, n)).astype(np.float32),
        np.zeros(n, np.float32),
    ):
        offset = float(np.float32(CPU.sum(absmax, 0.0) / n))
        midpoints = codebook.nested_midpoints().copy()
        found, expected = ((np.empty(n, np.uint8), np.empty(-(-n // 256), np.float32))
                           for _ in range(2))  # fmt: skip
        for launch in launches.nested_quantize(
            n, offset, at(midpoints), at(absmax), *map(at, found)
        ):
            kernels.run(launch)
        kernels.finish()
        CPU.nested_quantize(absmax, offset, *expected)
        same(f"nested_quantize of {n}", found, expected)


def check_dequantize(kernels, dtype, blocksize, nested, n) -> None:
    random, at = np.random.default_rng(n), kernels.address
    packed = random.integers(0, 256, (n + 1) // 2, np.uint8)
    blocks, out = -(-n // blocksize), np.empty(n * ITEMSIZE[dtype], np.uint8)
    book = launches.book("nf4").copy()
    if nested:
        skip, run = 3, 37  # any place in a run, of any length
        codes = random.integers(0, 256, blocks + skip, np.uint8)
        units = random.uniform(0, 30, -(-codes.size // run)).astype(np.float32)
        offset = float(np.float32(0.3337))
        absmax = NestedAbsmax(codes, skip, run, codebook.nested_map().copy(), units, offset)
        codes = absmax.codes[skip:].copy()
        scales = launches.Scales(
            0, at(codes), at(absmax.map), at(absmax.absmax), absmax.offset, run, skip
        )
    else:
        absmax = (random.uniform(-1, 1, blocks) * 10.0 ** random.integers(-44, 4, blocks)).astype(
            np.float32
        )
        scales = launches.Scales(absmax=at(absmax))
    for launch in launches.dequantize(n, dtype, blocksize, at(book), at(packed), scales, at(out)):
        kernels.run(launch)
    kernels.finish()
    expected = np.empty_like(out)
    CPU.dequantize(packed, n, blocksize, "nf4", absmax, dtype, expected)
    same(f"dequantize to {dtype}, {n} elements, nested {nested}", (out,), (expected,))


def exercise(
    kernels: Kernels | real.DeviceKernels, quick: bool = False, parts: tuple[str, ...] = ("",)
) -> int:
    """Check all that is asked for; returns how many checks there were.

    Args:
        parts: of names of kernels, those that the library has.

    Raises:
        DifferenceError: bytes differ.
        AssertionError: a kernel did something undefined.
    """
    done = 0
    for name, (check, *arguments) in cases(quick):
        if any(part in name for part in parts):
            check(kernels, *arguments)
            done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path, help='built by build.py, or "gpu"')
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kernel", action="append")
    options = parser.parse_args()
    kernels = real.bare_kernels() if str(options.library) == "gpu" else Kernels(options.library)
    try:
        done = exercise(kernels, options.quick, tuple(options.kernel or [""]))
    except AssertionError as error:
        sys.exit(f"FAILED {error}")
    print(f"{done} checks")


if __name__ == "__main__":
    main()
