"""An emulated GPU that is as unkind as a real one may be.

Nothing asked of a stream happens before somebody waits for it, device memory is full of garbage and
has guards around it, and only pinned host memory can be copied.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import ClassVar

import numpy as np

from nf4cli.engines.device import DeviceMemoryError
from nf4cli.engines.launches import Launch

from .build import Kernels

_GUARD = 4096
_GARBAGE, _FENCE = 0xA5, 0x5C


class EmulatedDevice:
    """See `nf4cli.engines.device.Device`.

    Args:
        kernels: what runs on it.
        memory: bytes it has.
    """

    arch = "80"
    pinned: ClassVar[dict[int, int]] = {}
    """First byte -> the one behind the last of all pinned memory, which serves every GPU."""

    def __init__(self, kernels: Kernels, memory: int = 1 << 30, name: str = "emulated GPU") -> None:
        self.kernels = kernels
        self.name = name
        self.free = memory
        self.launched: list[Launch] = []
        self.streams: list[EmulatedStream] = []
        self.blocks: list[EmulatedMemory] = []

    def allocate(self, nbytes: int) -> EmulatedMemory:
        if nbytes > self.free:
            raise DeviceMemoryError(f"{nbytes} bytes wanted, {self.free} there")
        self.free -= nbytes
        self.blocks.append(EmulatedMemory(nbytes))
        return self.blocks[-1]

    def host_buffer(self, nbytes: int) -> np.ndarray:
        array = np.full(nbytes, _GARBAGE, np.uint8)
        self.pinned[array.ctypes.data] = array.ctypes.data + nbytes
        weakref.finalize(array, self.pinned.pop, array.ctypes.data, None)
        return array

    def is_pinned(self, array: np.ndarray) -> bool:
        start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
        return any(a <= start and stop <= b for a, b in list(self.pinned.items()))

    def stream(self) -> EmulatedStream:
        self.streams.append(EmulatedStream(self))
        return self.streams[-1]


class EmulatedMemory:
    def __init__(self, nbytes: int) -> None:
        self._bytes = np.full(nbytes + 2 * _GUARD, _FENCE, np.uint8)
        skip = -(self._bytes.ctypes.data + _GUARD) % 256 + _GUARD
        self._inside = slice(skip, skip + nbytes)
        self._bytes[self._inside] = _GARBAGE
        self.address = self._bytes.ctypes.data + skip

    def check(self) -> None:
        """Nobody wrote around it."""
        before, after = self._bytes[: self._inside.start], self._bytes[self._inside.stop :]
        assert (before == _FENCE).all(), "a kernel wrote in front of device memory"
        assert (after == _FENCE).all(), "a kernel wrote behind device memory"


class WatchedStream:
    """What the tests' streams have in common, over an emulated device and over a real one."""

    waiting = None
    """A function that every `synchronize` calls first, for tests that look at the schedule."""


class EmulatedStream(WatchedStream):
    """See `nf4cli.engines.device.Stream`."""

    def __init__(self, device: EmulatedDevice) -> None:
        self._device = device
        self._work: list[Callable[[], None]] = []
        self._owner: int | None = None

    def upload(self, address: int, source: np.ndarray) -> None:
        self._host(source)
        self._later(lambda: np.copyto(_at(address, source.nbytes), source))

    def download(self, target: np.ndarray, address: int) -> None:
        self._host(target)
        self._later(lambda: np.copyto(target, _at(address, target.nbytes)))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._later(lambda: np.copyto(_at(target, nbytes), _at(source, nbytes)))

    def launch(self, kernel, blocks, threads, arguments) -> None:
        assert blocks > 0
        launch = Launch(kernel, blocks, threads, tuple(arguments))
        self._device.launched.append(launch)
        self._later(lambda: self._device.kernels.run(launch))

    def synchronize(self) -> None:
        if self.waiting is not None:
            self.waiting()
        work, self._work = self._work, []
        for step in work:
            step()
        for block in self._device.blocks:
            block.check()
        self._owner = None

    def seconds(self, work: Callable[[], None], ahead: Callable[[], None]) -> float:
        ahead()
        self.synchronize()
        work()
        start = time.perf_counter()
        self.synchronize()
        return time.perf_counter() - start

    def _later(self, step: Callable[[], None]) -> None:
        me = threading.get_ident()
        assert self._owner in (None, me), "two threads share a stream"
        self._owner = me
        self._work.append(step)

    def _host(self, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        assert self._device.is_pinned(array), "a copy from or to pageable memory"


def _at(address: int, nbytes: int) -> np.ndarray:
    import ctypes

    if not nbytes:
        return np.empty(0, np.uint8)
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
