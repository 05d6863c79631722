"""The engine and the resources that a command line asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .options import parse_size

if TYPE_CHECKING:
    from ..api.machine import Machine
    from ..convert.listener import Listener


def machine(
    engine: str, device: str | None, workers: int | None, memory: str | None, listener: Listener
) -> Machine:
    """Return what the options say of this machine.

    Raises:
        UsageError: the memory is no size.
    """
    from ..api.machine import Machine

    bound = None if memory is None else parse_size(memory, "--memory")
    return Machine(engine, device, workers, bound, listener)
