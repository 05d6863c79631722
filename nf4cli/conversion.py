"""A Plan, carried out: chunk after chunk through the engine, into a sink.

The sink is a set of files being written (quantize.py), or a finished output that every byte is
compared with (verify.py): the proof runs the code that made the bytes.
"""

from __future__ import annotations

import errno
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from . import bnb_format
from .codebook import NESTED_BLOCKSIZE, codebook, nested_map
from .digest import OrderedDigest, ShardDigest
from .engines import GRANULE, Engine
from .errors import InputError, NonFiniteError
from .fileio import read_at, write_at
from .limits import Resources
from .manifest import FileRecord, Manifest, TensorRecord
from .pipeline import Progress, no_progress, run
from .plan import Plan, TensorPlan
from .reader import ShardReaders
from .records import ITEMSIZE, Shard, TensorError
from .selection import module_path

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .engines import F32, F64, U8

_ABSMAX_PIECE = 1 << 18  # elements of the absmax vector double-quantized at a time


class Sink(Protocol):
    """Takes output bytes, from any thread, in any order."""

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None:
        """`data` belongs at `offset` bytes into the output tensor `key`."""
        ...

    def finish(self, plan: TensorPlan) -> None:
        """Every byte of this tensor and its companions has been written."""
        ...

    def abort(self) -> None:
        """The run has failed: let go of every thread that waits in `write`."""
        ...


@dataclass(frozen=True, slots=True)
class _Item:
    """One piece of work: `count` elements of a tensor from element `start`.

    For a transposed tensor elements count in the order they are encoded, and its bytes are
    digested by items of their own (`digest_only`), which read them in file order.
    """

    job: _Job
    start: int
    count: int
    digest_only: bool = False


@dataclass(eq=False, slots=True)
class _Job:
    """A tensor being worked on.

    Attributes:
        pending: items not done yet.
        stats: the engine's error sums by first element.
        absmax: temporary file of the float32 absmax vector, for double quantization.
    """

    plan: TensorPlan
    pending: int
    stats: dict[int, F64] = field(default_factory=dict)
    absmax: _AbsmaxFile | None = None
    error: TensorError | None = None
    state: bnb_format.QuantState | None = None


class _AbsmaxFile:
    """A float32 vector on disk: the only thing that grows with a tensor, kept out of memory."""

    def __init__(self, directory: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - see close

    def write(self, start: int, values: F32) -> None:
        write_at(self._file.fileno(), memoryview(values.view(np.uint8)), 4 * start)

    def pieces(self, size: int) -> Iterator[tuple[int, F32]]:
        """(first element, values), _ABSMAX_PIECE at a time."""
        for start in range(0, size, _ABSMAX_PIECE):
            values = np.empty(min(_ABSMAX_PIECE, size - start), np.float32)
            view = memoryview(values.view(np.uint8))
            if read_at(self._file.fileno(), view, 4 * start) < view.nbytes:
                raise OSError(errno.EIO, "a temporary file lost its end")
            yield start, values

    def close(self) -> None:
        self._file.close()


class Conversion:
    """One run over a plan.

    Args:
        digest: algorithm for the source files' digests, None to compute none.
        scratch: directory for temporary files, None for the system's.
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
        self.jobs: list[_Job] = []

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
                    self._start_digest(shard, self._algorithm)
            try:
                run(self._items(), lambda: _Worker(self), self._resources.workers, self._abort)
            finally:
                for job in self.jobs:
                    if job.absmax is not None:
                        job.absmax.close()

    def source_digests(self) -> tuple[dict[str, str], dict[str, str]]:
        """(by file name, by tensor name), after `run`."""
        files = {path.name: turns.digest.hexdigest() for path, turns in self._digests.items()}
        tensors: dict[str, str] = {}
        for turns in self._digests.values():
            tensors |= turns.digest.tensors
        return files, tensors

    def manifest(self, output_digests: Mapping[str, str]) -> Manifest:
        """The record of this run, after `run`; the caller adds the output's files.

        Args:
            output_digests: of every output tensor, by key.
        """
        source_files, source_tensors = self.source_digests()
        jobs = {job.plan.source.name: job for job in self.jobs}
        plan = self.plan
        return Manifest(
            config=plan.config,
            digest=self._algorithm or "",
            source_name=plan.checkpoint.name,
            source_files={
                shard.path.name: FileRecord(shard.size, source_files[shard.path.name])
                for shard in plan.checkpoint.shards
            },
            output_files={},
            tensors={
                t.source.name: TensorRecord(
                    action=t.action,
                    rule=t.rule,
                    reason=t.reason,
                    transposed=t.transposed,
                    source_file=t.shard.path.name,
                    source_dtype=t.source.dtype,
                    source_shape=t.source.shape,
                    source_digest=source_tensors[t.source.name],
                    output_file=plan.shards[t.file].filename,
                    outputs={key: output_digests.get(key, "") for key in t.outputs},
                    state=jobs[t.source.name].state,
                    error=jobs[t.source.name].error,
                )
                for t in plan.tensors
            },
            parameters=plan.parameters,
            quantized_parameters=plan.quantized_parameters,
            bits_per_weight=plan.bits_per_weight,
            run=None,
        )

    def _start_digest(self, shard: Shard, algorithm: str) -> None:
        digest = ShardDigest(shard.tensors, algorithm)
        digest.update(self._readers[shard].read(0, shard.data_start))
        self._digests[shard.path] = OrderedDigest(digest)

    def _abort(self) -> None:
        for turns in self._digests.values():
            turns.abort()
        self._sink.abort()

    def _items(self) -> Iterator[_Item]:
        """Every chunk of every tensor, in the order of the source files."""
        for plan in self.plan.tensors:
            n = plan.source.numel
            # An upcast writes more than it reads: the larger side must fit the buffer.
            widest = (
                max(ITEMSIZE[plan.source.dtype], *(ITEMSIZE[d] for d, _ in plan.outputs.values()))
                if plan.action == "cast"
                else ITEMSIZE[plan.source.dtype]
            )
            if plan.transposed:
                widest *= 4  # reading it transposed takes a block and its copy as well
            step = max(GRANULE, self._resources.chunk // widest // GRANULE * GRANULE)
            starts = range(0, n, step)
            separate = plan.transposed and self._algorithm is not None
            job = _Job(plan, len(starts) * (2 if separate else 1))
            if plan.state is not None and plan.state.nested:
                job.absmax = _AbsmaxFile(self._scratch)
            self.jobs.append(job)
            if not starts:  # a tensor without elements
                self._sink.finish(plan)
            if separate:
                for start in starts:
                    yield _Item(job, start, min(step, n - start), digest_only=True)
            for start in starts:
                yield _Item(job, start, min(step, n - start))

    def item_done(self, item: _Item) -> None:
        job = item.job
        with self._lock:
            job.pending -= 1
            last = job.pending == 0
        if last:
            if job.plan.state is not None:
                self._finish_state(job)
            self._sink.finish(job.plan)
        if not item.digest_only:
            self._progress(job.plan.source.name, item.count * ITEMSIZE[job.plan.source.dtype])

    def _finish_state(self, job: _Job) -> None:
        """Everything about a weight that needs all of it: double quantization, state, errors."""
        name, state = job.plan.source.name, job.plan.state
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
        )
        job.stats.clear()
        job.state = state

    def _nest(self, name: str, plan: TensorPlan, absmax: _AbsmaxFile) -> float:
        """Double-quantize a weight's absmax vector; returns the offset."""
        _, (blocks,) = plan.outputs[name + bnb_format.ABSMAX]
        total = 0.0
        for _, values in absmax.pieces(blocks):
            total = self._engine.sum(values, total)
        offset = float(np.float32(total / blocks))
        for start, values in absmax.pieces(blocks):
            codes = np.empty(values.size, np.uint8)
            nested = np.empty(-(-values.size // NESTED_BLOCKSIZE), np.float32)
            self._engine.nested_quantize(values, offset, codes, nested)
            self._sink.write(name + bnb_format.ABSMAX, start, codes)
            self._sink.write(
                name + bnb_format.NESTED_ABSMAX,
                4 * (start // NESTED_BLOCKSIZE),
                nested.view(np.uint8),
            )
        self._sink.write(name + bnb_format.NESTED_QUANT_MAP, 0, nested_map().view(np.uint8))
        return offset


class _Worker:
    """One thread's buffers and its way through an item."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        chunk = conversion._resources.chunk
        self._source = np.empty(chunk, np.uint8)
        self._output = np.empty(chunk, np.uint8)

    def __call__(self, item: _Item) -> None:
        c, plan = self._conversion, item.job.plan
        itemsize = ITEMSIZE[plan.source.dtype]
        if plan.transposed and not item.digest_only:
            data = self._read_transposed(item)
        else:
            data = self._source[: item.count * itemsize]
            position = plan.source.start + item.start * itemsize
            c._readers[plan.shard].read_into(data, position)
            if c._algorithm is not None:
                c._digests[plan.shard.path].update(position, data)
        if item.digest_only:
            pass
        elif plan.action == "quantize":
            self._quantize(item, data)
        elif plan.action == "cast":
            self._cast(item, data)
        else:
            c._sink.write(plan.source.name, item.start * itemsize, data)
        c.item_done(item)

    def _read_transposed(self, item: _Item) -> U8:
        """Elements [start, start+count) of the transpose of a [rows, columns] tensor."""
        source = item.job.plan.source
        rows, columns = source.shape
        itemsize = ITEMSIZE[source.dtype]
        first, last = item.start // rows, -(-(item.start + item.count) // rows)
        reader = self._conversion._readers[item.job.plan.shard]
        block = np.empty((rows, (last - first) * itemsize), np.uint8)
        if last - first == columns:
            reader.read_into(block.reshape(-1), source.start)
        else:
            for row in range(rows):
                reader.read_into(block[row], source.start + (row * columns + first) * itemsize)
        elements = block.view(f"u{itemsize}")  # raw bits, [rows, last - first]
        flat = np.ascontiguousarray(elements.T).reshape(-1)
        skip = item.start - first * rows
        return flat[skip : skip + item.count].view(np.uint8)

    def _quantize(self, item: _Item, data: U8) -> None:
        c, plan = self._conversion, item.job.plan
        state = plan.state
        assert state is not None
        packed = self._output[: (item.count + 1) // 2]
        absmax = np.empty(-(-item.count // state.blocksize), np.float32)
        try:
            sums = c._engine.quantize(
                data, plan.source.dtype, state.blocksize, state.quant_type, packed, absmax
            )
        except NonFiniteError as error:
            raise InputError(_nonfinite(item, error.index, data)) from error
        item.job.stats[item.start] = sums
        name, first_block = plan.source.name, item.start // state.blocksize
        c._sink.write(name, item.start // 2, packed)
        if item.job.absmax is not None:
            item.job.absmax.write(first_block, absmax)
        else:
            c._sink.write(name + bnb_format.ABSMAX, 4 * first_block, absmax.view(np.uint8))

    def _cast(self, item: _Item, data: U8) -> None:
        c, source = self._conversion, item.job.plan.source
        ((dtype, _),) = item.job.plan.outputs.values()
        out = self._output[: item.count * ITEMSIZE[dtype]]
        try:
            c._engine.cast(data, source.dtype, out, dtype)
        except NonFiniteError as error:
            place = _element(item, error.index)
            raise InputError(
                f"{source.name}{list(place)} in {item.job.plan.shard.path} is too large for "
                f"{dtype}, the dtype of the kept tensors: choose another with --dtype"
            ) from error
        c._sink.write(source.name, item.start * ITEMSIZE[dtype], out)


def _element(item: _Item, index: int) -> tuple[int, ...]:
    """The place in the source tensor of the item's element `index`."""
    shape = item.job.plan.source.shape
    flat = item.start + index
    if item.job.plan.transposed:
        return flat % shape[0], flat // shape[0]
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _nonfinite(item: _Item, index: int, data: U8) -> str:
    source, shard = item.job.plan.source, item.job.plan.shard
    bits = int(data.view(f"u{ITEMSIZE[source.dtype]}")[index])
    mantissa = {"F32": 23, "F16": 10, "BF16": 7}[source.dtype]
    kind = "NaN" if bits & ((1 << mantissa) - 1) else "infinite"
    return (
        f"{source.name}{list(_element(item, index))} in {shard.path} is {kind}: a 4-bit block "
        "cannot hold it. Repair the source, or leave this module in full precision with "
        f"--keep {module_path(source.name)}"
    )
