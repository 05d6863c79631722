"""Take one chunk of a weight at a time: read it, quantize, decode or copy it, and write it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..checkpoint import bnb_format
from ..checkpoint.given_codes import errors_of
from ..checkpoint.packed import PackedReader, PackedWeight
from ..checkpoint.reader import ByteReader
from ..checkpoint.types import FileDigests, Shard, View, Weight
from ..engines.protocol import ChosenScales, Codes, Engine, Importance, NestedAbsmax
from ..errors import InputError, NonFiniteError
from ..format.codebook import Ladder
from ..format.dtypes import FLOAT64, ITEMSIZE
from ..output.manifest import Result
from ..planning.plan import TensorPlan
from .encoded_items import EncodedReader, transposed
from .items import Item, Reading, columns_buffer, element, is_slab, quantized_dtype, require_finite
from .merged_items import Merger, columns_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..engines.protocol import F32, F64, U8


class Sink(Protocol):
    """Takes output bytes, from any thread, in any order."""

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """Take `data` (uint8 [n]), which belongs at byte `offset` of the output tensor `key`."""
        ...

    def finish(self, plan: TensorPlan, result: Result) -> None:
        """Take note that a weight and its companions are written to their last byte."""
        ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None:
        """Take note that a source file is read and digested to its last byte."""
        ...

    def abort(self) -> None:
        """Release every thread that waits in `write`: the run has failed."""
        ...


class Run(Protocol):
    """What a worker reports to, from any thread."""

    def digest_source(self, shard: Shard, start: int, data: U8) -> None:
        """Digest bytes that lie at byte `start` of a source file, after all bytes before them."""
        ...

    def not_finite(self, item: Item, error: NonFiniteError, data: U8) -> None:
        """Deal with a NaN or an infinity in a weight to quantize; `data` are the item's bytes."""
        ...

    def item_done(self, item: Item) -> None:
        """Take note that every byte of an item is written."""
        ...


class Worker:
    """One thread's buffers, and what it does with each item.

    Args:
        run: told what is done.
        engine: quantizes, decodes and casts.
        sink: takes the output bytes.
        readers: of the source files that are open, by path; the run opens and closes them.
        chunk: bytes of each of its two buffers.
        unit: elements that are encoded together.
        packed: reads the weights to decode; None where there are none.
        merger: merges adapters; None where there are none.
    """

    def __init__(
        self, run: Run, engine: Engine, sink: Sink, readers: Mapping[Path, ByteReader], chunk: int,
        unit: int, packed: PackedReader | None = None, merger: Merger | None = None,
    ) -> None:  # fmt: skip
        self._merger = merger
        self._packed = packed
        self._run, self._engine, self._sink, self._readers = run, engine, sink, readers
        both = engine.buffer(2 * chunk)
        self._output, self._source = both[:chunk], both[chunk:]
        self._columns = both[-columns_buffer(chunk) :]
        self._encoded = EncodedReader(engine, readers, self._source)
        # Of 4 bytes at the most, as they are written: what the columns leave of the buffers.
        self._part = max(unit, (both.nbytes - self._columns.nbytes) // 4 // unit * unit)

    def __call__(self, item: Item | Reading) -> None:
        """Carry out one item.

        Raises:
            InputError: a value is not finite, or too large for the dtype it is cast to.
            OSError: a disk is full or fails.
        """
        if isinstance(item, Reading) or not is_slab(item.source.weight, item.source.view):
            self._encoded.forget()  # the buffer is used for something else
        if isinstance(item, Reading):
            data = self._source[: item.stop - item.start]
            self._readers[item.shard.path].read_into(data, item.start)
            self._run.digest_source(item.shard, item.start, data)
            return
        plan = item.job.plan
        if plan.packed is not None:
            self._unpack(item, plan.packed)
            self._run.item_done(item)
            return
        source = item.source
        if source.weight.encoding is not None:
            self._convert(item, *self._read_encoded(item))
        elif source.view is not None:
            for part, data in self._transposed(item, source.view):
                self._convert(part, data)
        else:
            self._convert(item, self._read(item))
        self._run.item_done(item)

    def _convert(self, item: Item, data: U8, codes: Codes | None = None) -> None:
        """Make of an item's bytes what its plan says, and write it.

        Args:
            codes: what decodes `data`; None where it holds values.
        """
        plan = item.job.plan
        if plan.deltas:
            data = self._merged(item, data)
        elif plan.action == "quantize" and plan.weight.stored.dtype == FLOAT64:
            data = self._rounded(item, data)
        if plan.action == "quantize" and item.job.ladder is not None:
            self._search(item, data, item.job.ladder)
        elif plan.action == "quantize":
            self._quantize(item, data, codes)
        else:
            self._keep(item, data)

    def _read(self, item: Item) -> U8:
        """Read an item's elements into the start of the source buffer.

        Returns:
            uint8 [count * itemsize], as they are stored.
        """
        weight = item.source.weight
        itemsize = ITEMSIZE[weight.stored.dtype]
        data = self._source[: item.count * itemsize]
        position = weight.stored.start + item.within * itemsize
        self._readers[weight.shard.path].read_into(data, position)
        if item.digest:
            self._run.digest_source(weight.shard, position, data)
        return data

    def _read_encoded(self, item: Item) -> tuple[U8, Codes | None]:
        """Read an item of a weight that is stored as codes.

        Returns:
            (the codes, and what decodes them) where the engine decodes them as it quantizes;
            (their values in the weight's dtype, None) otherwise.
        """
        source = item.source
        weight = source.weight
        if is_slab(weight, source.view):
            return self._encoded.transposed(item), None
        data, codes = self._encoded.codes(item)
        if item.digest:
            start = item.within * weight.bits // 8
            self._run.digest_source(weight.shard, weight.stored.start + start, data)
        plan = item.job.plan
        if plan.action == "quantize" and item.job.ladder is None and not plan.deltas:
            return data, codes
        return self._encoded.decoded(item, data, codes), None

    def _rounded(self, item: Item, data: U8) -> U8:
        """Return an item's float64 elements, rounded once to the weight's dtype.

        Args:
            data: uint8 [8 * count].

        Returns:
            uint8 [count * itemsize], in the rest of the source buffer where it is large enough.
        """
        plan = item.job.plan
        dtype = plan.weight.dtype
        rest = self._source[data.nbytes :]
        nbytes = item.count * ITEMSIZE[dtype]
        fits = item.source.view is None and nbytes <= rest.nbytes
        out = rest[:nbytes] if fits else np.empty(nbytes, np.uint8)
        self._round(item, data, FLOAT64, out, dtype)
        return out

    def _merged(self, item: Item, data: U8) -> U8:
        """Return an item's elements with what adapters do to them, float32.

        Args:
            data: uint8, as they are stored, or their values where they are stored as codes.

        Returns:
            uint8 [4 * count].

        Raises:
            InputError: a finite element is not finite any more.
        """
        weight, plan = item.source.weight, item.job.plan
        values = self._float32(weight, data)
        finite = np.isfinite(values).all()
        assert self._merger is not None
        self._merger.merge(plan, item.start, values, lambda row: self._row(item, row))
        if finite:
            require_finite(plan, item.start, values)
        return values.view(np.uint8)

    def _float32(self, weight: Weight, data: U8) -> F32:
        """Return elements of a weight as float32: as stored, or as codes decode."""
        dtype = weight.dtype if weight.encoding else weight.stored.dtype
        values = np.empty(data.nbytes // ITEMSIZE[dtype], np.float32)
        self._engine.cast(data, dtype, values.view(np.uint8), "F32")
        return values

    def _row(self, item: Item, row: int) -> F32:
        """Return a whole row of an item's weight, as it is quantized or kept, float32."""
        weight, view = item.source.weight, item.source.view
        columns = columns_of(item.job.plan)
        reader = self._readers[weight.shard.path]
        if weight.encoding is not None:
            own = EncodedReader(self._engine, self._readers, np.empty(0, np.uint8))
            part = Item(item.source, row * columns, columns, False)
            if is_slab(weight, view):
                return self._float32(weight, own.transposed(part))
            own = EncodedReader(self._engine, self._readers, np.empty(16 * columns, np.uint8))
            return self._float32(weight, own.decoded(part, *own.codes(part)))
        itemsize = ITEMSIZE[weight.stored.dtype]
        if view is None:
            raw = np.empty(columns * itemsize, np.uint8)
            reader.read_into(raw, weight.stored.start + row * columns * itemsize)
            return self._float32(weight, raw)
        block = np.empty((1, columns), f"u{itemsize}")
        start = weight.stored.start + (view.start + row) * itemsize
        reader.read_columns(block, start, view.stride * itemsize)
        return self._float32(weight, block.reshape(-1).view(np.uint8))

    def _transposed(self, item: Item, view: View) -> Iterator[tuple[Item, U8]]:
        """Read an item's elements of the transpose of a stored matrix.

        All are read at once, since long pieces of rows take less time than short ones, and yielded
        in parts, so that there is room for what is made of them.

        Yields:
            (a part of the item, its elements as uint8 [count * itemsize]).
        """
        weight, rows = item.source.weight, view.rows
        itemsize = ITEMSIZE[weight.stored.dtype]
        first, last = item.within // rows, -(-(item.within + item.count) // rows)
        nbytes = rows * (last - first) * itemsize
        # Where a unit is larger than the buffers, so are its columns.
        fits = nbytes <= self._columns.nbytes
        buffer = self._columns[:nbytes] if fits else np.empty(nbytes, np.uint8)
        columns = buffer.view(f"u{itemsize}").reshape(last - first, rows)  # raw bits
        self._readers[weight.shard.path].read_columns(
            columns,
            weight.stored.start + (view.start + first) * itemsize,
            view.stride * itemsize,
        )
        skip = (item.within - first * rows) * itemsize
        for start in range(0, item.count, self._part):
            count = min(self._part, item.count - start)
            data = buffer[skip + start * itemsize :][: count * itemsize]
            yield Item(item.source, item.start + start, count, False), data

    def _quantize(self, item: Item, data: U8, codes: Codes | None) -> None:
        """Quantize an item by the largest magnitude of each block, and write it.

        Args:
            codes: what decodes `data`; None where it holds values.
        """
        plan = item.job.plan
        state = plan.state
        assert state is not None
        packed = self._output[: (item.count + 1) // 2]
        absmax = np.empty(-(-item.count // state.blocksize), np.float32)
        try:
            sums = self._engine.quantize(
                data,
                quantized_dtype(plan),
                state.blocksize,
                state.quant_type,
                packed,
                absmax,
                codes,
            )
        except NonFiniteError as error:
            if codes is not None:
                raise self._encoded.error(item, error.index, data, codes) from error
            self._run.not_finite(item, error, data)
            return
        item.job.stats[item.start] = sums
        name, first_block = plan.name, item.start // state.blocksize
        self._sink.write(name, item.start // 2, packed)
        if item.job.absmax is not None:
            item.job.absmax.write(first_block, absmax)
        else:
            self._sink.write(name + bnb_format.ABSMAX, 4 * first_block, absmax.view(np.uint8))

    def _search(self, item: Item, data: U8, ladder: Ladder) -> None:
        """Quantize an item under scales chosen from the ladder, and write it.

        The scales are final at once, as their offset is 0.
        """
        plan, state = item.job.plan, item.job.plan.state
        assert state is not None
        columns = item.source.importance
        packed = self._output[: (item.count + 1) // 2]
        index = np.empty(-(-item.count // state.blocksize), np.uint8)
        unit = np.empty(-(-index.size // ladder.run), np.float32)
        try:
            sums = self._engine.search(
                data, quantized_dtype(plan), state.blocksize, state.quant_type, ladder,
                None if columns is None else Importance(columns, item.within % columns.size),
                packed, ChosenScales(index, unit),
            )  # fmt: skip
        except NonFiniteError as error:
            self._run.not_finite(item, error, data)
            return
        scales = self._engine.nested_dequantize(
            NestedAbsmax(index, 0, ladder.run, ladder.table, unit, 0.0)
        )
        self._take_codes(item, data, packed, scales, sums)
        item.job.stats[item.start] = sums
        name, first_block = plan.name, item.start // state.blocksize
        self._sink.write(name, item.start // 2, packed)
        if state.nested:
            self._sink.write(name + bnb_format.ABSMAX, first_block, index)
            first_run = 4 * (first_block // ladder.run)
            self._sink.write(name + bnb_format.NESTED_ABSMAX, first_run, unit.view(np.uint8))
        else:
            self._sink.write(name + bnb_format.ABSMAX, 4 * first_block, scales.view(np.uint8))

    def _take_codes(self, item: Item, data: U8, packed: U8, scales: F32, sums: F64) -> None:
        """Put given codes (see given_codes.py) in place of the nearest, and their errors in `sums`.

        Args:
            data: the item's source bytes.
            packed: uint8 [(count + 1) // 2], the codes; changed.
            scales: float32 [blocks].
            sums: float64, the engine's error sums; changed.
        """
        job, plan, state = item.job, item.job.plan, item.job.plan.state
        if job.codes is None or state is None:
            return
        given = job.codes.read(plan.name, item.start // 2, packed.nbytes)
        if given is None:
            return
        packed[:] = given
        errors, worst = errors_of(
            packed, data, quantized_dtype(plan), state.blocksize, state.quant_type, scales,
            self._engine,
        )  # fmt: skip
        sums[:, 0], sums[:, 2] = errors[:, 0], errors[:, 1]
        with job.lock:
            job.worst_block = max(worst, job.worst_block or 0.0)

    def _unpack(self, item: Item, weight: PackedWeight) -> None:
        """Decode an item of a packed weight, and write it, or its transpose."""
        assert self._packed is not None
        plan = item.job.plan
        dtype, _ = plan.outputs[plan.name]
        itemsize = ITEMSIZE[dtype]
        fits = item.count * itemsize <= self._output.nbytes  # a single unit may be larger
        buffers = (self._source, self._output) if fits else ()
        start = plan.packed_start + item.start
        if plan.deltas:
            data = self._unpacked_and_merged(item, weight, start, dtype)
        else:
            data = self._packed.decode(weight, start, item.count, dtype, *buffers)
        if plan.view is None:
            self._sink.write(plan.key, item.start * itemsize, data)
            return
        # Rows [first, last) of the decoded matrix are columns of the stored one.
        rows, columns = plan.view.rows, plan.view.columns
        first, last = item.start // columns, (item.start + item.count) // columns
        block = transposed(data.view(f"u{itemsize}").reshape(last - first, columns))
        raw = block.view(np.uint8)
        start, stride = (plan.region.start, plan.region.stride) if plan.region else (0, rows)
        if last - first == stride:
            self._sink.write(plan.key, start * itemsize, raw.reshape(-1))
            return
        for column in range(columns):
            position = start + column * stride + first
            self._sink.write(plan.key, position * itemsize, raw[column])

    def _unpacked_and_merged(self, item: Item, weight: PackedWeight, start: int, dtype: str) -> U8:
        """Return the elements of a packed weight with what adapters do to them.

        Args:
            start: index of the first among the packed elements.
            dtype: of the result, to which it is rounded once.

        Raises:
            InputError: one is too large for the dtype.
        """
        packed, plan = self._packed, item.job.plan
        assert packed is not None
        assert self._merger is not None
        columns = columns_of(plan)

        def read_row(row: int) -> F32:
            # Decoding begins at a block's first element.
            first = plan.packed_start + row * columns
            skip = first % weight.state.blocksize
            return (
                packed.decode(weight, first - skip, skip + columns, "F32")
                .view(np.float32)[skip:]
                .copy()
            )

        values = packed.decode(weight, start, item.count, "F32").view(np.float32)
        self._merger.merge(plan, item.start, values, read_row)
        require_finite(plan, item.start, values)
        if dtype == "F32":
            return values.view(np.uint8)
        out = np.empty(item.count * ITEMSIZE[dtype], np.uint8)
        self._round(item, values.view(np.uint8), "F32", out, dtype)
        return out

    def _keep(self, item: Item, data: U8) -> None:
        """Write an item of a weight that is not quantized, decoded or cast where it has to be."""
        plan = item.job.plan
        dtype = plan.weight.dtype if plan.weight.encoding else plan.weight.stored.dtype
        if plan.deltas:
            dtype = "F32"
        if plan.outputs[plan.name][0] != dtype:
            self._cast(item, data, dtype)
        else:
            self._write(item, data, ITEMSIZE[dtype])

    def _cast(self, item: Item, data: U8, from_dtype: str) -> None:
        plan = item.job.plan
        dtype, _ = plan.outputs[plan.name]
        out = self._output[: item.count * ITEMSIZE[dtype]]
        self._round(item, data, from_dtype, out, dtype)
        self._write(item, out, ITEMSIZE[dtype])

    def _round(self, item: Item, data: U8, from_dtype: str, out: U8, dtype: str) -> None:
        """Round an item's elements into `out`.

        Raises:
            InputError: a finite value becomes infinite.
        """
        weight = item.source.weight
        try:
            self._engine.cast(data, from_dtype, out, dtype)
        except NonFiniteError as error:
            index = element(item, error.index)
            kept = ", the dtype of the kept tensors" if item.job.plan.state is None else ""
            raise InputError(
                f"{weight.stored.name}{list(index)} in {weight.shard.path} is too large "
                f"for {dtype}{kept}: choose another with --dtype"
            ) from error

    def _write(self, item: Item, data: U8, itemsize: int) -> None:
        """Write an item's elements, row by row where its weight is a part of an output tensor.

        Args:
            data: uint8 [count * itemsize].
        """
        plan = item.job.plan
        if plan.region is None:
            self._sink.write(plan.key, item.start * itemsize, data)
            return
        *_, width = plan.outputs[plan.name][1]
        done = 0
        while done < item.count:
            row, column = divmod(item.start + done, width)
            count = min(width - column, item.count - done)
            position = plan.region.start + row * plan.region.stride + column
            piece = data[done * itemsize : (done + count) * itemsize]
            self._sink.write(plan.key, position * itemsize, piece)
            done += count
