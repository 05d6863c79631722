"""One nf4 command in this process, and where its time goes: converting.py [--apart] -- ARGUMENTS...

Prints, as the last line, JSON: the seconds that threads spent in reading, digesting, encoding,
writing, each by the wall and by the processor. With --apart every copy and kernel of a GPU is
waited for on its own, so that the time of each kind is known; one worker makes sense then.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from nf4cli import cli
from nf4cli.checkpoint.digest import FileDigest, TensorDigests
from nf4cli.checkpoint.reader import ByteReader
from nf4cli.checkpoint.writer import ShardWriter
from nf4cli.convert.items import AbsmaxFile
from nf4cli.engines import cuda
from nf4cli.engines.cpu import CpuEngine
from nf4cli.engines.cuda import CudaEngine

WATCHED = (
    (ByteReader, "read_into", "read"),
    (FileDigest, "update", "digest"),
    (TensorDigests, "update", "digest"),
    (CudaEngine, "quantize", "encode"),
    (CpuEngine, "quantize", "encode"),
    (CudaEngine, "nested_quantize", "double quantization"),
    (CpuEngine, "nested_quantize", "double quantization"),
    (CpuEngine, "sum", "double quantization"),
    (AbsmaxFile, "write", "double quantization"),
    (ShardWriter, "write", "write"),
)


class Clock:
    """Seconds by what they were spent on, added up over threads."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._lock = threading.Lock()
        self._inside = threading.local()

    def spent(self, label: str, wall: float, cpu: float) -> None:
        with self._lock:
            self.wall[label] = self.wall.get(label, 0.0) + wall
            self.cpu[label] = self.cpu.get(label, 0.0) + cpu

    def watch(self, owner: type, name: str, label: str) -> None:
        """Have every call of a method counted, those inside of another watched one with that."""
        if name not in vars(owner):
            return
        real: Callable[..., Any] = getattr(owner, name)

        def timed(*arguments: Any, **named: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return real(*arguments, **named)
            self._inside.yes = True
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return real(*arguments, **named)
            finally:
                self._inside.yes = False
                self.spent(label, time.perf_counter() - wall, time.thread_time() - cpu)

        setattr(owner, name, timed)


class ApartDevice:
    """A device whose streams are waited for after everything that is asked of them."""

    def __init__(self, device: Any, clock: Clock) -> None:
        self._device, self._clock = device, clock
        self.name, self.arch = device.name, device.arch

    def allocate(self, nbytes: int) -> Any:
        return self._device.allocate(nbytes)

    def host_buffer(self, nbytes: int) -> Any:
        return self._device.host_buffer(nbytes)

    def stream(self) -> ApartStream:
        return ApartStream(self._device.stream(), self._clock)


class ApartStream:
    """See `ApartDevice`."""

    def __init__(self, stream: Any, clock: Clock) -> None:
        self._stream, self._clock = stream, clock

    def upload(self, address: int, source: Any) -> None:
        self._apart("copies to the GPU", lambda: self._stream.upload(address, source))

    def download(self, target: Any, address: int) -> None:
        self._apart("copies from the GPU", lambda: self._stream.download(target, address))

    def launch(self, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        label = "kernel " + kernel.partition("<")[0]
        self._apart(label, lambda: self._stream.launch(kernel, blocks, threads, arguments))

    def synchronize(self) -> None:
        self._stream.synchronize()

    def _apart(self, label: str, work: Callable[[], None]) -> None:
        self._stream.synchronize()
        wall, cpu = time.perf_counter(), time.thread_time()
        work()
        self._stream.synchronize()
        self._clock.spent(label, time.perf_counter() - wall, time.thread_time() - cpu)


def main() -> None:
    at = sys.argv.index("--")
    clock = Clock()
    for watched in WATCHED:
        clock.watch(*watched)
    if "--apart" in sys.argv[:at]:
        real = cuda.open_devices
        cuda.open_devices = lambda indices: [ApartDevice(d, clock) for d in real(indices)]
    sys.argv = ["nf4", *sys.argv[at + 1 :]]
    try:
        cli.main()
    finally:
        print(json.dumps({"wall": clock.wall, "cpu": clock.cpu}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--emulate":  # LIBRARY: the dry run
        from part_check import emulate

        emulate(sys.argv[2])
        del sys.argv[1:3]
    main()
