"""A real GPU in the place of the emulated one: pytest --real-gpu.

It is the package's own `CupyDevice`; what stands around it only records what is asked of it, and
lets a test say how much memory it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nf4cli.engines import cupy_device
from nf4cli.engines.device import Device, DeviceMemoryError, Memory, Stream
from nf4cli.engines.launches import Launch

from .device import WatchedStream


class RecordingDevice:
    """See `nf4cli.engines.device.Device`.

    Args:
        device: what does the work; several of these may share one.
        memory: bytes that a test says it has.
        name: as tests tell devices apart.

    Attributes:
        launched: every launch so far.
        streams: every stream so far.
    """

    def __init__(self, device: Device, memory: int = 1 << 30, name: str = "real GPU") -> None:
        self.device = device
        self.name, self.arch = name, device.arch
        self.free = memory
        self.launched: list[Launch] = []
        self.streams: list[RecordingStream] = []

    def allocate(self, nbytes: int) -> Memory:
        if nbytes > self.free:
            raise DeviceMemoryError(f"{nbytes} bytes wanted, {self.free} there")
        self.free -= nbytes
        return self.device.allocate(nbytes)

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return self.device.host_buffer(nbytes)

    def stream(self) -> RecordingStream:
        self.streams.append(RecordingStream(self, self.device.stream()))
        return self.streams[-1]


class RecordingStream(WatchedStream):
    """See `nf4cli.engines.device.Stream`."""

    def __init__(self, owner: RecordingDevice, stream: Stream) -> None:
        self._owner, self._stream = owner, stream

    def upload(self, address: int, source: np.ndarray) -> None:
        self._stream.upload(address, source)

    def download(self, target: np.ndarray, address: int) -> None:
        self._stream.download(target, address)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._stream.copy(target, source, nbytes)

    def launch(self, kernel: str, blocks: int, threads: int, arguments: Sequence) -> None:
        self._owner.launched.append(Launch(kernel, blocks, threads, tuple(arguments)))
        self._stream.launch(kernel, blocks, threads, arguments)

    def synchronize(self) -> None:
        if self.waiting is not None:
            self.waiting()
        self._stream.synchronize()

    def seconds(self, work: Callable[[], None], ahead: Callable[[], None]) -> float:
        return self._stream.seconds(work, ahead)


class DeviceKernels:
    """Kernels on a device, one launch after another, each array in memory of exactly its size.

    The counterpart of `build.Kernels`, whose arrays lie where the kernels look for them.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._stream = device.stream()
        self._there: list[tuple[np.ndarray, np.ndarray, Memory]] = []

    def address(self, array: np.ndarray) -> int:
        """Return where a copy of an array lies on the device until `finish`."""
        flat = array.reshape(-1).view(np.uint8)
        staged = self._device.host_buffer(flat.nbytes)
        staged[:] = flat
        memory = self._device.allocate(flat.nbytes)
        self._stream.upload(memory.address, staged)
        self._there.append((flat, staged, memory))
        return memory.address

    def run(self, launch: Launch) -> None:
        """Ask for one launch."""
        self._stream.launch(launch.kernel, launch.blocks, launch.threads, launch.arguments)

    def finish(self) -> None:
        """Wait, bring every array that can be written back, and free the copies."""
        for _, staged, memory in self._there:
            self._stream.download(staged, memory.address)
        self._stream.synchronize()
        for array, staged, _ in self._there:
            if array.flags.writeable:
                array[:] = staged
        self._there.clear()


def open_gpu() -> Device:
    """Return the first GPU, through CuPy.

    Raises:
        MachineError: there is none that can be used.
    """
    return cupy_device.open_devices((0,))[0]


def bare_kernels() -> DeviceKernels:
    """Return the kernels on the first GPU, its memory from the driver and not from a pool.

    So a sanitizer sees where an array ends.
    """
    cupy_device.load_cupy().cuda.set_allocator(None)
    return DeviceKernels(open_gpu())
