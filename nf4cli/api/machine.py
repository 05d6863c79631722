"""Choose what a run may take of this machine: its engine, threads and memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .. import engines
from ..convert.listener import NOBODY, Listener
from ..engines.protocol import GRANULE
from ..errors import UsageError
from ..units import size_for_option

if TYPE_CHECKING:
    from ..engines.protocol import Engine
    from ..planning.resources import Resources


def processors() -> int:
    """Return the number of processors that this process may use, which a container may limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Machine:
    """The engine and limits that a user asks for; the engine is loaded at its first use.

    Attributes:
        name: of the engine: auto, cpu, cuda or torch.
        device: a device of the engine, None for its default.
        workers: threads, None for one a processor, at most 16.
        memory: most bytes of memory that the process shall take, None for no limit.
        listener: told what a user should know.
    """

    name: str = "auto"
    device: str | None = None
    workers: int | None = None
    memory: int | None = None
    listener: Listener = NOBODY

    @cached_property
    def engine(self) -> Engine:
        """The engine; for "auto", the CPU's where a GPU does not fit into the memory.

        Raises:
            UsageError: there is no such engine or device.
            MachineError: the engine cannot run here; the message says what to install.
        """
        from ..planning.resources import make_resources  # it needs numpy, a refusal does not

        note = self.listener.note
        engine = engines.load(self.name, self.device, note)
        if self.name == "auto" and self.device is None and self.memory and engine.extra_memory:
            try:
                make_resources(engine, 1, self.memory, processors())
            except UsageError:
                bound = size_for_option(self.memory)
                note(f"a GPU is here, but does not fit into --memory {bound}: using the CPU")
                return engines.load("cpu")
        return engine

    def resources(self, tensors: int = 0, unit: int = GRANULE) -> Resources:
        """Return the number of threads and the sizes of their buffers for a run.

        Args:
            tensors: number of tensors whose plan is held in memory.
            unit: elements that are encoded together.

        Raises:
            UsageError: the memory does not suffice, or `workers` is below 1.
        """
        from ..planning.resources import make_resources

        return make_resources(
            self.engine, self.workers, self.memory, processors(), tensors, max(unit, GRANULE)
        )
