"""A real GPU, driven through CuPy; no other module calls it."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MachineError, UsageError
from . import nvrtc
from .device import DeviceMemoryError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .protocol import U8

OLDEST_DRIVER = 12_000
"""The oldest CUDA version of a driver that the CuPy of our extras runs on.

1000 * major + 10 * minor, as cuDriverGetVersion returns it."""

_REFUSALS = (200, 209, 218, 222, 300)
"""The CUresults for code that a driver cannot load: invalid image, no binary for this GPU, invalid
PTX, PTX of a newer version, invalid source."""


@cache
def driver() -> tuple[int, int]:
    """Ask the driver for its GPUs and its CUDA version, without importing CuPy.

    Returns:
        (number of GPUs, CUDA version as 1000 * major + 10 * minor).

    Raises:
        MachineError: there is no driver, or no GPU that it can use.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise MachineError(
            f"there is no NVIDIA driver on this machine ({error}): install one from your system's "
            "packages, in a container start it with --gpus all, or use --engine cpu"
        ) from error
    count, version = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    status = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        text = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(text))
        reason = text.value.decode() if status and text.value else "it finds no GPU"
        raise MachineError(
            f"the NVIDIA driver finds no usable GPU ({reason}): check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or use --engine cpu"
        )
    return count.value, version.value


def _extra(version: int) -> str:
    """Return the extra of this package whose CuPy runs on a driver of this CUDA version."""
    return "nf4cli[cuda13]" if version >= 13_000 else "nf4cli[cuda12]"


def load_cupy() -> Any:
    """Import CuPy and return the module, if it can run on this machine's driver.

    Raises:
        MachineError: CuPy is missing, broken, or newer than the driver; or the driver is too old.
    """
    _, version = driver()
    cuda = f"CUDA {version // 1000}.{version % 1000 // 10}"
    if version < OLDEST_DRIVER:
        raise MachineError(
            f"the NVIDIA driver is too old: it runs {cuda}, the CUDA engine needs CUDA 12 or "
            "newer. Update the driver, or use --engine cpu"
        )
    install = f"pip install '{_extra(version)}'"
    if importlib.util.find_spec("cupy") is None:
        raise MachineError(f"the CUDA engine needs CuPy (the driver runs {cuda}): {install}")
    try:
        import cupy
    except ImportError as error:
        raise MachineError(
            f"CuPy is installed but cannot be imported ({error}): {install}"
        ) from error
    built = cupy.cuda.runtime.runtimeGetVersion()
    if built // 1000 > version // 1000:
        raise MachineError(
            f"the NVIDIA driver runs {cuda}, but CuPy was built for CUDA {built // 1000}: update "
            f"the driver, or pip uninstall {_distribution(built)} and {install}"
        )
    return cupy


def _distribution(built: int) -> str:
    """Return the name of the CuPy package that was built for this CUDA version."""
    return f"cupy-cuda{built // 1000}x"


def open_devices(indices: tuple[int, ...] | None) -> list[CupyDevice]:
    """Open the GPUs with these indices, None for all.

    Raises:
        UsageError: there is no such GPU.
        MachineError: the machine cannot use its GPUs; the message says what is missing.
    """
    count, _ = driver()
    wrong = [i for i in indices or () if i >= count]
    if wrong:
        existing = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UsageError(f"--device cuda:{wrong[0]}: this machine has {existing}")
    cupy = load_cupy()
    nvrtc.compiler()
    return [CupyDevice(cupy, i) for i in (range(count) if indices is None else indices)]


class CupyDevice:
    """The `Device` of a real GPU; see there for the methods.

    Args:
        cupy: the module.
        index: the GPU's number.

    Raises:
        MachineError: the GPU cannot be opened.
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._cupy = cupy
        self._index = index
        self._lock = threading.Lock()
        self._failures = (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError)
        self._kernels: dict[str, Any] = {}
        try:
            self.use()
            cupy.cuda.runtime.free(0)  # makes the context
            self.name = str(cupy.cuda.runtime.getDeviceProperties(index)["name"].decode())
            self.arch = str(cupy.cuda.Device(index).compute_capability)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise MachineError(
                f"GPU cuda:{index} cannot be used ({error}): check nvidia-smi, choose another with "
                "--device, or use --engine cpu"
            ) from error

    def use(self) -> None:
        """Make this GPU the current one of the calling thread, and leave it so.

        CuPy's `with Device(i)` would switch back to the earlier GPU, which is GPU 0 in a new
        thread, and would make a context there as well.
        """
        runtime = self._cupy.cuda.runtime
        if runtime.getDevice() != self._index:
            runtime.setDevice(self._index)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Use this GPU within the block.

        Raises:
            MachineError: the GPU failed, in this block or in earlier work that was still running.
        """
        try:
            self.use()
            yield
        except self._failures as error:
            raise MachineError(
                f"the GPU failed ({error}): check nvidia-smi and the system's log, or use "
                "--engine cpu"
            ) from error

    def allocate(self, nbytes: int) -> _Memory:
        with self.working():
            try:
                return _Memory(self._cupy.cuda.alloc(nbytes))
            except self._cupy.cuda.memory.OutOfMemoryError as error:
                raise DeviceMemoryError(str(error)) from error

    def host_buffer(self, nbytes: int) -> U8:
        cuda = self._cupy.cuda
        with self.working():
            try:  # CuPy's pool would round up to a power of two, and keep what is freed
                memory = cuda.PinnedMemory(max(1, nbytes), cuda.runtime.hostAllocPortable)
            except cuda.runtime.CUDARuntimeError as error:
                raise MachineError(
                    f"the system gives no {nbytes:,} bytes of pinned memory ({error}): lower "
                    "--workers or --memory, or raise the limit (ulimit -l)"
                ) from error
        # The array's base keeps the memory alive.
        return np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)

    def stream(self) -> _Stream:
        with self.working():
            return _Stream(self, self._cupy)

    def kernel(self, name: str) -> Any:
        """Return a kernel that can be called; compile and load it the first time.

        Args:
            name: its name in C++.

        Raises:
            MachineError: it cannot be compiled or loaded.
        """
        with self._lock:
            if name not in self._kernels:
                path, lowered = nvrtc.cubin(name, self.arch)
                with self.working():
                    try:
                        module = self._cupy.RawModule(path=str(path))
                        self._kernels[name] = module.get_function(lowered)
                    except self._cupy.cuda.driver.CUDADriverError as error:
                        if getattr(error, "status", None) not in _REFUSALS:
                            raise
                        version = ".".join(map(str, nvrtc.compiler().getVersion()))
                        raise MachineError(
                            f"the NVIDIA driver does not load the kernels that NVRTC {version} "
                            f"made for sm_{self.arch} ({error}): update the driver, or use "
                            "--engine cpu"
                        ) from error
            return self._kernels[name]


class _Memory:
    """The `Memory` of a real GPU."""

    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer  # CuPy frees the memory together with this object
        self.address = int(pointer.ptr)


class _Stream:
    """The `Stream` of a real GPU."""

    def __init__(self, device: CupyDevice, cupy: Any) -> None:
        self._device = device
        self._runtime = cupy.cuda.runtime
        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # A thread sleeps while it waits for this event; waiting for the stream would spin.
        self._done = cupy.cuda.Event(block=True, disable_timing=True)

    def upload(self, address: int, source: U8) -> None:
        kind = self._runtime.memcpyHostToDevice
        self._copy(address, source.ctypes.data, source.nbytes, kind)

    def download(self, target: U8, address: int) -> None:
        kind = self._runtime.memcpyDeviceToHost
        self._copy(target.ctypes.data, address, target.nbytes, kind)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._copy(target, source, nbytes, self._runtime.memcpyDeviceToDevice)

    def _copy(self, target: int, source: int, nbytes: int, kind: int) -> None:
        if nbytes:
            with self._device.working():
                self._runtime.memcpyAsync(target, source, nbytes, kind, self._stream.ptr)

    def launch(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[NDArray[Any]]
    ) -> None:
        function = self._device.kernel(kernel)
        with self._device.working(), self._stream:
            function((blocks,), (threads,), tuple(arguments))

    def synchronize(self) -> None:
        with self._device.working():
            self._done.record(self._stream)
            self._done.synchronize()

    def seconds(self, work: Callable[[], None], ahead: Callable[[], None]) -> float:
        with self._device.working():
            begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
            ahead()
            begin.record(self._stream)
            work()
            end.record(self._stream)
            end.synchronize()
            return float(self._cupy.cuda.get_elapsed_time(begin, end)) / 1000
