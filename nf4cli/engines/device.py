"""What the CUDA engine asks of a GPU: memory, streams, kernels.

Small on purpose: cupy_device.py is the real one, and the tests put an emulated one in its place,
under the real command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .protocol import U8


class DeviceMemoryError(Exception):
    """The GPU has no room for an allocation; internal, the engine takes less and goes on."""


class Memory(Protocol):
    """Device memory, freed when the object goes.

    Attributes:
        address: of its first byte, a multiple of 256.
    """

    address: int


class Stream(Protocol):
    """Work for one GPU, done in order, without waiting for other streams.

    Host arrays are pinned (`Device.host_buffer`) and must live until `synchronize`.
    """

    def upload(self, address: int, source: U8) -> None:
        """Copy `source` (contiguous) to device memory."""
        ...

    def download(self, target: U8, address: int) -> None:
        """Copy device memory into `target` (contiguous)."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within device memory."""
        ...

    def launch(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[NDArray[Any]]
    ) -> None:
        """Run a kernel of cuda/gpu_kernels.cu.

        Args:
            kernel: as C++ names it, "nested_quantize<false>".
            blocks: at least 1.
            arguments: one array of a single element a parameter, of the parameter's size.

        Raises:
            MachineError: it cannot be compiled or loaded.
        """
        ...

    def synchronize(self) -> None:
        """Wait until everything asked of this stream is done.

        Raises:
            MachineError: something of it failed.
        """
        ...

    def seconds(self, work: Callable[[], None], ahead: Callable[[], None]) -> float:
        """How long the GPU takes for what `work` asks of this stream, by its own clock.

        Args:
            ahead: asks for something long first, so that the GPU does not wait for the host.
        """
        ...


class Device(Protocol):
    """One GPU; every method is thread-safe.

    Attributes:
        name: "NVIDIA H100 80GB HBM3".
        arch: compute capability, "90".
    """

    name: str
    arch: str

    def allocate(self, nbytes: int) -> Memory:
        """Device memory.

        Raises:
            DeviceMemoryError: there is not enough.
        """
        ...

    def host_buffer(self, nbytes: int) -> U8:
        """Pinned host memory, freed with the array.

        Raises:
            MachineError: the system gives none.
        """
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...
