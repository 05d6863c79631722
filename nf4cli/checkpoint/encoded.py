"""Read weights that are stored as codes with factors: what the engines need of a slice of them.

Factors and zero points are read slice by slice, so memory does not grow with a weight.  A layout
says how codes and zero points lie:

- "rows": the codes row by row, as the engines take them; zero points one a factor, as bytes, or
  packed into int32 along the rows (compressed-tensors).
- "gptq": int32 [columns / 8, rows], each of which holds 8 neighbours of a column, and zero points
  [blocks, rows / 8], stored as one less.  Scales lie transposed.
- "gptq_v2": the same, with zero points as they are.
- "awq": int32 [columns, rows / 8], each of which holds 8 neighbours of a row of that, in an order
  of its own, and zero points in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..engines.protocol import Codes
from ..errors import InputError
from ..format.codebook import code_values
from ..format.dtypes import ITEMSIZE
from .types import Encoding, TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engines.protocol import F32, U8

PER_WORD = 8
"""Codes of 4 bits in an int32."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ: the nibble of a word that holds each of its 8 neighbours."""
_RANGES = {"offset4": (-8, 7)}
"""Kind of codes -> the smallest and the largest zero point that they can have, where a byte may
hold others."""
_NARROW = 256
"""Columns of a block up to which a slice of columns is widened to whole blocks."""


class Companion(Protocol):
    """One of the tensors that a weight is made of, beside its codes."""

    def read(self, start: int, count: int) -> U8:
        """Return `count` bytes from byte `start` of the tensor, uint8 [count]."""
        ...


def floats(raw: U8, dtype: str, exponents: bool = False) -> F32:
    """Return the values of a tensor's bytes, float32 [elements].

    Args:
        dtype: safetensors name of any float dtype, or of bytes.
        exponents: whether a byte is a power of two, of which 255 is a NaN.
    """
    if exponents or dtype == "F8_E8M0":
        bits = np.where(raw == 255, 0x7FC00000, raw.astype(np.uint32) << 23).astype(np.uint32)
        return np.where(raw == 0, np.float32(2.0**-127), bits.view(np.float32))
    if dtype == "F8_E4M3":
        return code_values("e4m3")[raw]
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


class Factors:
    """The factors and zero points of an encoded weight, slice by slice; used from any thread.

    Args:
        name: of the weight, for messages.
        encoding: of the weight.
        companions: by the name of the tensor.

    Raises:
        InputError: the source states another shape than the tensors have; or a number is damaged.
    """

    def __init__(self, name: str, encoding: Encoding, companions: Mapping[str, Companion]) -> None:
        self._name = name
        self.encoding = encoding
        self._companions = companions
        rows, columns = encoding.block
        self._high = -(-encoding.rows // rows)  # factors in a column of one matrix
        self._wide = -(-encoding.columns // columns)
        self._unit = self._read_unit()
        self._order = self._read_order()
        self._check_shape()

    def rows(self, row: int, count: int) -> Codes:
        """Return what decodes the rows [row, row + count), counted through all matrices.

        `first` is the first element of `row`.
        """
        encoding = self.encoding
        if encoding.layout != "rows":
            return self._transposed_rows(row, count)
        if encoding.scale is None:
            ones = np.ones(1, np.float32)
            block = (encoding.matrices * encoding.rows, encoding.columns)
            return Codes(0, encoding.columns, ones, block, encoding.kind)
        height, _ = encoding.block
        first, place = self._factor_row(row), (row % encoding.rows) % height
        last = self._factor_row(row + count - 1)
        scale, zero = self._slice(first, last + 1)
        block = encoding.block
        if encoding.rows % height and row // encoding.rows != (row + count - 1) // encoding.rows:
            # A partial block at the end of a matrix, and more behind it: a factor for each row.
            lines = [self._factor_row(r) - first for r in range(row, row + count)]
            scale = scale.reshape(-1, self._wide)[lines].reshape(-1)
            zero = None if zero is None else zero.reshape(-1, self._wide)[lines].reshape(-1)
            block, place = (1, block[1]), 0
        return Codes(
            place * encoding.columns, encoding.columns, scale, block, encoding.kind, zero,
            encoding.through,
        )  # fmt: skip

    def widened(self, start: int, stop: int) -> tuple[int, int]:
        """Return the columns that are decoded together with [start, stop): whole bytes, and whole
        blocks where those are small."""
        unit = self.encoding.block[1] if self.encoding.block[1] <= _NARROW else 1
        unit = unit if unit % 2 == 0 or self.encoding.bits == 8 else 2 * unit
        return start // unit * unit, min(self.encoding.columns, -(-stop // unit) * unit)

    def index(self, row: int, column: int) -> tuple[int, ...]:
        """Return the index in the tensor of factors that an element has, () where all are 1.

        Args:
            row: counted through all matrices.
        """
        encoding = self.encoding
        if encoding.scale is None:
            return ()
        block = int(self._order[column]) if self._order is not None else column // encoding.block[1]
        flat = self._factor_row(row) * self._wide + block
        if encoding.layout != "rows":
            flat = block * encoding.rows + row
        return tuple(int(i) for i in np.unravel_index(flat, encoding.scale[1].shape or (1,)))

    def codes(self, words: NDArray[np.int32]) -> U8:
        """Return the codes of another layout than "rows", one a byte: uint8 [rows, columns].

        Args:
            words: int32, a slice of the stored tensor: [columns / 8, rows], or [columns, rows / 8].
        """
        if self.encoding.layout != "awq":
            return np.ascontiguousarray(_unpacked(words, 0).T)
        return np.ascontiguousarray(_unpacked(words, 1, _AWQ_ORDER).T)

    def _factor_row(self, row: int) -> int:
        matrix, inside = divmod(row, self.encoding.rows)
        return (self.encoding.skip + matrix) * self._high + inside // self.encoding.block[0]

    def _slice(self, first: int, last: int) -> tuple[F32, F32 | None]:
        """Return the (factors, zero points) of rows [first, last) of them, float32, flat."""
        assert self.encoding.scale is not None
        tensor = self.encoding.scale[1]
        scale = floats(
            self._bytes(tensor, first * self._wide, (last - first) * self._wide),
            tensor.dtype, self.encoding.exponents,
        )  # fmt: skip
        zero = None if self.encoding.zero is None else self._zero(first, last)
        return self._scaled(scale), zero

    def _scaled(self, scale: F32) -> F32:
        if self._unit is None:
            return scale
        return scale / self._unit if self.encoding.divides else scale * self._unit

    def _bytes(self, tensor: TensorInfo, start: int, count: int) -> U8:
        """Return the bytes of `count` elements of a companion from element `start` on."""
        itemsize = ITEMSIZE[tensor.dtype]
        return self._companions[tensor.name].read(start * itemsize, count * itemsize)

    def _zero(self, first: int, last: int) -> F32:
        """Return the zero points of the rows [first, last) of factors, float32, flat."""
        encoding = self.encoding
        assert encoding.zero is not None
        tensor = encoding.zero[1]
        if tensor.dtype != "I32":
            raw = self._bytes(tensor, first * self._wide, (last - first) * self._wide)
            zero = raw.view(np.int8).astype(np.float32)
            self._check_zeros(zero, first * self._wide, tensor)
            return zero
        per = 32 // encoding.bits
        start, stop = first // per, -(-last // per)
        raw = self._bytes(tensor, start * self._wide, (stop - start) * self._wide)
        words = raw.view(np.uint32).reshape(-1, self._wide)
        shifts = np.arange(0, 32, encoding.bits, dtype=np.uint32)
        codes = (words[:, None, :] >> shifts[None, :, None]) & np.uint32((1 << encoding.bits) - 1)
        values = code_values(encoding.kind)[codes.reshape(-1, self._wide)]
        return np.ascontiguousarray(values[first - start * per :][: last - first]).reshape(-1)

    def _check_zeros(self, zero: F32, start: int, tensor: TensorInfo) -> None:
        low, high = _RANGES.get(self.encoding.kind, (-128, 127))
        bad = np.flatnonzero((zero < low) | (zero > high))
        if bad.size:
            place = np.unravel_index(start + int(bad[0]), tensor.shape or (1,))
            raise InputError(
                f"{tensor.name}{[int(i) for i in place]} is {int(zero[bad[0]])}, expected a zero "
                f"point from {low} to {high} for {self.encoding.format}: the zero points of "
                f"{self._name} are damaged. Download them again"
            )

    def _transposed_rows(self, row: int, count: int) -> Codes:
        """Return `rows` of the other layouts, whose factors lie as [blocks, rows]."""
        encoding = self.encoding
        assert encoding.scale is not None
        tensor = encoding.scale[1]
        blocks, rows = tensor.shape
        raw = self._bytes(tensor, 0, tensor.numel).view(f"u{ITEMSIZE[tensor.dtype]}")
        part = np.ascontiguousarray(raw.reshape(blocks, rows)[:, row : row + count].T)
        scale = floats(part.reshape(-1).view(np.uint8), tensor.dtype).reshape(count, blocks)
        zero = None
        if encoding.zero is not None:
            places = encoding.zero[1]
            first, last = row // PER_WORD, -(-(row + count) // PER_WORD)
            words = self._bytes(places, 0, places.numel).view(np.int32).reshape(blocks, -1)
            order = _AWQ_ORDER if encoding.layout == "awq" else tuple(range(PER_WORD))
            found = _unpacked(words[:, first:last], 1, order)[:, row - first * PER_WORD :]
            zero = found[:, :count].T.astype(np.float32)
            if encoding.layout == "gptq":  # stored as one less, modulo 16
                zero = (zero + 1) % 16
        block = (1, encoding.block[1])
        if self._order is not None:
            scale, block = scale[:, self._order], (1, 1)
            zero = None if zero is None else zero[:, self._order]
        flat = None if zero is None else np.ascontiguousarray(zero, np.float32).reshape(-1)
        return Codes(
            0, encoding.columns, np.ascontiguousarray(scale).reshape(-1), block, encoding.kind,
            flat, encoding.through,
        )  # fmt: skip

    def _read_unit(self) -> F32 | None:
        if self.encoding.unit is None:
            return None
        tensor = self.encoding.unit[1]
        unit = floats(self._bytes(tensor, 0, 1), tensor.dtype)
        if not np.isfinite(unit[0]) or (self.encoding.divides and not unit[0]):
            raise InputError(
                f"{tensor.name} is {unit[0]}, expected a finite factor of {self._name}: it is "
                "damaged. Download it again"
            )
        return unit

    def _read_order(self) -> NDArray[np.int32] | None:
        if self.encoding.order is None:
            return None
        tensor = self.encoding.order[1]
        order = self._bytes(tensor, 0, tensor.numel).view(np.int32)
        bad = np.flatnonzero((order < 0) | (order >= self._wide))
        if bad.size:
            raise InputError(
                f"{tensor.name}[{int(bad[0])}] is {int(order[bad[0]])}, expected a group from 0 to "
                f"{self._wide - 1}: it is damaged. Download it again"
            )
        plain = np.arange(order.size) // self.encoding.block[1]
        return None if np.array_equal(order, plain) else order

    def _check_shape(self) -> None:
        """Raise InputError if the source states another shape than the tensors have."""
        if self.encoding.says_shape is None:
            return
        tensor = self.encoding.says_shape[1]
        raw = self._bytes(tensor, 0, tensor.numel)
        said = raw.view({"I64": np.int64, "I32": np.int32}[tensor.dtype]).tolist()
        refuse_shape(tensor.name, said, self.encoding)


def columns_of(whole: Codes, start: int, stop: int) -> Codes:
    """Return what decodes the columns [start, stop) of some rows, as a matrix of its own.

    Args:
        whole: what decodes the whole rows.
    """
    width, wide = whole.block[1], -(-whole.columns // whole.block[1])
    first, last = start // width, (stop - 1) // width

    def part(values: F32) -> F32:
        found = values.reshape(-1, wide)[:, first : last + 1]
        if first < last and start % width:
            found = found.repeat(width, axis=1)[:, start - first * width :][:, : stop - start]
        return np.ascontiguousarray(found).reshape(-1)

    columns = stop - start if first == last else 1 if start % width else width
    return Codes(
        whole.first // whole.columns * (stop - start), stop - start, part(whole.scale),
        (whole.block[0], columns), whole.kind, None if whole.zero is None else part(whole.zero),
        whole.through,
    )  # fmt: skip


def refuse_shape(name: str, said: list[int], encoding: Encoding) -> None:
    """Raise InputError if a weight_shape is not the one that the packed codes have.

    Args:
        name: of the tensor that states the shape.
        said: the shape that it states.
    """
    stack = (encoding.matrices,) if len(said) == 3 else ()
    found = [*stack, encoding.rows, encoding.columns]
    if said != found:
        raise InputError(
            f"{name} says that the weight's shape is {said}, but its packed codes are "
            f"{found} (nf4 reads rows that fill whole words): the file is damaged, or of a form "
            "that nf4 does not read. Download it again, or start from the original checkpoint"
        )


def _unpacked(
    words: NDArray[np.int32], axis: int, order: tuple[int, ...] = tuple(range(PER_WORD))
) -> U8:
    """Return the 8 codes of each word side by side along an axis, uint8.

    Args:
        words: int32 [n, m].
        axis: 0 for [8 * n, m], 1 for [n, 8 * m].
        order: the nibble that holds each of the 8.
    """
    rows, columns = words.shape
    parts = words.view(np.uint32) if words.flags.c_contiguous else words.astype(np.uint32)
    nibbles = [((parts >> np.uint32(4 * k)) & np.uint32(15)).astype(np.uint8) for k in order]
    if axis == 0:
        return np.stack(nibbles, axis=1).reshape(PER_WORD * rows, columns)
    return np.stack(nibbles, axis=2).reshape(rows, PER_WORD * columns)
