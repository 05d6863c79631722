"""Decide with how many threads and how much memory a plan runs, and what it needs of the disk
beside its shards."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.protocol import GRANULE, Engine
from ..errors import UsageError
from ..format.codebook import NESTED_BLOCKSIZE
from ..format.config import QuantConfig
from ..units import size_for_option
from .plan import Plan

DEFAULT_CHUNK = 8 << 20
"""Bytes of source that a worker holds at a time where --memory does not ask for less."""
_BASE_MEMORY = 70_000_000  # bytes: interpreter, NumPy and the libraries, as measured
_TENSOR_MEMORY = 18_000  # bytes for everything that is known of one tensor, as measured
HELD_MATRICES = 4
"""Matrices of adapters that stay in memory: those of the weight at hand, and of the next ones."""
_MERGED_ITEM = 6_000_000  # bytes of float32 elements of a thread that merges, as measured
RECORD_BYTES = 300
"""Bytes of nf4_pipeline.json reckoned for each file that it lists."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use.

    Attributes:
        workers: threads.
        chunk: bytes of source that a worker holds at a time.
        memory: bytes of memory that the process stays below.
    """

    workers: int
    chunk: int
    memory: int


def bytes_beside_shards(plan: Plan, workers: int) -> int:
    """Return the bytes of disk for everything but shards: copied files, manifest and journal,
    temporary files."""
    copies = sum((plan.checkpoint.root / f).stat().st_size for f in plan.checkpoint.extra_files)
    if plan.importance is not None:
        copies += plan.importance.path.stat().st_size
    manifest = 2 * (1000 * len(plan.tensors) + 10_000)  # and the journal
    scratch = plan.scratch_bytes * min(workers, len(plan.tensors)) + plan.scattered_scratch_bytes
    return copies + manifest + scratch


def _cheaper_engine(engine: Engine) -> str:
    return ", or less with --engine cpu" if engine.extra_memory else ""


def unit_of(config: QuantConfig) -> int:
    """Return how many elements are encoded together.

    At least a granule; under a search of doubly quantized scales, all blocks that share a
    nested_absmax.
    """
    return max(GRANULE, NESTED_BLOCKSIZE * _together(config))


def _together(config: QuantConfig) -> int:
    """Return the largest blocksize whose nested scales are chosen, 0 for none."""
    nested = [blocksize for blocksize, nested in config.packings if nested]
    return max(nested, default=0) if config.scale == "search" else 0


def require_chunk(config: QuantConfig, resources: Resources) -> None:
    """Raise UsageError if a worker's buffers cannot hold what is encoded together."""
    unit = unit_of(config)
    need = 8 * unit  # bytes of the widest dtype
    if unit > GRANULE and resources.chunk < need:
        raise UsageError(
            f"--memory leaves buffers of {resources.chunk:,} bytes, and --blocksize "
            f"{_together(config)} under chosen scales needs {need:,}: give more memory, or leave "
            "--memory out"
        )


def make_resources(
    engine: Engine,
    workers: int | None,
    memory: int | None,
    cpus: int,
    tensors: int = 0,
    unit: int = GRANULE,
    merged: int = 0,
) -> Resources:
    """Return the threads and buffer sizes that keep the process below `memory` bytes.

    Args:
        engine: the engine that the threads will call.
        workers: threads asked for; None for one a processor, at most 16, and the engine's spare
            threads.
        memory: bytes asked for; None for buffers of the default size.
        cpus: processors that this process may use.
        tensors: how many the source has: what is known of each is held in memory.
        unit: see `unit_of`.
        merged: bytes of the largest matrix of an adapter that is merged, in float32; 0 for none.

    Raises:
        UsageError: not even one worker with the smallest buffers fits, or workers < 1.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is below 1")
    threads = workers or max(1, min(cpus, 16)) + engine.spare_threads
    base = _BASE_MEMORY + engine.extra_memory + _TENSOR_MEMORY * tensors + HELD_MATRICES * merged
    # A thread has a copy of its matrix in the engine's order, and one of what it was made from.
    own = engine.worker_memory + (2 * merged + _MERGED_ITEM if merged else 0)
    if memory is None:
        chunk = DEFAULT_CHUNK
    else:
        room = memory - base
        least = 8 * unit  # bytes: one unit of the widest dtype
        smallest = 2 * least + own
        if room < smallest:
            raise UsageError(
                f"--memory {memory:,} bytes is too little: the smallest that works is "
                f"{size_for_option(base + smallest)}{_cheaper_engine(engine)}"
            )
        threads = min(threads, room // smallest)
        chunk = min(DEFAULT_CHUNK, (room // threads - own) // 2)
        chunk -= chunk % least
    return Resources(threads, chunk, base + threads * (2 * chunk + own))
