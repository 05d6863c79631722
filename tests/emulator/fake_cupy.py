"""The part of CuPy that cupy_device.py uses, over emulated memory: for tests of that module.

Everything here has the name, the arguments and the errors that CuPy's has
(tests/engines/test_cupy_device.py compares the names with the real ones).
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import cupy
import numpy as np

from nf4cli.engines.launches import Launch

from .build import Kernels
from .device import EmulatedMemory

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3  # cudaMemcpyKind


class FakeCupy:
    """Stands in for the module `cupy`.

    Args:
        kernels: what runs.
        names: the kernels in a cubin, by their names in there.
        memory: bytes of the device.
    """

    def __init__(self, kernels: Kernels, names: dict[str, str], memory: int = 1 << 26) -> None:
        self.kernels, self.names, self.free = kernels, names, memory
        self.calls: list[str] = []
        self.device: int | None = None  # that the thread uses
        self.stream: list[object] = []  # streams entered
        self.loaded: list[str] = []
        self.cuda = SimpleNamespace(
            Device=lambda index: SimpleNamespace(compute_capability="80"), Stream=self._stream,
            Event=self._event, get_elapsed_time=lambda a, b: b.at - a.at, alloc=self._alloc,
            PinnedMemory=self._pinned, PinnedMemoryPointer=lambda memory, offset: memory,
            memory=SimpleNamespace(OutOfMemoryError=cupy.cuda.memory.OutOfMemoryError),
            driver=SimpleNamespace(CUDADriverError=cupy.cuda.driver.CUDADriverError),
            runtime=SimpleNamespace(
                CUDARuntimeError=cupy.cuda.runtime.CUDARuntimeError, free=self._free,
                getDevice=lambda: self.device, setDevice=lambda i: setattr(self, "device", i),
                getDeviceProperties=lambda index: {"name": b"Fake GPU"}, hostAllocPortable=1,
                memcpyAsync=self._memcpy, memcpyHostToDevice=HOST_TO_DEVICE,
                memcpyDeviceToHost=DEVICE_TO_HOST, memcpyDeviceToDevice=DEVICE_TO_DEVICE,
            ),
        )  # fmt: skip
        self.fail: dict[str, Exception] = {}  # by the name of a call

    def RawModule(self, *, path: str) -> SimpleNamespace:  # noqa: N802 - CuPy's name
        self._called("RawModule")
        self.loaded.append(path)

        def get_function(lowered: str):
            kernel = self.names[lowered]

            def call(grid: tuple[int], block: tuple[int], args: tuple) -> None:
                assert self.device == 0, "a launch outside of the device"
                assert len(self.stream) == 1, "a launch on the default stream"
                assert all(isinstance(a, np.ndarray) and a.size == 1 for a in args)
                self.kernels.run(Launch(kernel, grid[0], block[0], args))

            return call

        return SimpleNamespace(get_function=get_function)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def _free(self, pointer: int) -> None:
        self._called("free")
        assert self.device is not None

    def _alloc(self, nbytes: int) -> SimpleNamespace:
        assert self.device is not None
        if nbytes > self.free:
            raise cupy.cuda.memory.OutOfMemoryError(nbytes, 0)
        memory = EmulatedMemory(nbytes)
        return SimpleNamespace(ptr=memory.address, memory=memory)

    def _pinned(self, nbytes: int, flags: int) -> bytearray:
        self._called("PinnedMemory")
        assert flags == 1  # for all GPUs
        return bytearray(nbytes)

    def _stream(self, non_blocking: bool = False) -> FakeStream:
        assert non_blocking
        assert self.device is not None
        return FakeStream(self)

    def _event(self, block: bool = False, disable_timing: bool = False) -> SimpleNamespace:
        event = SimpleNamespace(at=0.0)
        event.record = lambda stream: setattr(event, "at", float(len(self.calls)))
        event.synchronize = lambda: self._called("synchronize") if block else None
        return event

    def _memcpy(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self._called("memcpyAsync")
        assert stream == 77
        assert self.device is not None
        ctypes.memmove(target, source, nbytes)


class FakeStream:
    ptr = 77

    def __init__(self, owner: FakeCupy) -> None:
        self._owner = owner

    def __enter__(self):
        self._owner.stream.append(self)
        return self

    def __exit__(self, *_):
        self._owner.stream.pop()
