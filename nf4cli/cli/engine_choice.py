"""Read the options that choose the engine, threads and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import parse_size

if TYPE_CHECKING:
    from ..api.machine import Machine
    from ..convert.listener import Listener


def machine(
    engine: str, device: str | None, workers: int | None, memory: str | None, listener: Listener,
    ray: str | None = None,
) -> Machine:  # fmt: skip
    """Return the engine and limits that the options ask for.

    Args:
        ray: address of a cluster, for commands that can use one.

    Raises:
        UsageError: the memory is no size.
    """
    from ..api.machine import Machine

    bound = None if memory is None else parse_size(memory, "--memory")
    return Machine(engine, device, workers, bound, listener, ray)
