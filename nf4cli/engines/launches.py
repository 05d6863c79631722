"""The kernel calls of the CUDA engine as data: names, grids and arguments.

The kernels are those of cuda/gpu_kernels.cu.  The engine hands the calls to a GPU, tests hand them
to kernels that were compiled for the CPU.  Addresses are device addresses; counts are elements
unless they say bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..format import codebook
from .protocol import DTYPE_CODES, GRANULE, SEGMENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..format.codebook import Ladder
    from .protocol import U8

# Constants of the kernels; tests/engines/test_native_constants.py has a compiler compare them.
_THREADS, _WARP = 256, 32  # threads of a CUDA block; fold_errors, widest_of_runs have one warp
_OWN = 32  # quantize, search_scales: elements of a thread
_RUN_LANES = 16  # nested_quantize: threads of a run
_TILE = 1024  # dequantize: elements of a warp
_CELLS, _GRID = 32, 15.25  # search for a code: cells of its table, cells per unit of the value

CODE_SOURCES = {"e4m3": 3, "e2m1": 5, "offset4": 6, "offset8": 7, "e5m2": 8, "int8": 9}
"""Kind of codes that the kernels decode -> its number as a source dtype, next to DTYPE_CODES."""
STEPS = {"nf4": 1, "fp4": 2}
"""Comparisons that find the rank of a value among the midpoints of its cell, see `book`."""

_BOOK = np.dtype(
    [
        ("start", np.uint32, _CELLS),
        ("midpoints", [("value", np.float32), ("unused", np.float32)], 18),
        ("entries", [("value", np.float32), ("code", np.uint32)], 16),
        ("decode", np.float32, 16),
    ]
)
_CODES = np.dtype(
    [(name, np.uint32) for name in
     ("row", "column", "columns", "block_rows", "block_columns", "scale_columns")]
    + [("scale", np.uint64), ("zero", np.uint64)],
    align=True,
)  # fmt: skip
_SCALES = np.dtype(
    [(name, np.uint64) for name in ("absmax", "codes", "nested_map", "nested_absmax")]
    + [("offset", np.float32), ("nested_blocksize", np.int32), ("first", np.int32)],
    align=True,
)  # fmt: skip

_LADDER = np.dtype(
    [
        ("magnitudes", np.float32, (2, codebook.MAX_STEPS)),
        ("count", np.int32, 2),
        ("zero", np.int32),
        ("log_run", np.int32),
        ("low", np.float32),
        ("high", np.float32),
    ]
)
_IMPORTANCE = np.dtype(
    [("of_column", np.uint64), ("columns", np.uint32), ("first", np.uint32)], align=True
)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel call.

    Attributes:
        kernel: its name in C++.
        blocks: CUDA blocks.
        threads: threads of each CUDA block.
        arguments: for each parameter an array of one element.
    """

    kernel: str
    blocks: int
    threads: int
    arguments: tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class Codes:
    """A piece of a matrix of codes: where it starts, and its scales.

    Attributes:
        row, column: place of the piece's first element; row 0 is the first one that `scale`
            covers.
        columns: columns of the matrix.
        block: (rows, columns) of the elements that share a scale.
        scale_columns: scales in a row of them.
        scale: address of the float32 scales.
        kind: of the codes.
        zero: address of the float32 zero points, 0 for none.
    """

    row: int
    column: int
    columns: int
    block: tuple[int, int]
    scale_columns: int
    scale: int
    kind: str = "e4m3"
    zero: int = 0

    def argument(self) -> NDArray[Any]:
        """Return the struct that the kernels take."""
        return np.array(
            (
                self.row,
                self.column,
                self.columns,
                *self.block,
                self.scale_columns,
                self.scale,
                self.zero,
            ),
            _CODES,
        )


@dataclass(frozen=True, slots=True)
class Scales:
    """The absmax of a piece: float32, or double-quantized (see `protocol.NestedAbsmax`).

    Attributes:
        absmax: address of the float32 absmax; not used if `codes` is given.
        codes: address of the absmax's codes, 0 without double quantization.
        nested_map: address of float32 [256], the value of each code.
        nested_absmax: address of the float32 scale of each run of codes.
        offset: added to every decoded absmax.
        nested_blocksize: codes in a run.
        first: place of the first code in its run.
    """

    absmax: int = 0
    codes: int = 0
    nested_map: int = 0
    nested_absmax: int = 0
    offset: float = 0.0
    nested_blocksize: int = 1
    first: int = 0

    def argument(self) -> NDArray[Any]:
        """Return the struct that the kernels take."""
        return np.array(
            (self.absmax, self.codes, self.nested_map, self.nested_absmax, self.offset,
             self.nested_blocksize, self.first),
            _SCALES,
        )  # fmt: skip


def book(quant_type: str) -> U8:
    """Return the bytes of `struct Book`, a 4-bit table in the layout that the kernels read.

    The interval [-1, 1] is cut into 31 cells, each with at most `2**STEPS - 1` midpoints.  `start`
    [32] holds, for each cell, the rank at which the search for a code begins, as an offset into
    `entries` in bytes.

    Returns:
        uint8 [bytes of the struct].

    Raises:
        ValueError: the cells do not suit the midpoints of this table.
    """
    source = codebook.codebook(quant_type)
    table = np.zeros((), _BOOK)
    # The kernel finds a value's cell like this: 15.25 y + 15.25, rounded to the nearest quarter,
    # and then down to an integer.
    edges = source.midpoints.astype(np.float64) * _GRID + _GRID + 1 / 8
    cells = np.floor(edges).astype(int)
    if (np.abs(edges - np.round(edges)) < 1e-3).any():
        raise ValueError(f"a midpoint of {quant_type} lies on the edge of a cell")
    if np.bincount(cells).max() >= 2 ** STEPS[quant_type]:
        raise ValueError(f"too many midpoints of {quant_type} in a cell")
    table["start"] = 8 * np.searchsorted(cells, np.arange(_CELLS))
    table["midpoints"]["value"] = np.inf
    table["midpoints"]["value"][: len(source.midpoints)] = source.midpoints
    table["entries"]["value"] = source.values
    table["entries"]["code"] = source.codes
    table["decode"] = source.decode
    return np.frombuffer(table.tobytes(), np.uint8)


def ladder(steps: Ladder) -> U8:
    """Return the bytes of `struct Ladder`: the steps of a ladder as the kernels read them.

    Returns:
        uint8 [bytes of the struct].

    Raises:
        ValueError: its runs are not of a power of two blocks.
    """
    if steps.run & (steps.run - 1):
        raise ValueError(f"a run of {steps.run} blocks")
    table = np.zeros((), _LADDER)
    above, below = steps.steps[steps.zero + 1 :], -steps.steps[: steps.zero][::-1]
    for sign, magnitudes in enumerate((above, below)):
        table["magnitudes"][sign, : magnitudes.size] = magnitudes
        table["count"][sign] = magnitudes.size
    table["zero"], table["log_run"] = steps.zero, steps.run.bit_length() - 1
    table["low"], table["high"] = steps.low, steps.high
    return np.frombuffer(table.tobytes(), np.uint8)


def entries(n: int, blocksize: int) -> int:
    """Return the number of segments of n elements, for each of which kernels write error sums."""
    return -(-n // min(blocksize, SEGMENT))


@dataclass(frozen=True, slots=True)
class Quantized:
    """Addresses of the arrays that `quantize` writes.

    Attributes:
        packed: bytes of two codes.
        absmax: a float32 for each block.
        sums: two float32 for each segment (`entries`): sums of squared errors and values.
        worst: a float32 for each segment: the largest error.
        stats: STATS float64 for each granule, folded from `sums` and `worst`.
    """

    packed: int
    absmax: int
    sums: int
    worst: int
    stats: int


def quantize(
    n: int,
    dtype: str,
    blocksize: int,
    quant_type: str,
    table: int,
    src: int,
    out: Quantized,
    codes: Codes | None = None,
) -> Iterator[Launch]:
    """Yield the calls that do the work of `Engine.quantize` for n elements.

    Args:
        table: address of `book(quant_type)`.
        src: address of elements of `dtype`, or of codes, in whole blocks, that are decoded to
            `dtype`.
        out: where the results go.
        codes: what decodes codes.
    """
    small = blocksize < SEGMENT
    source = DTYPE_CODES[dtype] if codes is None else CODE_SOURCES[codes.kind]
    itemsize = 4 if dtype == "F32" else 2
    full = n // blocksize * blocksize
    place = (Codes(0, 0, 1, (1, 1), 1, 0) if codes is None else codes).argument()

    def call(first: int, count: int, tail: bool) -> Launch:
        entry = entries(first, blocksize)
        name = ", ".join(
            map(str, (source, DTYPE_CODES[dtype], STEPS[quant_type], _cpp(small), _cpp(tail)))
        )
        return Launch(
            f"quantize<{name}>",
            1 if tail else -(-count // (_THREADS * _OWN)),
            _THREADS,
            (
                _u64(src + first * itemsize), _i64(count),
                _log_lanes(blocksize), _u64(table), place, _u64(out.packed + first // 2),
                _u64(out.absmax + 4 * (first // blocksize)), _u64(out.sums + 8 * entry),
                _u64(out.worst + 4 * entry),
            ),
        )  # fmt: skip

    if full:
        yield call(0, full, False)
    if full < n:
        yield call(full, n - full, True)
    yield _fold_errors(n, blocksize, out.sums, out.worst, out.absmax, 0, out.stats)


def _log_lanes(blocksize: int) -> NDArray[Any]:
    """Return log2 of the threads that share a block, or the two blocks of a segment."""
    return _i32(max(2, blocksize // _OWN).bit_length() - 1)


def _fold_errors(
    n: int, blocksize: int, sums: int, worst: int, scale: int, outlier: int, stats: int
) -> Launch:
    """Return the call that folds what each segment's errors are into rows of STATS."""
    return Launch(
        "fold_errors",
        -(-n // GRANULE),
        _WARP,
        (
            _u64(sums), _u64(worst), _u64(scale), _u64(outlier), _i64(n),
            _i32(blocksize.bit_length() - 1), _u64(stats),
        ),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """The importance of the columns of a matrix, and where a piece of it starts.

    Attributes:
        columns: address of a float32 for each column.
        count: columns.
        first: column of the piece's first element; `first` and the elements of the piece are
            together below 2**32.
    """

    columns: int = 0
    count: int = 1
    first: int = 0

    def argument(self) -> NDArray[Any]:
        """Return the struct that the kernels take."""
        return np.array((self.columns, self.count, self.first), _IMPORTANCE)


@dataclass(frozen=True, slots=True)
class Searched:
    """Addresses of the arrays that `search` writes.

    Attributes:
        packed: bytes of two codes.
        index: a byte for each block: the step of its scale.
        unit: a float32 for each run of blocks, or, in runs of one block, the same as `absmax`.
        absmax: a float32 for each block: its largest magnitude.
        scale: a float32 for each block: the magnitude of its scale.
        outlier: a byte for each block: whether it is an outlier block.
        sums, worst, stats: see `Quantized`.
    """

    packed: int
    index: int
    unit: int
    absmax: int
    scale: int
    outlier: int
    sums: int
    worst: int
    stats: int


@dataclass(frozen=True, slots=True)
class Tables:
    """Addresses of the tables of a search.

    Attributes:
        book: `book(quant_type)`.
        ladder: `ladder(steps)`.
        run: blocks that share a unit.
    """

    book: int
    ladder: int
    run: int


def measure(n: int, dtype: str, blocksize: int, src: int, absmax: int) -> Iterator[Launch]:
    """Yield the call that finds the largest magnitude of each block of n elements.

    Args:
        src: address of elements of `dtype`.
        absmax: address of float32 [ceil(n/blocksize)], written; NaN are passed over.
    """
    yield Launch(
        f"measure_blocks<{DTYPE_CODES[dtype]}, {_cpp(blocksize < SEGMENT)}>",
        -(-n // (_THREADS * _OWN)),
        _THREADS,
        (_u64(src), _i64(n), _log_lanes(blocksize), _u64(absmax)),
    )


def search(
    n: int,
    dtype: str,
    blocksize: int,
    quant_type: str,
    tables: Tables,
    src: int,
    out: Searched,
    weights: Weights | None,
    measured: bool = False,
) -> Iterator[Launch]:
    """Yield the calls that do the work of `Engine.search` for n elements.

    Args:
        src: address of elements of `dtype`, from the start of a run unless `measured`.
        out: where the results go.
        weights: the importance of columns, None for none.
        measured: whether `out.unit` holds a unit already, that of the run in which all n elements
            lie.
    """
    blocks = -(-n // blocksize)
    yield from measure(n, dtype, blocksize, src, out.absmax)
    if tables.run > 1 and not measured:
        yield Launch(
            "widest_of_runs",
            -(-blocks // tables.run),
            _WARP,
            (_u64(out.absmax), _i64(blocks), _i32(tables.run), _u64(out.unit)),
        )
    flags = f"{_cpp(blocksize < SEGMENT)}, {_cpp(weights is None)}"
    yield Launch(
        f"search_scales<{DTYPE_CODES[dtype]}, {STEPS[quant_type]}, {flags}>",
        -(-n // (_THREADS * _OWN)),
        _THREADS,
        (
            _u64(src), _i64(n), _log_lanes(blocksize), _u64(tables.book), _u64(tables.ladder),
            (weights or Weights()).argument(), _u64(out.absmax), _u64(out.unit),
            _u64(out.packed), _u64(out.index), _u64(out.scale), _u64(out.outlier),
            _u64(out.sums), _u64(out.worst),
        ),
    )  # fmt: skip
    yield _fold_errors(n, blocksize, out.sums, out.worst, out.scale, out.outlier, out.stats)


def nested_quantize(
    n: int, offset: float, midpoints: int, absmax: int, codes: int, nested_absmax: int
) -> Iterator[Launch]:
    """Yield the calls that do the work of `Engine.nested_quantize` for n elements of absmax.

    Args:
        midpoints: address of `codebook.nested_midpoints()`.
        absmax: address of float32 [n].
        codes: address of uint8 [n], written.
        nested_absmax: address of float32 [ceil(n/256)], written.
    """
    run = codebook.NESTED_BLOCKSIZE
    full = n // run * run
    for first, count, tail in ((0, full, False), (full, n - full, True)):
        if count:
            yield Launch(
                f"nested_quantize<{_cpp(tail)}>",
                -(-count // (run * (_THREADS // _RUN_LANES))),
                _THREADS,
                (
                    _u64(absmax + 4 * first), _i64(count), _f32(offset), _u64(midpoints),
                    _u64(codes + first), _u64(nested_absmax + 4 * (first // run)),
                ),
            )  # fmt: skip


def dequantize(
    n: int, dtype: str, blocksize: int, table: int, packed: int, scales: Scales, out: int
) -> Iterator[Launch]:
    """Yield the call that does the work of `Engine.dequantize` for n elements of `dtype`.

    Args:
        table: address of the `book` of the weight's quant_type.
        packed: address of uint8 [(n+1)//2].
        out: address of n elements of `dtype`, written.
    """
    nested = scales.codes != 0
    yield Launch(
        f"dequantize<{DTYPE_CODES[dtype]}, {_cpp(nested)}>",
        -(-n // (_THREADS // _WARP * _TILE)),
        _THREADS,
        (
            _u64(packed), _i64(n), _i32(blocksize.bit_length() - 1), _u64(table),
            scales.argument(), _u64(out),
        ),
    )  # fmt: skip


def _cpp(flag: bool) -> str:
    """Return the flag as C++ writes it."""
    return str(flag).lower()


def _u64(value: int) -> NDArray[Any]:
    return np.array(value, np.uint64)


def _i64(value: int) -> NDArray[Any]:
    return np.array(value, np.int64)


def _i32(value: int) -> NDArray[Any]:
    return np.array(value, np.int32)


def _f32(value: float) -> NDArray[Any]:
    return np.array(value, np.float32)
