"""Carry out a plan: read the source in chunks, pass them through the engine, hand them to a sink.

The sink writes files (shard_files.py, dequantize.py), compares every byte with a finished output
(proof/comparison.py), or drops everything (find_nonfinite.py).  So a proof runs the code that made
the bytes.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..callbacks import Progress, no_progress
from ..checkpoint import bnb_format
from ..checkpoint.digest import (
    OrderedDigest,
    ShardDigest,
    digest_open,
    digest_tensor,
    hash_threads,
    tensor_digest,
)
from ..checkpoint.encoded import Companion, Factors
from ..checkpoint.file_io import Identity
from ..checkpoint.packed import PackedReader
from ..checkpoint.reader import ByteReader, LocalShards, ShardSource
from ..checkpoint.types import Encoding, FileDigests, Placed, Shard, View, Weight
from ..engines.protocol import Engine
from ..errors import InputError, NonFiniteError
from ..format.codebook import NESTED_BLOCKSIZE, codebook, ladder, nested_map
from ..output.manifest import Manifest, Result, TensorError, manifest_of
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import Resources, require_chunk, unit_of
from ..threads import run
from .items import (
    AbsmaxFile,
    Item,
    Job,
    Reading,
    Source,
    is_rearranged,
    item_size,
    nonfinite,
    unit_of_packed,
)
from .merged_items import AdapterFiles, Merger
from .resume import Standing
from .worker import Sink, Worker

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8

_HELD = 1 << 20  # bytes of a companion up to which it is held in memory


@dataclass(frozen=True, slots=True)
class _InMemory:
    """A companion whose bytes are in memory, uint8."""

    data: U8

    def read(self, start: int, count: int) -> U8:
        return self.data[start : start + count]


@dataclass(frozen=True, slots=True)
class _InFile:
    """A companion that begins at byte `start` of an open file."""

    reader: ByteReader
    start: int

    def read(self, start: int, count: int) -> U8:
        return self.reader.read(self.start + start, count)


@dataclass(frozen=True, slots=True)
class Tools:
    """What every conversion works with.

    Attributes:
        engine: quantizes, decodes and casts.
        resources: threads, and bytes of their buffers.
        progress: told the bytes of each weight that are done.
    """

    engine: Engine
    resources: Resources
    progress: Progress = no_progress


class Conversion:
    """One run over a plan.

    Args:
        plan: says which tensors are read, and what becomes of each.
        tools: see `Tools`.
        sink: takes the output tensors' bytes.
        digest: algorithm of the source files' digests; None to compute none.
        standing: finished work of an earlier run, which is not done again.
        source: opens the source files; None to read them where the plan found them.
        packed: reads the weights to decode; None where the plan decodes none.
        scratch: directory of temporary files; None for the system's.

    Attributes:
        results: by weight, filled as weights are finished.
        digested: digests of the source files that are read to their end, and of those that were
            digested before, by name.  One without digests of its tensors is digested elsewhere.
    """

    def __init__(
        self,
        plan: Plan,
        tools: Tools,
        sink: Sink,
        digest: str | None = None,
        standing: Standing | None = None,
        source: ShardSource | None = None,
        packed: PackedReader | None = None,
        scratch: Path | None = None,
    ) -> None:
        require_chunk(plan.config, tools.resources)
        self.plan = plan
        self._engine = tools.engine
        self._resources = tools.resources
        self._progress = tools.progress
        self._sink = sink
        self._scratch = scratch
        self._lock = threading.Lock()
        self._turns: dict[Path, OrderedDigest] = {}
        self._algorithm = digest
        self.digested = dict(standing.sources) if standing else {}
        self.results: dict[str, Result] = dict(standing.results) if standing else {}
        self._done = frozenset(self.results)
        self._jobs: set[Job] = set()
        self._begun: dict[str, Job] = {}
        self._companions: dict[str, tuple[U8 | None, str]] = {}  # of one stored tensor at a time
        self._local = LocalShards()
        self._adapters = AdapterFiles(self._engine)
        self._source: ShardSource = source or self._local
        self._packed = packed
        self._readers: dict[Path, ByteReader] = {}
        self._identities: dict[Path, Identity] = {}
        self._uses_left = self._count_uses()

    def run(self) -> None:
        """Convert every weight that is not done yet.

        Raises:
            InputError: a weight holds NaN or infinity, or a source file changed.
            OSError: a disk is full or fails.
        """
        with self._local, self._adapters:
            try:
                run(self._items(), self._worker, self._resources.workers, self._abort)
            finally:
                for job in self._jobs:
                    if job.absmax is not None:
                        job.absmax.close()
        self._require_consistent()

    def _worker(self) -> Worker:
        return Worker(
            self, self._engine, self._sink, self._readers, self._resources.chunk,
            unit_of(self.plan.config), self._packed, Merger(self._engine, self._adapters),
        )  # fmt: skip

    def _count_uses(self) -> Counter[Path]:
        """Return how often each source file is used: once for each weight, or part of a weight,
        that is made of it, and once to digest it.

        The file is closed when none of its uses is left.
        """
        uses = Counter(
            source.shard.path
            for t in self.plan.tensors
            if t.outputs and t.name not in self.results
            for source in t.weight.sources
        )
        if self._algorithm is not None:
            shards = self.plan.checkpoint.shards
            uses.update(s.path for s in shards if s.path.name not in self.digested)
        return uses

    def _use_done(self, shard: Shard) -> None:
        """Count one use of a source file as done; after its last, check and close the file."""
        with self._lock:
            self._uses_left[shard.path] -= 1
            if self._uses_left[shard.path]:
                return
            reader = self._readers.pop(shard.path)
        self._require_unchanged(shard, reader)
        self._source.close(shard)

    def digest_source(self, shard: Shard, start: int, data: U8) -> None:
        """Digest the bytes that lie at byte `start` of a source file.

        Threads call it in any order; each waits until all bytes before its own are digested.
        """
        turns = self._turns[shard.path]
        if turns.update(start, data) == shard.size:
            self._digest_done(shard, turns.digest)

    def _digest_done(self, shard: Shard, digest: ShardDigest) -> None:
        digests = FileDigests(digest.hexdigest(), digest.tensors)
        self.digested[shard.path.name] = digests
        self._sink.source_read(shard, digests)
        self._use_done(shard)

    def _require_unchanged(self, shard: Shard, reader: ByteReader) -> None:
        """Raise InputError if a source file changed while it was read."""
        if reader.identity() == self._identities[shard.path]:
            return
        digests = self.digested.get(shard.path.name)
        # Its times may change without its bytes (chmod, a new link): only the bytes tell.
        if digests is None or digest_open(reader, shard, self._algorithm or "") != digests.digest:
            raise InputError(changed(shard.path))

    def _require_consistent(self) -> None:
        """Raise InputError if a tensor that was read early is not the one digested later.

        The factors of a weight that is stored as codes are read before it, wherever they lie.
        """
        placed = (p for t in self.plan.tensors for s in t.weight.sources for p in s.placed)
        files = {tensor.name: shard for shard, tensor in placed}
        for result in self.results.values():
            for name, digest in result.sources.items():
                digests = self.digested.get(files[name].path.name)
                if digests is not None and digests.tensors.get(name, digest) != digest:
                    raise InputError(changed(files[name].path))

    def manifest(self, output_digests: Mapping[str, str]) -> Manifest:
        """Return the record of this run, without its list of output files; call it after `run`.

        Args:
            output_digests: of every output tensor, by key.
        """
        return manifest_of(
            self.plan, self._algorithm or "", self.results, self.digested, output_digests
        )

    def _open(self, shard: Shard) -> None:
        """Open the next source file, and begin its digest."""
        reader = self._readers[shard.path] = self._source.open(shard)
        self._identities[shard.path] = reader.identity()
        if self._algorithm is None or shard.path.name in self.digested:
            return
        threads = hash_threads(self._resources.workers)
        digest = ShardDigest(shard.tensors, self._algorithm, threads)
        digest.update(reader.read(0, shard.data_start))
        if shard.data_start == shard.size:  # no tensor has a byte
            self._digest_done(shard, digest)
        else:
            self._turns[shard.path] = OrderedDigest(digest)

    def _abort(self) -> None:
        """Wake every thread that waits for another."""
        self._source.abort()
        for turns in list(self._turns.values()):  # a copy: another thread may open a file now
            turns.abort()
        self._sink.abort()

    def _items(self) -> Iterator[Item | Reading]:
        """Yield every chunk of every tensor, in the order of the source files."""
        pieces: dict[Path, list[_Piece]] = {}
        for plan in self.plan.tensors:
            for piece in _pieces(plan):
                pieces.setdefault(piece.weight.shard.path, []).append(piece)
        for shard in self.plan.checkpoint.shards:
            if self._uses_left[shard.path]:
                self._open(shard)
            # Parts of weights lie anywhere; the others are in this order already.
            in_file = sorted(pieces.get(shard.path, ()), key=lambda p: p.weight.stored.start)
            for _, group in groupby(in_file, lambda p: p.weight.stored.name):
                yield from self._items_of_tensor(list(group))

    def _items_of_tensor(self, pieces: list[_Piece]) -> Iterator[Item | Reading]:
        """Yield every chunk of what one stored tensor becomes."""
        todo = [p for p in pieces if p.plan.outputs and p.plan.name not in self._done]
        in_order = any(not is_rearranged(p.weight, p.view) for p in todo)
        self._companions = {}
        if pieces[0].weight.shard.path in self._turns and not in_order:
            yield from self._readings(pieces[0].weight)
        for piece in todo:
            yield from self._items_of(piece)
        for piece in pieces:
            if piece.plan.name in self._done:
                size = piece.weight.numel * piece.weight.bits // 8
                self._progress(piece.plan.name, size)

    def _readings(self, weight: Weight) -> Iterator[Reading]:
        """Yield the chunks of a stored tensor that are read for the digest alone."""
        tensor, step = weight.stored, min(self._resources.chunk, self._engine.item_bytes)
        for start in range(tensor.start, tensor.stop, step):
            stop = min(start + step, tensor.stop)
            yield Reading(weight.shard, start, stop)

    def _items_of(self, piece: _Piece) -> Iterator[Item]:
        """Yield the chunks of a piece, each a whole number of units and within a buffer."""
        plan, numel = piece.plan, piece.weight.numel
        unit = unit_of(self.plan.config) if plan.packed is None else unit_of_packed(plan)
        size = item_size(
            plan, piece.weight, piece.view, self._resources.chunk, self._engine.item_bytes
        )
        step = max(unit, size // unit * unit)
        starts = range(0, numel, step)
        job = self._begun.get(plan.name)
        if job is None:
            job = self._begun[plan.name] = self._begin(plan)
        source = Source(job, piece.weight, piece.view, piece.first, len(starts))
        if job.ladder is not None:
            source.importance = self.plan.importance_of(piece.weight.name)
        if piece.weight.encoding is not None:
            source.factors = self._factors(source, piece.weight.encoding)
        if not starts:  # a tensor without elements
            self._source_done(source)
        rearranged = is_rearranged(piece.weight, piece.view)
        digest = not rearranged and piece.weight.shard.path in self._turns
        for start in starts:
            yield Item(source, piece.first + start, min(step, numel - start), digest)

    def _begin(self, plan: TensorPlan) -> Job:
        """Return the state of a weight of which nothing is written yet."""
        job = Job(plan, len(plan.weight.sources))
        if plan.state is not None and self.plan.config.scale == "search":
            weighted = any(
                self.plan.importance_of(source.name) is not None for source in plan.weight.sources
            )
            job.ladder = ladder(plan.state.nested, weighted)
            job.codes = self.plan.codes
        elif plan.state is not None and plan.state.nested:
            job.absmax = AbsmaxFile(self._scratch)
        self._jobs.add(job)
        return job

    def _factors(self, source: Source, encoding: Encoding) -> Factors:
        """Return what reads the factors of an encoded weight, and digest all of them."""
        companions = {
            placed[1].name: self._companion(source, placed) for placed in encoding.companions
        }
        return Factors(source.weight.name, encoding, companions)

    def _companion(self, source: Source, placed: Placed) -> Companion:
        """Return what reads a companion: from memory, or from its open file if it is large."""
        shard, tensor = placed
        with self._lock:
            reader = self._readers.get(shard.path)
            if reader is not None:  # other threads may be at its last weight: it stays open
                self._uses_left[shard.path] += 1
        raw, digest = self._companions.get(tensor.name, (None, ""))
        if reader is not None and tensor.nbytes > _HELD:
            source.held.append(shard)
            digest = digest or digest_tensor(reader, tensor)
            companion: Companion = _InFile(reader, tensor.start)
        else:
            if raw is None and reader is not None:
                raw = reader.read(tensor.start, tensor.nbytes)
            elif raw is None:
                raw = self._source.read_tensor(shard, tensor)
            if reader is not None:
                self._use_done(shard)
            digest = digest or tensor_digest(raw)
            companion = _InMemory(raw)
        # All experts of a layer may have theirs in it: read and digested once for all of them.
        self._companions[tensor.name] = raw, digest
        source.job.sources[tensor.name] = digest
        return companion

    def not_finite(self, item: Item, error: NonFiniteError, data: U8) -> None:
        """Refuse a weight to quantize that holds a NaN or an infinity.

        Args:
            data: the item's bytes.

        Raises:
            InputError: always.  A subclass may go on instead (find_nonfinite.py).
        """
        dtype = "F32" if item.job.plan.deltas else item.source.weight.dtype
        raise InputError(nonfinite(item, error.index, data, dtype)) from error

    def item_done(self, item: Item) -> None:
        """Count a chunk as written; after the last one of its source, finish that."""
        source = item.source
        with self._lock:
            source.pending -= 1
            last = source.pending == 0
        if last:
            self._source_done(source)
        self._progress(item.job.plan.name, item.count * source.weight.bits // 8)

    def _source_done(self, source: Source) -> None:
        """Count a source of a weight as done; after its last one finish the weight.

        The files are released then: the rest of the weight may lie in files that wait for room.
        """
        job = source.job
        with self._lock:
            job.pending -= 1
            last = job.pending == 0
        if last:
            self._finish(job)
        for shard in (source.weight.shard, *source.held):
            self._use_done(shard)

    def _digests_in(self, shard: Shard) -> Mapping[str, str]:
        """Return the digests of the tensors of a source file, as far as they are known."""
        if shard.path in self._turns:
            return self._turns[shard.path].digest.tensors
        digests = self.digested.get(shard.path.name)
        return digests.tensors if digests else {}

    def _finish(self, job: Job) -> None:
        """Finish a weight whose chunks are all written, and tell the sink."""
        if job.plan.state is not None:
            self.finish_state(job)
        for source in job.plan.weight.sources:
            tensors = self._digests_in(source.shard)
            # Of a view, another thread may not have digested the rest of the stored tensor yet.
            if source.stored.name in tensors:
                job.sources[source.stored.name] = tensors[source.stored.name]
        offset = job.state.nested_offset if job.state and job.state.nested else None
        result = Result(offset, job.error, job.sources)
        with self._lock:
            self.results[job.plan.name] = result
            self._jobs.discard(job)
            self._begun.pop(job.plan.name, None)
        self._sink.finish(job.plan, result)

    def finish_state(self, job: Job) -> None:
        """Write what needs the whole weight: double-quantized scales, tables, state, errors."""
        name, state = job.plan.name, job.plan.state
        assert state is not None
        if job.absmax is not None:
            state = replace(state, nested_offset=self._nest(name, job.plan, job.absmax))
            job.absmax.close()
            job.absmax = None
        if job.ladder is not None and state.nested:
            state = replace(state, nested_offset=0.0)
            self._write_nested_map(name)
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
            worst_block=None if job.worst_block is None else float(f"{job.worst_block:.5g}"),
        )
        job.state = state

    def _nest(self, name: str, plan: TensorPlan, absmax: AbsmaxFile) -> float:
        """Double-quantize a weight's absmax vector, and return the offset."""
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
        self._write_nested_map(name)
        return offset

    def _write_nested_map(self, name: str) -> None:
        self._sink.write(name + bnb_format.NESTED_QUANT_MAP, 0, nested_map().view(np.uint8))

    def choose_offset(self, name: str, mean: float) -> float:
        """Return the nested_offset of a weight.

        Args:
            mean: of its absmax vector, rounded to float32.
        """
        return mean

    def write_nested(
        self, name: str, start: int, values: F32, offset: float, codes: U8, nested: F32
    ) -> None:
        """Write a piece of a double-quantized absmax vector.

        Args:
            name: of the weight.
            start: block of the first value; a multiple of NESTED_BLOCKSIZE.
            values: float32 [n], the scales that were double-quantized.
            offset: that was subtracted from each.
            codes: uint8 [n]; may be changed here.
            nested: float32, one for each NESTED_BLOCKSIZE of them.
        """
        self._sink.write(name + bnb_format.ABSMAX, start, codes)
        self._sink.write(
            name + bnb_format.NESTED_ABSMAX,
            4 * (start // NESTED_BLOCKSIZE),
            nested.view(np.uint8),
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is made of one stored tensor: a weight, or a part of one.

    Attributes:
        plan: of the weight.
        weight, view, first: see `Source`.
    """

    plan: TensorPlan
    weight: Weight
    view: View | None
    first: int


def _pieces(plan: TensorPlan) -> Iterator[_Piece]:
    """Yield the pieces of a weight, in its own order."""
    if not plan.weight.parts:
        yield _Piece(plan, plan.weight, plan.view, 0)
    first = 0
    for part in plan.weight.parts:
        yield _Piece(plan, part, part.view, first)
        first += part.numel


def changed(path: Path) -> str:
    """Return the message about a source file whose bytes were others before."""
    return (
        f"{path} changed while it was being read: what was made of it is of no use. Start again "
        "when nothing writes to it any more"
    )
