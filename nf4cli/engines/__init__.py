"""The engines: same inputs, same bytes, on whatever the machine has.

An engine is chosen once for a run, named in the output and the manifest, and never exchanged
behind the user's back.  All buffers are flat, contiguous, host-side NumPy arrays; 16-bit floats
travel as raw bytes.
"""

from __future__ import annotations

import re

from ..callbacks import Notify, no_notice
from ..errors import MachineError, UsageError
from .protocol import Engine

NAMES = ("auto", "cpu", "cuda", "torch")


def load(name: str, device: str | None = None, notify: Notify = no_notice) -> Engine:
    """The engine called `name`; "auto" takes the fastest that this machine has.

    Args:
        device: "cuda" for all GPUs, "cuda:1" or "cuda:0,1" for these (engines auto and cuda; None
            takes the first); a torch device for the engine torch.

    Raises:
        UsageError: no engine is called so, or there is no such device.
        MachineError: it cannot run here; the message says what to install.
    """
    if name not in NAMES:
        raise UsageError(f"no engine is called {name!r}: choose one of {', '.join(NAMES)}")
    if name == "torch":
        from .torch import TorchEngine

        return TorchEngine(device or "cpu")
    on_gpu = device is not None and device != "cpu"
    if name == "cpu" and on_gpu:
        raise UsageError(f"--device {device} is not for the engine cpu: use --engine cuda")
    if name == "cuda" or (name == "auto" and on_gpu):
        return _cuda(device, notify)
    if name == "auto" and device is None and (engine := _cuda_if_usable(notify)) is not None:
        return engine
    from .cpu import CpuEngine

    return CpuEngine()


def _cuda(device: str | None, notify: Notify) -> Engine:
    match = re.fullmatch(
        r"cuda(?::(\d{1,4}(?:,\d{1,4})*))?", "cuda:0" if device is None else device
    )
    if match is None:
        raise UsageError(f"--device {device!r} is not one: write cuda, cuda:1 or cuda:0,1")
    from .cuda import CudaEngine

    indices = tuple(dict.fromkeys(map(int, match[1].split(",")))) if match[1] else None
    engine = CudaEngine(indices, notify=notify)
    engine.try_out()
    return engine


def _cuda_if_usable(notify: Notify) -> Engine | None:
    """The CUDA engine, where there is a driver with a GPU and nothing else is missing."""
    from .cupy_device import driver

    try:
        driver()
    except MachineError:
        return None  # no GPU: nothing to tell
    try:
        return _cuda(None, notify)
    except MachineError as error:
        notify(f"a GPU is here, but is not used: {error}")
        return None
