"""The CPU engine: calls cuda/cpu_engine.cpp through ctypes.

ctypes releases the GIL during every call, so several threads use several cores.  The library holds
a copy of the code for each instruction set; the fastest one that this processor can run is used.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MachineError, NonFiniteError
from ..format import codebook
from ..format.dtypes import CODE_BITS, ITEMSIZE
from .protocol import (
    CAST_CODES,
    DTYPE_CODES,
    GRANULE,
    STATS,
    ChosenScales,
    Codes,
    Importance,
    NestedAbsmax,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .protocol import F32, F64, U8

LIBRARY = Path(__file__).with_name("_nf4.so")
ISAS = ("avx512", "avx2", "neon", "generic")
"""The instruction sets that the library may hold, fastest first."""

_PANEL = 16  # columns of the right matrix that cuda/cpu_product.h takes together
FEEDBACK_ROWS = 128
"""Most rows of a matrix that make up for each other's errors: kTile of cuda/cpu_feedback.h."""
_DECODED_GRANULES = 4  # granules of codes that are decoded at a time: 1 MB of float32


class _Codebook(ctypes.Structure):
    """struct nf4_codebook of cuda/codec.h."""

    _fields_ = (
        ("midpoints", ctypes.c_float * 16),
        ("values", ctypes.c_float * 16),
        ("decode", ctypes.c_float * 16),
        ("codes", ctypes.c_uint8 * 16),
    )


@cache
def _c_codebook(quant_type: str) -> _Codebook:
    book = codebook.codebook(quant_type)
    return _Codebook(
        (ctypes.c_float * 16)(*book.midpoints.tolist()),
        (ctypes.c_float * 16)(*book.values.tolist()),
        (ctypes.c_float * 16)(*book.decode.tolist()),
        (ctypes.c_uint8 * 16)(*book.codes.tolist()),
    )


class _Ladder(ctypes.Structure):
    """struct nf4_ladder of cuda/codec.h."""

    _fields_ = (
        ("steps", ctypes.c_float * codebook.MAX_STEPS),
        ("size", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("run", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    )


def _c_ladder(ladder: codebook.Ladder) -> _Ladder:
    steps = (ctypes.c_float * codebook.MAX_STEPS)(*ladder.steps.tolist())
    return _Ladder(steps, ladder.steps.size, ladder.zero, ladder.run, ladder.low, ladder.high)


@cache
def _library() -> ctypes.CDLL:
    """Return the compiled library; raise MachineError if it is missing or cannot be loaded."""
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        raise MachineError(
            f"the compiled engine is missing or cannot be loaded ({error}). "
            "Reinstall the package; to build it from a checkout install a C++ compiler "
            "(Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; "
            "macOS: xcode-select --install) and run: pip install ."
        ) from error


def available() -> tuple[str, ...]:
    """Return the instruction sets that the library holds and this processor runs, fastest first.

    Raises:
        MachineError: the compiled library is missing.
    """
    library = _library()
    return tuple(
        isa
        for isa in ISAS
        if hasattr(library, f"nf4_can_run_{isa}") and getattr(library, f"nf4_can_run_{isa}")()
    )


def read_rows(fd: int, block: NDArray[np.uint8], offset: int, stride: int) -> int:
    """Fill the rows of `block` with bytes of a file; row i begins at offset + i * stride.

    Args:
        fd: the open file.
        block: output, uint8 [rows, width].
        offset, stride: bytes.

    Returns:
        Bytes read; fewer than `block` holds only where the file ends.

    Raises:
        OSError: the disk failed.
        MachineError: the compiled library is missing.
    """
    rows, width = block.shape
    i64 = ctypes.c_int64
    function = _library().nf4_read_rows
    function.restype, function.argtypes = i64, (ctypes.c_int, i64, i64, i64, i64, ctypes.c_void_p)
    return _read(function(fd, offset, rows, stride, width, _address(block)))


def read_columns(fd: int, columns: NDArray[Any], offset: int, stride: int) -> int:
    """Fill the columns of an array with elements of a file; column i begins at offset + i * stride.

    Args:
        fd: the open file.
        columns: output, [n, rows], elements of 1, 2, 4 or 8 bytes.
        offset, stride: bytes.

    Returns, Raises: see `read_rows`.
    """
    count, rows = columns.shape
    width, i64 = count * columns.itemsize, ctypes.c_int64
    function = _library().nf4_read_columns
    function.restype = i64
    function.argtypes = ctypes.c_int, i64, i64, i64, i64, i64, ctypes.c_void_p
    return _read(function(fd, offset, rows, stride, width, columns.itemsize, _address(columns)))


def _read(count: int) -> int:
    """Return the bytes that the library read; raise OSError if it returned an error."""
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return int(count)


def _address(array: NDArray[Any]) -> int:
    """Return the address of an array; raise ValueError if its bytes have gaps."""
    if not array.flags.c_contiguous:
        raise ValueError("the engine needs contiguous buffers")
    return int(array.ctypes.data)


class CpuEngine:
    """The `Engine` of the CPU; see there for the methods.

    Args:
        isa: the instruction set, one of `available()`; None takes the fastest.

    Raises:
        MachineError: the compiled library is missing, or this processor cannot run `isa`.
    """

    def __init__(self, isa: str | None = None) -> None:
        usable = available()
        if isa is None:
            isa = usable[0]
        elif isa not in usable:
            raise MachineError(
                f"this processor cannot run the {isa!r} engine: it can run {', '.join(usable)}"
            )
        self.name = f"cpu ({isa})"
        self.spare_threads = self.extra_memory = 0
        self.worker_memory = 2_000_000  # as measured
        self.item_bytes = 4 << 20  # 2 to 4 MB take 2.2 s of a conversion, 8 MB 2.35 s
        # C gets the addresses of these tables, so the engine keeps them alive.  A call of the
        # cached function would not do: two threads may fill its cache at once, and the table that
        # is not kept would be freed during the call.
        self._nested_midpoints = codebook.nested_midpoints()
        self._code_values = {kind: codebook.code_values(kind) for kind in CODE_BITS}
        library = _library()
        pointer, i64, c_int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        f32, f64 = ctypes.c_float, ctypes.c_double

        def function(name: str, result: Any, *arguments: Any) -> Any:
            symbol = getattr(library, f"nf4_{name}_{isa}")
            symbol.restype, symbol.argtypes = result, arguments
            return symbol

        book = ctypes.POINTER(_Codebook)
        self._quantize = function(
            "quantize", i64, pointer, c_int, i64, i64, book, pointer, pointer, pointer
        )
        self._search = function(
            "search", i64, pointer, c_int, i64, i64, book, ctypes.POINTER(_Ladder), pointer, i64,
            i64, pointer, pointer, pointer, pointer,
        )  # fmt: skip
        self._dequantize = function(
            "dequantize", None, pointer, i64, i64, book, pointer, c_int, pointer
        )
        self._sum = function("sum", f64, pointer, i64, f64)
        self._nested_quantize = function(
            "nested_quantize", None, pointer, i64, f32, pointer, pointer, pointer
        )
        self._nested_dequantize = function(
            "nested_dequantize", None, pointer, i64, i64, pointer, pointer, f32, pointer
        )
        self._cast = function("cast", i64, pointer, c_int, pointer, c_int, i64)
        self._decode_codes = function(
            "decode_codes", i64, pointer, c_int, i64, i64, i64, pointer, pointer, pointer, i64, i64,
            c_int, pointer,
        )  # fmt: skip
        self._add_product = function(
            "add_product", None, pointer, i64, i64, i64, pointer, i64, pointer, f32
        )
        self._square_sums = function("square_sums", None, pointer, i64, i64, pointer)
        self._round_columns = function(
            "round_columns", None, pointer, pointer, i64, i64, i64, pointer, pointer, book, pointer,
            pointer,
        )  # fmt: skip

    def buffer(self, nbytes: int) -> U8:
        return np.empty(nbytes, np.uint8)

    def quantize(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        packed: U8,
        absmax: F32,
        codes: Codes | None = None,
    ) -> F64:
        if codes is not None:
            return self._quantize_codes(src, dtype, blocksize, quant_type, packed, absmax, codes)
        n = src.nbytes // ITEMSIZE[dtype]
        if blocksize not in codebook.BLOCKSIZES:
            raise ValueError(f"blocksize {blocksize}")
        _expect(packed.nbytes, (n + 1) // 2, "packed bytes")
        _expect(absmax.size, -(-n // blocksize), "absmax elements")
        stats = np.empty((-(-n // GRANULE), STATS), np.float64)
        nonfinite = self._quantize(
            _address(src), DTYPE_CODES[dtype], n, blocksize, _c_codebook(quant_type),
            _address(packed), _address(absmax), _address(stats),
        )  # fmt: skip
        if nonfinite >= 0:
            raise NonFiniteError(nonfinite)
        return stats

    def _quantize_codes(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        packed: U8,
        absmax: F32,
        codes: Codes,
    ) -> F64:
        """Decode and quantize a few granules at a time, so that their values stay in the cache."""
        n, step = codes.count(src), _DECODED_GRANULES * GRANULE
        stats, values = [], np.empty(min(step, n) * ITEMSIZE[dtype], np.uint8)
        for start in range(0, n, step):
            stop = min(start + step, n)
            part = src[start * codes.bits // 8 : stop * codes.bits // 8]
            out = values[: (stop - start) * ITEMSIZE[dtype]]
            blocks = slice(start // blocksize, -(-stop // blocksize))
            try:
                self.decode_codes(part, codes.from_(start), out, dtype)
            except NonFiniteError as error:
                raise NonFiniteError(start + error.index) from None
            nibbles = slice(start // 2, (stop + 1) // 2)
            piece = out, dtype, blocksize, quant_type, packed[nibbles], absmax[blocks]
            stats.append(CpuEngine.quantize(self, *piece))  # not that of a subclass, see CudaEngine
        return np.concatenate(stats)

    def search(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        ladder: codebook.Ladder,
        importance: Importance | None,
        packed: U8,
        scales: ChosenScales,
    ) -> F64:
        n = src.nbytes // ITEMSIZE[dtype]
        if blocksize not in codebook.BLOCKSIZES:
            raise ValueError(f"blocksize {blocksize}")
        _expect(packed.nbytes, (n + 1) // 2, "packed bytes")
        _expect(scales.index.size, -(-n // blocksize), "indices")
        _expect(scales.unit.size, -(-scales.index.size // ladder.run), "units")
        columns = importance.columns if importance else None
        stats = np.empty((-(-n // GRANULE), STATS), np.float64)
        nonfinite = self._search(
            _address(src), DTYPE_CODES[dtype], n, blocksize, _c_codebook(quant_type),
            _c_ladder(ladder),
            None if columns is None else _address(columns), 0 if columns is None else columns.size,
            importance.first if importance else 0,
            _address(packed), _address(scales.index), _address(scales.unit), _address(stats),
        )  # fmt: skip
        if nonfinite >= 0:
            raise NonFiniteError(nonfinite)
        return stats

    def dequantize(
        self,
        packed: U8,
        n: int,
        blocksize: int,
        quant_type: str,
        absmax: F32 | NestedAbsmax,
        dtype: str,
        out: U8,
    ) -> None:
        if isinstance(absmax, NestedAbsmax):
            absmax = self.nested_dequantize(absmax)
        if blocksize not in codebook.BLOCKSIZES:
            raise ValueError(f"blocksize {blocksize}")
        _expect(packed.nbytes, (n + 1) // 2, "packed bytes")
        _expect(absmax.size, -(-n // blocksize), "absmax elements")
        _expect(out.nbytes, n * ITEMSIZE[dtype], "output bytes")
        self._dequantize(
            _address(packed), n, blocksize, _c_codebook(quant_type), _address(absmax),
            DTYPE_CODES[dtype], _address(out),
        )  # fmt: skip

    def sum(self, values: F32, carry: float) -> float:
        return float(self._sum(_address(values), values.size, carry))

    def nested_quantize(self, absmax: F32, offset: float, codes: U8, nested_absmax: F32) -> None:
        _expect(codes.nbytes, absmax.size, "codes")
        _expect(nested_absmax.size, -(-absmax.size // codebook.NESTED_BLOCKSIZE), "nested_absmax")
        self._nested_quantize(
            _address(absmax), absmax.size, offset, _address(self._nested_midpoints),
            _address(codes), _address(nested_absmax),
        )  # fmt: skip

    def nested_dequantize(self, nested: NestedAbsmax) -> F32:
        codes, out = nested.codes, np.empty(nested.codes.size, np.float32)
        _expect(nested.absmax.size, -(-codes.size // nested.blocksize), "nested_absmax elements")
        _expect(nested.map.size, 256, "nested_quant_map entries")
        self._nested_dequantize(
            _address(codes), codes.size, nested.blocksize, _address(nested.map),
            _address(nested.absmax), nested.offset, _address(out),
        )  # fmt: skip
        return out[nested.skip :]

    def cast(self, src: U8, from_dtype: str, dst: U8, to_dtype: str) -> None:
        n = src.nbytes // ITEMSIZE[from_dtype]
        _expect(dst.nbytes, n * ITEMSIZE[to_dtype], "output bytes")
        nonfinite = self._cast(
            _address(src), CAST_CODES[from_dtype], _address(dst), DTYPE_CODES[to_dtype], n
        )
        if nonfinite >= 0:
            raise NonFiniteError(nonfinite)

    def decode_codes(self, src: U8, codes: Codes, dst: U8, to_dtype: str) -> None:
        n, (rows, columns) = codes.count(src), codes.block
        if codes.through in (None, "F32", to_dtype):
            out, out_dtype = dst, to_dtype
        else:
            out_dtype = str(codes.through)
            out = np.empty(n * ITEMSIZE[out_dtype], np.uint8)
        lines = -(-(codes.first + n) // codes.columns)
        factors = -(-lines // rows) * -(-codes.columns // columns)
        _expect(dst.nbytes, n * ITEMSIZE[to_dtype], "output bytes")
        _expect(int(codes.scale.size < factors), 0, "short scales")
        if codes.zero is not None:
            _expect(int(codes.zero.size < factors), 0, "short zero points")
        if codes.bits == 4:
            _expect((codes.first | codes.columns) % 2, 0, "odd columns")
        nonfinite = self._decode_codes(
            _address(src), codes.bits, codes.first, n, codes.columns,
            _address(self._code_values[codes.kind]), _address(codes.scale),
            None if codes.zero is None else _address(codes.zero), rows, columns,
            DTYPE_CODES[out_dtype], _address(out),
        )  # fmt: skip
        if nonfinite >= 0:
            raise NonFiniteError(nonfinite)
        if out is not dst:
            self.cast(out, out_dtype, dst, to_dtype)

    def add_product(self, values: F32, first: int, left: F32, right: F32, scale: float) -> None:
        (rows, rank), (also_rank, columns) = left.shape, right.shape
        _expect(also_rank, rank, "rows of the right matrix")
        _expect(-(-(first + values.size) // columns), rows, "rows of the left matrix")
        wide = np.zeros((rank, -(-columns // _PANEL), _PANEL), np.float32)
        wide.reshape(rank, -1)[:, :columns] = right
        panels = np.ascontiguousarray(wide.transpose(1, 0, 2))
        self._add_product(
            _address(values), first, values.size, columns, _address(left), rank, _address(panels),
            scale,
        )  # fmt: skip

    def square_sums(self, values: F32) -> F64:
        rows, columns = values.shape
        sums = np.empty(rows, np.float64)
        self._square_sums(_address(values), rows, columns, _address(sums))
        return sums

    def round_columns(
        self, values: F32, scale: F32, factor: F32, shares: F32 | None, quant_type: str, ranks: U8,
        errors: F32, rows: range,
    ) -> None:  # fmt: skip
        """Round the columns of a matrix one after another, with error feedback.

        Each column is one row of the arrays, which hold the matrix transposed.

        Args:
            values: float32 [columns, rows]; each column takes over its part of the errors of those
                before it.
            scale: float32 [columns, rows], what each element's value is multiplied by.
            factor: float32 [columns, columns], upper triangular: column i hands on
                factor[i, j] / factor[i, i] of its error to column j.
            shares: float32, one matrix for each FEEDBACK_ROWS rows of `rows`, one after another:
                what each row hands on to those below it. None: rows are rounded by themselves.
            ranks: output, uint8 [columns, rows]: places of the values in the ascending table.
            errors: output, float32 [columns, rows]: the errors over factor[i, i].
            rows: the rows to round, a step of 1; several threads may have their own.
        """
        columns, count = values.shape
        for array in (scale, ranks, errors):
            _expect(array.size, values.size, "elements")
        _expect(factor.size, columns * columns, "elements of the factor")
        if not 0 <= rows.start <= rows.stop <= count:
            raise ValueError(f"rows {rows.start} to {rows.stop} of {count}")
        if shares is not None:
            whole, rest = divmod(len(rows), FEEDBACK_ROWS)
            _expect(shares.size, whole * FEEDBACK_ROWS**2 + rest**2, "elements of the shares")
        skip = rows.start * 4
        self._round_columns(
            _address(values) + skip, _address(scale) + skip, count, len(rows), columns,
            _address(factor), None if shares is None else _address(shares),
            _c_codebook(quant_type), _address(ranks) + rows.start, _address(errors) + skip,
        )  # fmt: skip


def _expect(size: int, expected: int, what: str) -> None:
    """Raise ValueError if a buffer has the wrong size, which would be a memory error in C."""
    if size != expected:
        raise ValueError(f"{what}: {size}, expected {expected}")
