"""Threads and memory that a plan is run with."""

from __future__ import annotations

from dataclasses import dataclass

from ..engines.protocol import GRANULE, Engine
from ..errors import UsageError
from ..format.codebook import NESTED_BLOCKSIZE
from ..format.config import QuantConfig
from ..units import size_for_option
from .plan import Plan

DEFAULT_CHUNK = 8 << 20
"""Bytes of source a worker holds at a time when --memory does not say otherwise."""
_BASE_MEMORY = 70_000_000  # bytes: interpreter, NumPy and the libraries, as measured
_TENSOR_MEMORY = 18_000  # bytes for everything that is known of one tensor, as measured
_RECORD_ROOM = 300  # bytes a file in nf4_pipeline.json


@dataclass(frozen=True, slots=True)
class Resources:
    """How a plan is run.

    Attributes:
        workers: threads.
        chunk: bytes of source a worker holds at a time.
        memory: bytes of memory that the process will stay below.
    """

    workers: int
    chunk: int
    memory: int


def _beside_shards(plan: Plan, workers: int) -> int:
    copies = sum((plan.checkpoint.root / f).stat().st_size for f in plan.checkpoint.extra_files)
    if plan.importance is not None:
        copies += plan.importance.path.stat().st_size
    manifest = 2 * (1000 * len(plan.tensors) + 10_000)  # and the journal
    return copies + manifest + plan.scratch_bytes * min(workers, len(plan.tensors))


def _cheaper(engine: Engine) -> str:
    return ", or less with --engine cpu" if engine.extra_memory else ""


def unit_of(config: QuantConfig) -> int:
    """Elements that are encoded together: a granule, and the blocks that share a nested_absmax
    where their scales are chosen for it."""
    together = config.scale == "search" and config.double_quant
    return max(GRANULE, NESTED_BLOCKSIZE * config.blocksize if together else 0)


def require_chunk(config: QuantConfig, resources: Resources) -> None:
    """Raises UsageError where a worker's buffers do not hold what is encoded together."""
    unit = unit_of(config)
    need = 8 * unit  # bytes of the widest dtype
    if unit > GRANULE and resources.chunk < need:
        raise UsageError(
            f"--memory leaves buffers of {resources.chunk:,} bytes, and --blocksize "
            f"{config.blocksize} under chosen scales needs {need:,}: give more memory, or leave "
            "--memory out"
        )


def make_resources(
    engine: Engine,
    workers: int | None,
    memory: int | None,
    cpus: int,
    tensors: int = 0,
    unit: int = GRANULE,
) -> Resources:
    """Threads and buffer sizes that keep the process below `memory` bytes.

    Args:
        engine: what the threads will call.
        workers: as asked, None for one a processor (at most 16) and the engine's spare ones.
        memory: as asked, None for no bound but the default buffers.
        tensors: of the source, whose headers and plans are held in memory.
        unit: see `unit_of`.

    Raises:
        UsageError: not even one worker with the smallest buffers fits, or workers < 1.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} is below 1")
    threads = workers or max(1, min(cpus, 16)) + engine.spare_threads
    base = _BASE_MEMORY + engine.extra_memory + _TENSOR_MEMORY * tensors
    if memory is None:
        chunk = DEFAULT_CHUNK
    else:
        room = memory - base
        least = 8 * unit  # bytes: one unit of the widest dtype
        smallest = 2 * least + engine.worker_memory
        if room < smallest:
            raise UsageError(
                f"--memory {memory:,} bytes is too little: the smallest that works is "
                f"{size_for_option(base + smallest)}{_cheaper(engine)}"
            )
        threads = min(threads, room // smallest)
        chunk = min(DEFAULT_CHUNK, (room // threads - engine.worker_memory) // 2)
        chunk -= chunk % least
    return Resources(threads, chunk, base + threads * (2 * chunk + engine.worker_memory))
