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
    from ..cluster.ray_tasks import RayCluster
    from ..convert.tasks import Crowd
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
        ray: address of the Ray cluster that does the work (see `connected`), with this engine,
            threads and memory for each task; None to do it here.
    """

    name: str = "auto"
    device: str | None = None
    workers: int | None = None
    memory: int | None = None
    listener: Listener = NOBODY
    ray: str | None = None

    @cached_property
    def cluster(self) -> RayCluster | None:
        """The cluster that does the work, None to do it here."""
        from ..cluster.ray_node import Settings
        from ..cluster.ray_tasks import RayCluster

        if self.ray is None:
            return None
        settings = Settings(self.name, self.device, self.workers, self.memory)
        return RayCluster(self.ray, settings, self.listener.note, self.listener.detail)

    @property
    def crowd(self) -> Crowd | None:
        """Return who works in the cluster, None without one."""
        return None if self.cluster is None else self.cluster.crowd

    @property
    def called(self) -> str:
        """Return what does the work, for messages: an engine, or a cluster."""
        return self.engine.name if self.ray is None else f"ray ({self.ray})"

    @cached_property
    def engine(self) -> Engine:
        """The engine; for "auto", the CPU's where a GPU does not fit into the memory.

        With a cluster this process encodes nothing, and its engine is the CPU's.

        Raises:
            UsageError: there is no such engine or device.
            MachineError: the engine cannot run here; the message says what to install.
        """
        from ..planning.resources import make_resources  # it needs numpy, a refusal does not

        if self.ray is not None:
            return engines.load("cpu")
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

    def resources(self, tensors: int = 0, unit: int = GRANULE, merged: int = 0) -> Resources:
        """Return the number of threads and the sizes of their buffers for a run.

        Args:
            tensors: number of tensors whose plan is held in memory.
            unit: elements that are encoded together.
            merged: bytes of the largest matrix of an adapter, see `make_resources`.

        Raises:
            UsageError: the memory does not suffice, or `workers` is below 1.
        """
        from ..planning.resources import make_resources

        # With a cluster the threads and the memory are those of a task, not of this process.
        workers, memory = (self.workers, self.memory) if self.ray is None else (None, None)
        return make_resources(
            self.engine, workers, memory, processors(), tensors, max(unit, GRANULE), merged
        )
