"""A Plan, carried out: chunk after chunk through the engine, into a sink.

The sink is a set of files being written (quantize.py), or a finished output that every byte is
compared with (verify.py): the proof runs the code that made the bytes.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from . import bnb_format
from .codebook import NESTED_BLOCKSIZE, codebook, nested_map
from .digest import OrderedDigest, ShardDigest, digest_open, tensor_digest
from .engines import GRANULE, Engine, Float8
from .errors import InputError, NonFiniteError
from .items import AbsmaxFile, Item, Job, Reading, damaged, element, nonfinite, widest
from .limits import Resources
from .manifest import Manifest
from .pipeline import Progress, no_progress, run
from .plan import Plan, TensorPlan
from .reader import ShardReaders
from .recording import manifest_of
from .records import ITEMSIZE, FileDigests, Result, Scale, Shard, TensorError, View
from .resume import Standing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .engines import F32, U8


class Sink(Protocol):
    """Takes output bytes, from any thread, in any order."""

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """`data` belongs at `offset` bytes into the output tensor `key`."""
        ...

    def finish(self, plan: TensorPlan, result: Result) -> None:
        """Every byte of this tensor and its companions has been written."""
        ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None:
        """Every byte of this source file has been read and digested."""
        ...

    def abort(self) -> None:
        """The run has failed: let go of every thread that waits in `write`."""
        ...


class Conversion:
    """One run over a plan.

    Args:
        digest: algorithm for the source files' digests, None to compute none.
        scratch: directory for temporary files, None for the system's.
        standing: finished work that is not done again.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        resources: Resources,
        sink: Sink,
        digest: str | None,
        scratch: Path | None = None,
        progress: Progress = no_progress,
        standing: Standing | None = None,
    ) -> None:
        self.plan = plan
        self._engine = engine
        self._resources = resources
        self._sink = sink
        self._scratch = scratch
        self._progress = progress
        self._lock = threading.Lock()
        self._digests: dict[Path, OrderedDigest] = {}
        self._algorithm = digest
        self._digested = dict(standing.sources) if standing else {}
        self.results: dict[str, Result] = dict(standing.results) if standing else {}
        self._done = frozenset(self.results)
        self._jobs: set[Job] = set()

    def run(self) -> None:
        """Convert everything.

        Raises:
            InputError: a weight holds NaN or infinity, or a source file changed.
            OSError: a disk is full or fails.
        """
        shards = self.plan.checkpoint.shards
        with ShardReaders(shards) as self._readers:
            if self._algorithm is not None:
                for shard in shards:
                    if shard.path.name not in self._digested:
                        self._start_digest(shard, self._algorithm)
            try:
                run(self._items(), lambda: _Worker(self), self._resources.workers, self._abort)
            finally:
                for job in self._jobs:
                    if job.absmax is not None:
                        job.absmax.close()
            for shard in shards:
                self._require_unchanged(shard)

    def digest_source(self, shard: Shard, start: int, data: U8) -> None:
        """Bytes of a source file that stand at `start` in it; each thread waits for its turn."""
        turns = self._digests[shard.path]
        if turns.update(start, data) == shard.size:
            digests = FileDigests(turns.digest.hexdigest(), turns.digest.tensors)
            self._digested[shard.path.name] = digests
            self._sink.source_read(shard, digests)

    def _require_unchanged(self, shard: Shard) -> None:
        """A file that was written to while it was read is no longer what the digests say."""
        reader = self._readers[shard]
        if reader.identity() == shard.identity:
            return
        known = self._digested.get(shard.path.name)
        # Its times may change without its bytes (chmod, a new link): only the bytes tell.
        if known is None or digest_open(reader, shard, self._algorithm or "") != known.digest:
            raise InputError(
                f"{shard.path} changed while it was being read: what was made of it is of no use. "
                "Start again when nothing writes to it any more"
            )

    def manifest(self, output_digests: Mapping[str, str]) -> Manifest:
        """The record of this run, after `run`; the caller adds the output's files.

        Args:
            output_digests: of every output tensor, by key.
        """
        return manifest_of(
            self.plan, self._algorithm or "", self.results, self._digested, output_digests
        )

    def _start_digest(self, shard: Shard, algorithm: str) -> None:
        digest = ShardDigest(shard.tensors, algorithm)
        digest.update(self._readers[shard].read(0, shard.data_start))
        if shard.data_start == shard.size:  # no tensor has a byte
            self._digested[shard.path.name] = FileDigests(digest.hexdigest(), digest.tensors)
        else:
            self._digests[shard.path] = OrderedDigest(digest)

    def _abort(self) -> None:
        for turns in self._digests.values():
            turns.abort()
        self._sink.abort()

    def _items(self) -> Iterator[Item | Reading]:
        """Every chunk of every tensor, in the order of the source files."""
        stored = groupby(self.plan.tensors, lambda t: (t.weight.shard.path, t.weight.stored.name))
        for _, group in stored:
            plans = list(group)
            todo = [p for p in plans if p.outputs and p.name not in self._done]
            in_order = any(p.view is None for p in todo)
            if plans[0].weight.shard.path in self._digests and not in_order:
                yield from self._readings(plans[0])
            for plan in todo:
                yield from self._items_of(plan)
            for plan in plans:
                if plan.name in self._done:
                    self._progress(plan.name, plan.numel * ITEMSIZE[plan.weight.stored.dtype])

    def _readings(self, plan: TensorPlan) -> Iterator[Reading]:
        tensor = plan.weight.stored
        for start in range(tensor.start, tensor.stop, self._resources.chunk):
            stop = min(start + self._resources.chunk, tensor.stop)
            yield Reading(plan.weight.shard, start, stop)

    def _items_of(self, plan: TensorPlan) -> Iterator[Item]:
        step = max(GRANULE, self._resources.chunk // widest(plan) // GRANULE * GRANULE)
        starts = range(0, plan.numel, step)
        job = Job(plan, len(starts))
        if plan.state is not None and plan.state.nested:
            job.absmax = AbsmaxFile(self._scratch)
        if plan.weight.scale is not None:
            job.scale = self._scales(job, plan.weight.scale)
        self._jobs.add(job)
        if not starts:  # a tensor without elements
            self._finish(job)
        digest = plan.view is None and plan.weight.shard.path in self._digests
        for start in starts:
            yield Item(job, start, min(step, plan.numel - start), digest)

    def _scales(self, job: Job, scale: Scale) -> F32:
        """The factors of a float8 weight: a 16,384th of its size, or a value a row."""
        tensor = scale.tensor
        raw = self._readers[scale.shard].read(tensor.start, tensor.nbytes)
        job.sources[tensor.name] = tensor_digest(raw)
        values = np.empty(tensor.numel, np.float32)
        if tensor.dtype == "F8_E8M0":  # a power of two: the exponent of a float32, 255 is NaN
            exponents = np.where(raw == 255, 0x7FC00000, raw.astype(np.uint32) << 23)
            values[:] = np.where(raw == 0, 2.0**-127, exponents.astype(np.uint32).view(np.float32))
        else:
            self._engine.cast(raw, tensor.dtype, values.view(np.uint8), "F32")
        return values

    def not_finite(self, item: Item, error: NonFiniteError, data: U8) -> None:
        """A weight to quantize holds a NaN or an infinity; `data` are the item's bytes.

        Raises:
            InputError: always; a scan (nonfinite.py) goes on.
        """
        dtype = item.job.plan.weight.dtype
        raise InputError(nonfinite(item, error.index, data, dtype)) from error

    def item_done(self, item: Item) -> None:
        job = item.job
        with self._lock:
            job.pending -= 1
            last = job.pending == 0
        if last:
            self._finish(job)
        self._progress(job.plan.name, item.count * ITEMSIZE[job.plan.weight.stored.dtype])

    def _finish(self, job: Job) -> None:
        """All chunks of a weight are written."""
        weight = job.plan.weight
        if job.plan.state is not None:
            self.finish_state(job)
        if weight.shard.path in self._digests:
            tensors: Mapping[str, str] = self._digests[weight.shard.path].digest.tensors
        else:
            known = self._digested.get(weight.shard.path.name)
            tensors = known.tensors if known else {}
        # The bytes that a view is a part of may still be on their way through another thread.
        if weight.stored.name in tensors:
            job.sources[weight.stored.name] = tensors[weight.stored.name]
        offset = job.state.nested_offset if job.state and job.state.nested else None
        result = Result(offset, job.error, job.sources)
        with self._lock:
            self.results[job.plan.name] = result
            self._jobs.discard(job)
        self._sink.finish(job.plan, result)

    def finish_state(self, job: Job) -> None:
        """Everything about a weight that needs all of it: double quantization, state, errors."""
        name, state = job.plan.name, job.plan.state
        assert state is not None
        if job.absmax is not None:
            state = replace(state, nested_offset=self._nest(name, job.plan, job.absmax))
            job.absmax.close()
            job.absmax = None
        table = codebook(state.quant_type).decode
        self._sink.write(name + bnb_format.QUANT_MAP, 0, table.view(np.uint8))
        blob = np.frombuffer(bnb_format.encode_state(state), np.uint8)
        self._sink.write(name + bnb_format.state_suffix(state.quant_type), 0, blob)
        sums = np.concatenate([job.stats[start] for start in sorted(job.stats)])
        squares = math.fsum(sums[:, 1].tolist())
        job.error = TensorError(
            rel_rmse=math.sqrt(math.fsum(sums[:, 0].tolist()) / squares) if squares else 0.0,
            max_abs=float(sums[:, 2].max()),
            blocks=-(-job.plan.numel // state.blocksize),
            outlier_blocks=int(sums[:, 3].sum()),
        )
        job.state = state

    def _nest(self, name: str, plan: TensorPlan, absmax: AbsmaxFile) -> float:
        """Double-quantize a weight's absmax vector; returns the offset."""
        _, (blocks,) = plan.outputs[name + bnb_format.ABSMAX]
        total = 0.0
        for _, values in absmax.pieces(blocks):
            total = self._engine.sum(values, total)
        offset = self.choose_offset(name, float(np.float32(total / blocks)))
        for start, values in absmax.pieces(blocks):
            codes = np.empty(values.size, np.uint8)
            nested = np.empty(-(-values.size // NESTED_BLOCKSIZE), np.float32)
            self._engine.nested_quantize(values, offset, codes, nested)
            self.write_nested(name, start, values, offset, codes, nested)
        self._sink.write(name + bnb_format.NESTED_QUANT_MAP, 0, nested_map().view(np.uint8))
        return offset

    def choose_offset(self, name: str, mean: float) -> float:
        """nested_offset of a weight whose absmax vector has this mean, rounded to float32."""
        return mean

    def write_nested(
        self, name: str, start: int, values: F32, offset: float, codes: U8, nested: F32
    ) -> None:
        """A piece of a double-quantized absmax vector, and the float32 `values` it is made from.

        Args:
            start: block of the first value; a multiple of NESTED_BLOCKSIZE.
        """
        self._sink.write(name + bnb_format.ABSMAX, start, codes)
        self._sink.write(
            name + bnb_format.NESTED_ABSMAX,
            4 * (start // NESTED_BLOCKSIZE),
            nested.view(np.uint8),
        )


class _Worker:
    """One thread's buffers and its way through an item."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        chunk, engine = conversion._resources.chunk, conversion._engine
        self._source, self._output = engine.buffer(chunk), engine.buffer(chunk)

    def __call__(self, item: Item | Reading) -> None:
        c = self._conversion
        if isinstance(item, Reading):
            data = self._source[: item.stop - item.start]
            c._readers[item.shard].read_into(data, item.start)
            c.digest_source(item.shard, item.start, data)
            return
        plan = item.job.plan
        data = self._read(item) if plan.view is None else self._read_transposed(item, plan.view)
        if plan.action == "quantize":
            self._quantize(item, data)
        else:
            self._keep(item, data)
        c.item_done(item)

    def _read(self, item: Item) -> U8:
        """Elements [start, start + count) as they lie, into the start of the buffer."""
        c, weight = self._conversion, item.job.plan.weight
        itemsize = ITEMSIZE[weight.stored.dtype]
        data = self._source[: item.count * itemsize]
        position = weight.stored.start + item.start * itemsize
        c._readers[weight.shard].read_into(data, position)
        if item.digest:
            c.digest_source(weight.shard, position, data)
        return data

    def _decode(self, item: Item, data: U8, scale: Scale) -> U8:
        """Float8 -> the weight's dtype, into the rest of the buffer."""
        weight, float8 = item.job.plan.weight, _float8(item)
        assert float8 is not None
        start = -(-item.count // 8) * 8  # aligned for the wider elements
        out = self._source[start : start + item.count * ITEMSIZE[weight.dtype]]
        try:
            self._conversion._engine.decode_float8(data, float8, out, weight.dtype)
        except NonFiniteError as error:
            raise InputError(damaged(item, error.index, data, scale)) from error
        return out

    def _read_transposed(self, item: Item, view: View) -> U8:
        """Elements [start, start + count) of the transpose of a stored matrix."""
        weight = item.job.plan.weight
        itemsize = ITEMSIZE[weight.stored.dtype]
        first, last = item.start // view.rows, -(-(item.start + item.count) // view.rows)
        reader = self._conversion._readers[weight.shard]
        block = np.empty((view.rows, (last - first) * itemsize), np.uint8)
        origin = weight.stored.start + view.start * itemsize
        if last - first == view.stride:
            reader.read_into(block.reshape(-1), origin)
        else:
            reader.read_rows(block, origin + first * itemsize, view.stride * itemsize)
        elements = block.view(f"u{itemsize}")  # raw bits, [rows, last - first]
        flat = np.ascontiguousarray(elements.T).reshape(-1)
        skip = item.start - first * view.rows
        return flat[skip : skip + item.count].view(np.uint8)

    def _quantize(self, item: Item, data: U8) -> None:
        c, plan = self._conversion, item.job.plan
        weight, state = plan.weight, plan.state
        assert state is not None
        packed = self._output[: (item.count + 1) // 2]
        absmax = np.empty(-(-item.count // state.blocksize), np.float32)
        try:
            sums = c._engine.quantize(
                data, weight.dtype, state.blocksize, state.quant_type, packed, absmax,
                _float8(item),
            )  # fmt: skip
        except NonFiniteError as error:
            if weight.scale is not None:
                raise InputError(damaged(item, error.index, data, weight.scale)) from error
            c.not_finite(item, error, data)
            return
        item.job.stats[item.start] = sums
        name, first_block = plan.name, item.start // state.blocksize
        c._sink.write(name, item.start // 2, packed)
        if item.job.absmax is not None:
            item.job.absmax.write(first_block, absmax)
        else:
            c._sink.write(name + bnb_format.ABSMAX, 4 * first_block, absmax.view(np.uint8))

    def _keep(self, item: Item, data: U8) -> None:
        plan = item.job.plan
        dtype = plan.weight.stored.dtype
        if plan.weight.scale is not None:
            data, dtype = self._decode(item, data, plan.weight.scale), plan.weight.dtype
        if plan.outputs[plan.name][0] != dtype:
            self._cast(item, data, dtype)
        else:
            self._conversion._sink.write(plan.name, item.start * ITEMSIZE[dtype], data)

    def _cast(self, item: Item, data: U8, from_dtype: str) -> None:
        c, plan = self._conversion, item.job.plan
        dtype, _ = plan.outputs[plan.name]
        out = self._output[: item.count * ITEMSIZE[dtype]]
        try:
            c._engine.cast(data, from_dtype, out, dtype)
        except NonFiniteError as error:
            place = element(item, error.index)
            raise InputError(
                f"{plan.weight.stored.name}{list(place)} in {plan.weight.shard.path} is too large "
                f"for {dtype}, the dtype of the kept tensors: choose another with --dtype"
            ) from error
        c._sink.write(plan.name, item.start * ITEMSIZE[dtype], out)


def _float8(item: Item) -> Float8 | None:
    """What decodes the item, None for one that is stored in its own dtype."""
    weight = item.job.plan.weight
    if weight.scale is None:
        return None
    factors = item.job.scale
    assert factors is not None
    return Float8(item.start, weight.shape[1], factors, weight.scale.block)
