"""A real GPU, through CuPy: the only module that talks to it."""

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
"""The oldest CUDA version, as cuDriverGetVersion has it, that a CuPy of our extras runs on."""


_REFUSALS = (200, 209, 218, 222, 300)
"""CUresults of code that a driver cannot load: invalid image, no binary, invalid or newer PTX."""


@cache
def driver() -> tuple[int, int]:
    """(GPUs, CUDA version of the driver as 1000 * major + 10 * minor), without importing CuPy.

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
    """The extra whose CuPy runs on this driver."""
    return "nf4cli[cuda13]" if version >= 13_000 else "nf4cli[cuda12]"


def load_cupy() -> Any:
    """CuPy, when it can run on this machine's driver.

    Raises:
        MachineError: it is missing, broken, or newer than the driver.
    """
    _, version = driver()
    found = f"CUDA {version // 1000}.{version % 1000 // 10}"
    if version < OLDEST_DRIVER:
        raise MachineError(
            f"the NVIDIA driver is too old: it runs {found}, the CUDA engine needs CUDA 12 or "
            "newer. Update the driver, or use --engine cpu"
        )
    install = f"pip install '{_extra(version)}'"
    if importlib.util.find_spec("cupy") is None:
        raise MachineError(f"the CUDA engine needs CuPy (the driver runs {found}): {install}")
    try:
        import cupy
    except ImportError as error:
        raise MachineError(
            f"CuPy is installed but cannot be imported ({error}): {install}"
        ) from error
    built = cupy.cuda.runtime.runtimeGetVersion()
    if built // 1000 > version // 1000:
        raise MachineError(
            f"the NVIDIA driver runs {found}, but CuPy was built for CUDA {built // 1000}: update "
            f"the driver, or pip uninstall {_distribution(built)} and {install}"
        )
    return cupy


def _distribution(built: int) -> str:
    return f"cupy-cuda{built // 1000}x"


def open_devices(indices: tuple[int, ...] | None) -> list[CupyDevice]:
    """The GPUs of these indices, or all of them.

    Raises:
        UsageError: there is no such GPU.
        MachineError: the machine cannot use its GPUs; the message says what is missing.
    """
    count, _ = driver()
    wrong = [i for i in indices or () if i >= count]
    if wrong:
        there = "only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise UsageError(f"--device cuda:{wrong[0]}: this machine has {there}")
    cupy = load_cupy()
    nvrtc.compiler()
    return [CupyDevice(cupy, i) for i in (range(count) if indices is None else indices)]


class CupyDevice:
    """See `Device`.

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
        """Make this GPU the calling thread's.

        It stays so: CuPy's `with Device(i)` goes back to the one before, GPU 0 in a new thread,
        and makes a context there, too.
        """
        runtime = self._cupy.cuda.runtime
        if runtime.getDevice() != self._index:
            runtime.setDevice(self._index)

    @contextmanager
    def working(self) -> Iterator[None]:
        """On this GPU; what fails there, maybe of earlier work, is the machine's fault."""
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
            try:  # not from CuPy's pool, which rounds up to a power of two and keeps what it had
                memory = cuda.PinnedMemory(max(1, nbytes), cuda.runtime.hostAllocPortable)
            except cuda.runtime.CUDARuntimeError as error:
                raise MachineError(
                    f"the system gives no {nbytes:,} bytes of pinned memory ({error}): lower "
                    "--workers or --memory, or raise the limit (ulimit -l)"
                ) from error
        # holds the memory: its base
        return np.frombuffer(cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)

    def stream(self) -> _Stream:
        with self.working():
            return _Stream(self, self._cupy)

    def kernel(self, name: str) -> Any:
        """A compiled kernel, ready to be called.

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
    def __init__(self, pointer: Any) -> None:
        self._pointer = pointer  # CuPy frees what it points to with it
        self.address = int(pointer.ptr)


class _Stream:
    """See `Stream`."""

    def __init__(self, device: CupyDevice, cupy: Any) -> None:
        self._device = device
        self._runtime = cupy.cuda.runtime
        self._cupy = cupy
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # Waiting for it sleeps; waiting for a stream would keep a processor busy.
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
