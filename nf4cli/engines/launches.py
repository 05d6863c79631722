"""What the CUDA engine launches: kernels of cuda/gpu_kernels.cu by name, their grids and arguments.

Only data: the engine hands it to a device, the tests to kernels that run on the CPU.  Addresses are
device addresses, counts are elements unless they say bytes.
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

    from .protocol import U8

# The kernels' own constants; tests/engines/test_native_constants.py has a compiler compare them.
_THREADS, _WARP = 256, 32  # of a block, but for fold_errors: one warp
_OWN = 32  # quantize: elements a thread
_RUN_LANES = 16  # nested_quantize: threads a run
_TILE = 1024  # dequantize: elements a warp
_CELLS, _GRID = 32, 15.25  # the search: entries of its table, cells a unit

_E4M3 = 3  # a source's dtype, beside DTYPE_CODES
STEPS = {"nf4": 1, "fp4": 2}
"""Comparisons that find a value's rank among the midpoints of its cell, see `Book`."""

_BOOK = np.dtype(
    [
        ("start", np.uint32, _CELLS),
        ("midpoints", [("value", np.float32), ("unused", np.float32)], 18),
        ("entries", [("value", np.float32), ("code", np.uint32)], 16),
        ("decode", np.float32, 16),
    ]
)
_FLOAT8 = np.dtype(
    [(name, np.uint32) for name in
     ("row", "column", "columns", "block_rows", "block_columns", "scale_columns")]
    + [("scale", np.uint64)],
    align=True,
)  # fmt: skip
_SCALES = np.dtype(
    [(name, np.uint64) for name in ("absmax", "codes", "nested_map", "nested_absmax")]
    + [("offset", np.float32), ("nested_blocksize", np.int32), ("first", np.int32)],
    align=True,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel call.

    Attributes:
        kernel: as C++ names it.
        blocks, threads: the grid.
        arguments: one array of a single element a parameter.
    """

    kernel: str
    blocks: int
    threads: int
    arguments: tuple[NDArray[Any], ...]


@dataclass(frozen=True, slots=True)
class Float8:
    """A piece of a float8 matrix: where it starts, and its factors.

    Attributes:
        row, column: of the piece's first element; `row` counts from the first row of `scale`.
        columns, block, scale_columns: as `protocol.Float8` has them.
        scale: address of float32 factors.
    """

    row: int
    column: int
    columns: int
    block: tuple[int, int]
    scale_columns: int
    scale: int

    def argument(self) -> NDArray[Any]:
        return np.array(
            (self.row, self.column, self.columns, *self.block, self.scale_columns, self.scale),
            _FLOAT8,
        )


@dataclass(frozen=True, slots=True)
class Scales:
    """Addresses of a piece's absmax, or of its codes and what decodes them (see `Engine`).

    Attributes:
        first: the first code's place in its run.
    """

    absmax: int = 0
    codes: int = 0
    nested_map: int = 0
    nested_absmax: int = 0
    offset: float = 0.0
    nested_blocksize: int = 1
    first: int = 0

    def argument(self) -> NDArray[Any]:
        return np.array(
            (self.absmax, self.codes, self.nested_map, self.nested_absmax, self.offset,
             self.nested_blocksize, self.first),
            _SCALES,
        )  # fmt: skip


def book(quant_type: str) -> U8:
    """Bytes of `struct Book`: a 4-bit table as the kernels read it.

    `start` [32] is the rank (in bytes of an entry) that the search begins with in each of 31 cells
    of [-1, 1]; `2**STEPS - 1` midpoints may lie in a cell.
    """
    source = codebook.codebook(quant_type)
    table = np.zeros((), _BOOK)
    # As the kernel finds it: 15.25 y + 15.25, to the nearest quarter, without its fraction.
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


def entries(n: int, blocksize: int) -> int:
    """Rows of error sums that `quantize` leaves for n elements."""
    return -(-n // min(blocksize, SEGMENT))


def quantize(
    n: int,
    dtype: str,
    blocksize: int,
    quant_type: str,
    table: int,
    src: int,
    packed: int,
    absmax: int,
    sums: int,
    worst: int,
    stats: int,
    float8: Float8 | None = None,
) -> Iterator[Launch]:
    """n elements -> packed codes, absmax and error sums, the arguments of `Engine.quantize`.

    Args:
        table: address of `book(quant_type)`.
        src: elements of `dtype`, or float8 bytes that are rounded to it; whole blocks then.
        sums, worst: of 2 and 1 float32 an entry (`entries`), what the sums are folded from.
        stats: of STATS float64 a granule.
    """
    small = blocksize < SEGMENT
    lanes = 2 if small else blocksize // _OWN
    source = DTYPE_CODES[dtype] if float8 is None else _E4M3
    itemsize = 4 if dtype == "F32" else 2
    full = n // blocksize * blocksize
    place = (Float8(0, 0, 1, (1, 1), 1, 0) if float8 is None else float8).argument()

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
                _i32(lanes.bit_length() - 1), _u64(table), place, _u64(packed + first // 2),
                _u64(absmax + 4 * (first // blocksize)), _u64(sums + 8 * entry),
                _u64(worst + 4 * entry),
            ),
        )  # fmt: skip

    if full:
        yield call(0, full, False)
    if full < n:
        yield call(full, n - full, True)
    yield Launch(
        "fold_errors",
        -(-n // GRANULE),
        _WARP,
        (
            _u64(sums), _u64(worst), _u64(absmax), _i64(n), _i32(blocksize.bit_length() - 1),
            _u64(stats),
        ),
    )  # fmt: skip


def nested_quantize(
    n: int, offset: float, midpoints: int, absmax: int, codes: int, nested_absmax: int
) -> Iterator[Launch]:
    """absmax[n] -> codes and nested_absmax, the arguments of `Engine.nested_quantize`.

    Args:
        midpoints: address of `codebook.nested_midpoints()`.
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
    """packed -> n elements of `dtype`, the arguments of `Engine.dequantize`."""
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
    return str(flag).lower()


def _u64(value: int) -> NDArray[Any]:
    return np.array(value, np.uint64)


def _i64(value: int) -> NDArray[Any]:
    return np.array(value, np.int64)


def _i32(value: int) -> NDArray[Any]:
    return np.array(value, np.int32)


def _f32(value: float) -> NDArray[Any]:
    return np.array(value, np.float32)
