"""The engines: quantization and its inverse on the CPU, on GPUs, or in torch, with equal bytes.

An engine is chosen once for a run and never replaced by another one behind the user's back.  The
command line and `--json` name it; the output does not, since its bytes do not depend on the engine.
All buffers are flat, contiguous NumPy arrays in host memory; 16-bit floats travel as raw bytes.
"""

from __future__ import annotations

import re

from ..callbacks import Notify, no_notice
from ..errors import MachineError, UsageError
from .protocol import Engine

NAMES = ("auto", "cpu", "cuda", "torch")


def load(name: str, device: str | None = None, notify: Notify = no_notice) -> Engine:
    """Return the engine called `name`; "auto" takes the fastest one that this machine has.

    Args:
        name: one of NAMES.
        device: for the engines auto and cuda: "cuda" for all GPUs, "cuda:1" or "cuda:0,1" for
            some, None for the first one; auto also takes "cpu".  For the engine torch: a torch
            device, None for the CPU.
        notify: called when a GPU is there but cannot be used, or is short of memory.

    Raises:
        UsageError: there is no engine of this name, or no such device.
        MachineError: the engine cannot run on this machine; the message says what to install.
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
    """Return the CUDA engine on the GPUs of `device`, after a trial run; None is the first GPU."""
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
    """Return the CUDA engine, or None if this machine lacks a GPU or what a GPU needs."""
    from .cupy_device import driver

    try:
        driver()
    except MachineError:
        return None  # without a GPU there is nothing to notify of
    try:
        return _cuda(None, notify)
    except MachineError as error:
        notify(f"a GPU is here, but is not used: {error}")
        return None
