"""Read the items of weights that are stored as codes with factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.encoded import PER_WORD, Factors, columns_of
from ..checkpoint.reader import ByteReader
from ..checkpoint.types import Encoding, View, Weight
from ..engines.protocol import Codes, Engine
from ..errors import InputError, NonFiniteError
from ..format.dtypes import ITEMSIZE
from .items import Item, damaged

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engines.protocol import U8

_TILE = 256  # rows that are transposed at a time


class EncodedReader:
    """A worker's way to the codes of a weight, and to their values.

    Args:
        engine: decodes.
        readers: of the source files that are open, by path.
        buffer: uint8, takes codes and their values where they fit.
    """

    def __init__(self, engine: Engine, readers: Mapping[Path, ByteReader], buffer: U8) -> None:
        self._engine, self._readers, self._buffer = engine, readers, buffer
        self._holds: tuple[Path, int, int] | None = None  # file, place, bytes of what it holds
        self._decodes: tuple[Factors, int, int, Codes] | None = (
            None  # rows of factors, first, how many
        )

    def forget(self) -> None:
        """Take note that the buffer is used for something else."""
        self._holds = self._decodes = None

    def codes(self, item: Item) -> tuple[U8, Codes]:
        """Read the codes of an item whose elements lie in the order of the weight.

        Returns:
            (uint8, the codes, in the buffer where they lie as the engine takes them; what decodes
            them).
        """
        weight, _, encoding, factors = _parts(item)
        first, last = item.within // encoding.columns, item.within + item.count
        rows = -(-last // encoding.columns) - first
        place = item.within - first * encoding.columns
        codes = factors.rows(first, rows).from_(place)
        if encoding.layout == "rows":
            start = encoding.skipped_bytes + item.within * encoding.bits // 8
            data = self._buffer[: (item.count * encoding.bits + 7) // 8]
            self._reader(weight).read_into(data, weight.stored.start + start)
            return data, codes
        flat = self._gathered(weight, encoding, factors, first, rows)
        return flat[place : place + item.count], codes

    def _gathered(
        self, weight: Weight, encoding: Encoding, factors: Factors, row: int, rows: int
    ) -> U8:
        """Return the codes of whole rows that lie as columns of words, one a byte."""
        gptq = encoding.layout != "awq"
        first, last = (row, row + rows) if gptq else (row // PER_WORD, -(-(row + rows) // PER_WORD))
        high = encoding.columns // PER_WORD if gptq else encoding.columns
        stride = encoding.rows if gptq else encoding.rows // PER_WORD
        block = np.empty((high, 4 * (last - first)), np.uint8)
        origin = weight.stored.start + 4 * first
        self._reader(weight).read_rows(block, origin, 4 * stride)
        found = factors.codes(block.view(np.int32))
        skip = 0 if gptq else row - first * PER_WORD
        return found[skip : skip + rows].reshape(-1)

    def decoded(self, item: Item, data: U8, codes: Codes) -> U8:
        """Return the values of an item's codes in the weight's dtype, uint8 [count * itemsize].

        Raises:
            InputError: one is not finite.
        """
        weight, *_ = _parts(item)
        start = -(-data.nbytes // 8) * 8  # aligned for the wider elements
        nbytes = item.count * ITEMSIZE[weight.dtype]
        out = self._buffer[start : start + nbytes]
        if out.nbytes < nbytes:
            out = np.empty(nbytes, np.uint8)
        try:
            self._engine.decode_codes(data, codes, out, weight.dtype)
        except NonFiniteError as error:
            raise self.error(item, error.index, data, codes) from error
        return out

    def transposed(self, item: Item) -> U8:
        """Return the values of an item of matrices that are stored transposed.

        Returns:
            uint8 [count * itemsize], in the weight's dtype.
        """
        weight, view, encoding, _ = _parts(item)
        rows, columns = (view.rows, view.columns) if view else (encoding.rows, encoding.columns)
        row, column = divmod(view.start if view else 0, encoding.columns)
        size, stop = rows * columns, item.within + item.count
        out = np.empty(item.count, f"u{ITEMSIZE[weight.dtype]}")
        done = item.within
        while done < stop:
            matrix, inside = divmod(done, size)
            end = min(size, stop - matrix * size)
            first, last = inside // rows, -(-end // rows)
            slab = self._slab(item, row + matrix * rows, rows, column + first, column + last)
            flat = transposed(slab).reshape(-1)[inside - first * rows :]
            out[done - item.within :][: end - inside] = flat[: end - inside]
            done += end - inside
        return out.view(np.uint8)

    def _slab(self, item: Item, row: int, rows: int, start: int, stop: int) -> NDArray[np.uint16]:
        """Return the values of the columns [start, stop) of some rows of the stored codes.

        Args:
            row: the first, counted through all matrices.

        Returns:
            unsigned integers [rows, stop - start], the bits of the weight's dtype.
        """
        weight, view, encoding, factors = _parts(item)
        first, last = factors.widened(start, stop)
        width = last - first
        block = self._columns(weight, encoding, (row, rows), (first, last))
        itemsize = ITEMSIZE[weight.dtype]
        out = np.empty(rows * width * itemsize, np.uint8)
        codes = columns_of(self._rows(factors, row, rows), first, last)
        try:
            self._engine.decode_codes(block.reshape(-1), codes, out, weight.dtype)
        except NonFiniteError as error:
            below, beside = divmod(error.index, width)
            flat = _flat(item, row + below, first + beside)
            code = _code(block.reshape(-1), error.index, codes.bits)
            raise InputError(damaged(weight, view, factors, flat, code)) from error
        values: NDArray[np.uint16] = out.view(f"u{itemsize}").reshape(rows, width)
        return values[:, start - first : stop - first]

    def _rows(self, factors: Factors, row: int, rows: int) -> Codes:
        """Return what decodes whole rows; the next item of the worker wants the same."""
        if self._decodes is None or self._decodes[:3] != (factors, row, rows):
            self._decodes = factors, row, rows, factors.rows(row, rows)
        return self._decodes[3]

    def _columns(
        self, weight: Weight, encoding: Encoding, rows: tuple[int, int], columns: tuple[int, int]
    ) -> U8:
        """Return the codes of some columns, uint8 [rows, bytes of a row].

        All of these rows are read at once where the buffer holds them: the next item of the worker
        wants other columns of the same, and many short reads take longer.

        Args:
            rows: (the first, counted through all matrices; how many).
            columns: (first, behind the last).
        """
        row, count = rows
        start, stop = (column * encoding.bits // 8 for column in columns)
        stride = encoding.columns * encoding.bits // 8
        origin = weight.stored.start + encoding.skipped_bytes + row * stride
        reader = self._reader(weight)
        if count * stride > self._buffer.nbytes:
            self.forget()
            block = np.empty((count, stop - start), np.uint8)
            reader.read_rows(block, origin + start, stride)
            return block
        whole = self._buffer[: count * stride]
        held = weight.shard.path, origin, whole.nbytes
        if self._holds != held:
            self.forget()
            reader.read_into(whole, origin)
            self._holds = held
        return np.ascontiguousarray(whole.reshape(count, stride)[:, start:stop])

    def error(self, item: Item, index: int, data: U8, codes: Codes) -> InputError:
        """Return the error for an item's element `index` that is not finite."""
        weight, view, _, factors = _parts(item)
        code = _code(data, index, codes.bits)
        return InputError(damaged(weight, view, factors, item.within + index, code))

    def _reader(self, weight: Weight) -> ByteReader:
        return self._readers[weight.shard.path]


def _parts(item: Item) -> tuple[Weight, View | None, Encoding, Factors]:
    """Return an item's weight, the stored matrix that is transposed, how it is encoded, and its
    factors."""
    weight, view, factors = item.source.weight, item.source.view, item.source.factors
    assert weight.encoding is not None
    assert factors is not None
    return weight, view, weight.encoding, factors


def transposed(matrix: NDArray[Any]) -> NDArray[Any]:
    """Return the transpose of a matrix, in tiles that stay in the cache: half the time."""
    rows, columns = matrix.shape
    out = np.empty((columns, rows), matrix.dtype)
    for row in range(0, rows, _TILE):
        out[:, row : row + _TILE] = matrix[row : row + _TILE].T
    return out


def _code(data: U8, index: int, bits: int) -> int:
    """Return a code among those that lie in `data`."""
    if bits == 8:
        return int(data[index])
    return int(data[index // 2]) >> 4 * (index % 2) & 15


def _flat(item: Item, row: int, column: int) -> int:
    """Return the index in the weight, flattened, of a stored code of transposed matrices.

    Args:
        row: counted through all matrices.
    """
    _, view, encoding, _ = _parts(item)
    if view is None:
        matrix, inside = divmod(row, encoding.rows)
        return (matrix * encoding.columns + column) * encoding.rows + inside
    top, left = divmod(view.start, encoding.columns)
    return (column - left) * view.rows + row - top
