"""Merge adapters into the items of a weight, in float32."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.reader import ByteReader
from ..checkpoint.types import Placed, Shard
from ..engines.protocol import Engine
from ..errors import InputError
from ..format.dtypes import ITEMSIZE
from ..planning.deltas import Delta, Matrix
from ..planning.plan import TensorPlan
from ..planning.resources import HELD_MATRICES

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..engines.protocol import F32, U8

    ReadRow = Callable[[int], F32]


def changed_adapter(path: Path) -> str:
    """Return the message about an adapter whose file is another one than when it was planned."""
    return (
        f"{path} changed since it was read first: what was made of it is of no use. Start again "
        "when nothing writes to it any more"
    )


class AdapterFiles:
    """The open files of the adapters of a run; any thread may read.

    Args:
        engine: turns stored elements into float32.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock, self._open = engine, threading.Lock(), ExitStack()
        self._readers: dict[Path, ByteReader] = {}
        self._held: OrderedDict[tuple[Path, str, bool], F32] = OrderedDict()

    def __enter__(self) -> AdapterFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self._readers.clear()
        self._held.clear()

    def whole(self, matrix: Matrix) -> F32:
        """Return a matrix, float32, read once for the items of a weight."""
        shard, tensor = matrix.placed
        key = shard.path, tensor.name, matrix.turned
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                return found
        values = self._float32(matrix.placed, tensor.start, tensor.numel).reshape(tensor.shape)
        if matrix.turned:
            values = np.ascontiguousarray(values.T)
        with self._lock:
            self._held[key] = values
            if len(self._held) > HELD_MATRICES:
                self._held.popitem(last=False)
        return values

    def rows(self, matrix: Matrix, first: int, last: int) -> F32:
        """Return rows [first, last) of a matrix, float32."""
        shard, tensor = matrix.placed
        itemsize, width = ITEMSIZE[tensor.dtype], tensor.shape[-1]
        if not matrix.turned:
            start = tensor.start + first * width * itemsize
            flat = self._float32(matrix.placed, start, (last - first) * width)
            return flat.reshape(last - first, width)
        block: Any = np.empty((last - first, tensor.shape[0]), f"u{itemsize}")
        start = tensor.start + first * itemsize
        self._reader(shard).read_columns(block, start, width * itemsize)
        return self._converted(matrix.placed, block.reshape(-1).view(np.uint8)).reshape(block.shape)

    def elements(self, placed: Placed, first: int, count: int) -> F32:
        """Return elements [first, first + count) of a tensor, float32."""
        itemsize = ITEMSIZE[placed[1].dtype]
        return self._float32(placed, placed[1].start + first * itemsize, count)

    def _float32(self, placed: Placed, start: int, count: int) -> F32:
        raw = np.empty(count * ITEMSIZE[placed[1].dtype], np.uint8)
        self._reader(placed[0]).read_into(raw, start)
        return self._converted(placed, raw)

    def _converted(self, placed: Placed, raw: U8) -> F32:
        """Return stored elements as float32.

        Raises:
            InputError: one is not finite.
        """
        shard, tensor = placed
        values = np.empty(raw.nbytes // ITEMSIZE[tensor.dtype], np.float32)
        self._engine.cast(raw, tensor.dtype, values.view(np.uint8), "F32")
        if not np.isfinite(values).all():
            raise InputError(
                f"{tensor.name} in {shard.path} holds a NaN or an infinity: its training has "
                "failed, or the file is damaged. Download it again, or take an earlier checkpoint"
            )
        return values

    def _reader(self, shard: Shard) -> ByteReader:
        with self._lock:
            reader = self._readers.get(shard.path)
            if reader is None:
                reader = self._open.enter_context(ByteReader(shard.path, shard.size))
                if reader.identity() != shard.identity:
                    raise InputError(changed_adapter(shard.path))
                self._readers[shard.path] = reader
            return reader


class Merger:
    """What merges adapters into float32 elements of a weight.

    Args:
        engine: multiplies and adds.
        files: of the adapters.
    """

    def __init__(self, engine: Engine, files: AdapterFiles) -> None:
        self._engine, self._files = engine, files

    def merge(self, plan: TensorPlan, start: int, values: F32, read_row: ReadRow) -> None:
        """Merge into the elements from `start` on, in place.

        Args:
            plan: of the weight.
            values: float32 [n].
            read_row: returns a whole row of the weight without adapters, float32 [columns]; DoRA
                needs the length of the rows that lie in `values` only in part.
        """
        self._merge(plan, plan.deltas, start, values, read_row)

    def _merge(
        self, plan: TensorPlan, deltas: tuple[Delta, ...], start: int, values: F32,
        read_row: ReadRow,
    ) -> None:  # fmt: skip
        """Merge the first of a weight's changes."""
        for number, delta in enumerate(deltas):
            self._apply(delta, start, values, plan)
            if delta.magnitude is not None:
                self._scale_rows(plan, deltas[: number + 1], start, values, read_row)

    def _apply(self, delta: Delta, start: int, values: F32, plan: TensorPlan) -> None:
        """Add an adapter's product, or put its own values in place."""
        if delta.right is not None:
            columns = columns_of(plan)
            first, last = start // columns, -(-(start + values.size) // columns)
            left = self._files.rows(delta.left, first, last)
            right = self._files.whole(delta.right)
            self._engine.add_product(values, start - first * columns, left, right, delta.scale)
            return
        if delta.left.turned:
            rows = delta.left.placed[1].shape[0]
            first, last = start // rows, -(-(start + values.size) // rows)
            flat = self._files.rows(delta.left, first, last).reshape(-1)
            own = flat[start - first * rows :][: values.size]
        else:
            own = self._files.elements(delta.left.placed, start, values.size)
        if delta.replaces:
            values[:] = own
        else:
            values += own * np.float32(delta.scale)

    def _scale_rows(
        self, plan: TensorPlan, deltas: tuple[Delta, ...], start: int, values: F32,
        read_row: ReadRow,
    ) -> None:  # fmt: skip
        """Give each row the length that the last of `deltas` says (DoRA)."""
        columns, magnitude = columns_of(plan), deltas[-1].magnitude
        assert magnitude is not None
        stop = start + values.size
        first, last = start // columns, -(-stop // columns)
        whole = -(-start // columns), stop // columns
        squares = np.empty(last - first, np.float64)
        if whole[0] < whole[1]:
            inside = values[whole[0] * columns - start : whole[1] * columns - start]
            squares[whole[0] - first : whole[1] - first] = self._engine.square_sums(
                inside.reshape(-1, columns)
            )
        for row in {first, last - 1}:
            if whole[0] <= row < whole[1]:
                continue
            one = read_row(row)
            self._merge(plan, deltas[:-1], row * columns, one, read_row)
            self._apply(deltas[-1], row * columns, one, plan)
            squares[row - first] = self._engine.square_sums(one.reshape(1, columns))[0]
        lengths = np.sqrt(squares).astype(np.float32)
        wanted = self._files.elements(magnitude, first, last - first)
        if not lengths.all():
            row = first + int(np.flatnonzero(lengths == 0)[0])
            raise InputError(
                f"row {row} of {plan.name} is all zeros with {deltas[-1].adapter}: a DoRA cannot "
                "give it a length. The adapter is of another model, or damaged"
            )
        # Of the first and the last row only a part may be here.
        counts = np.full(last - first, columns)
        counts[-1] -= last * columns - stop
        counts[0] -= start - first * columns
        values *= np.repeat(wanted / lengths, counts)


def columns_of(plan: TensorPlan) -> int:
    """Return the columns of a weight as it is merged: as it is quantized, decoded or kept."""
    if plan.packed is not None:
        return int(plan.packed.state.shape[-1])
    return (plan.state.shape if plan.state is not None else plan.weight.shape)[-1]
