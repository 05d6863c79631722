"""What a run may take of this machine: its engine, threads and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

from .. import engines
from ..convert.listener import NOBODY, Listener
from ..engines.protocol import GRANULE, Engine
from ..errors import UsageError
from ..planning.resources import Resources, make_resources


def processors() -> int:
    """Return the processors of this process; a container or taskset may allow fewer than exist."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Machine:
    """What was asked for; the engine is loaded when it is needed first.

    Attributes:
        name: of the engine: auto, cpu, cuda or torch.
        device: of the engine, None for its default.
        workers: threads, None for the default.
        memory: bytes that the process shall stay below, None for no bound.
        listener: told what a user should know.
    """

    name: str = "auto"
    device: str | None = None
    workers: int | None = None
    memory: int | None = None
    listener: Listener = NOBODY

    @cached_property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            UsageError: there is none of this name, or no such device.
            MachineError: it cannot run here; the message says what to install.
        """
        note = self.listener.note
        engine = engines.load(self.name, self.device, note)
        if self.name == "auto" and self.device is None and self.memory and engine.extra_memory:
            try:
                make_resources(engine, 1, self.memory, processors())
            except UsageError:
                note(f"a GPU is here, but does not fit into {self.memory:,} bytes of memory: using "
                     "the CPU")  # fmt: skip
                return engines.load("cpu")
        return engine

    def resources(self, tensors: int = 0, unit: int = GRANULE) -> Resources:
        """Return threads and buffers for a run.

        Args:
            tensors: that are held in mind.
            unit: elements that are encoded together.

        Raises:
            UsageError: the memory is too little.
        """
        return make_resources(
            self.engine, self.workers, self.memory, processors(), tensors, max(unit, GRANULE)
        )
