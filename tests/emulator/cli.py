"""The real nf4 command on emulated GPUs: python -m emulator.cli LIBRARY:... GPUS MEMORY nf4 ...

"gpu" in place of the libraries is the GPU that is here, as many times as there are to be GPUs.

Prints, as the last line of stderr, what the GPUs did.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nf4cli import cli
from nf4cli.engines import cuda, cupy_device

from .build import Kernels
from .device import EmulatedDevice
from .real import RecordingDevice, open_gpu


def main() -> None:
    gpus, memory = int(sys.argv[2]), int(sys.argv[3])
    devices: list[Any]
    if sys.argv[1] == "gpu":
        gpu = open_gpu()
        devices = [RecordingDevice(gpu, memory, f"GPU {i}") for i in range(gpus)]
    else:
        kernels = Kernels(*map(Path, sys.argv[1].split(":")))
        devices = [EmulatedDevice(kernels, memory, f"GPU {i}") for i in range(gpus)]
    cupy_device.driver = lambda: (gpus, 13_000)
    cuda.open_devices = lambda indices: [devices[i] for i in indices or range(gpus)]
    sys.argv = ["nf4", *sys.argv[4:]]
    try:
        cli.main()
    finally:
        counts = {device.name: len(device.launched) for device in devices if device.launched}
        print(f"launched: {counts}", file=sys.stderr)


if __name__ == "__main__":
    main()
