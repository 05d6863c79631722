"""The protocols of a GPU, as the CUDA engine uses it: memory, streams, kernels.

They are small on purpose.  cupy_device.py implements them for a real GPU; the tests run the whole
command line with an emulated one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .protocol import U8


class DeviceMemoryError(Exception):
    """The GPU has no memory for an allocation.

    Internal: the engine tries again with less.
    """


class Memory(Protocol):
    """Device memory, freed together with the object.

    Attributes:
        address: device address of the first byte, a multiple of 256.
    """

    address: int


class Stream(Protocol):
    """A queue of work for one GPU, which is done in order and does not wait for other streams.

    Methods return before the work is done; an error may be raised by a later call.  Host arrays are
    pinned (`Device.host_buffer`), contiguous, and must live until `synchronize`.
    """

    def upload(self, address: int, source: U8) -> None:
        """Copy `source` to device memory at `address`."""
        ...

    def download(self, target: U8, address: int) -> None:
        """Copy device memory at `address` into `target`."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy bytes from one device address to another."""
        ...

    def launch(
        self, kernel: str, blocks: int, threads: int, arguments: Sequence[NDArray[Any]]
    ) -> None:
        """Run a kernel of cuda/gpu_kernels.cu.

        Args:
            kernel: its name in C++, "nested_quantize<false>".
            blocks: CUDA blocks, at least 1.
            threads: threads of each CUDA block.
            arguments: for each parameter an array of one element, of the parameter's size.

        Raises:
            MachineError: the kernel cannot be compiled or loaded.
        """
        ...

    def synchronize(self) -> None:
        """Wait until all work of this stream is done.

        Raises:
            MachineError: some of the work failed.
        """
        ...

    def seconds(self, work: Callable[[], None], ahead: Callable[[], None]) -> float:
        """Measure by the GPU's own clock how long it takes for the work queued by `work`.

        Args:
            work: calls methods of this stream.
            ahead: queues something long first, so that the GPU never waits for the host.

        Returns:
            Seconds.
        """
        ...


class Device(Protocol):
    """One GPU; every method is thread-safe.

    Attributes:
        name: the product ("NVIDIA H100 80GB HBM3").
        arch: the compute capability without its point ("90").
    """

    name: str
    arch: str

    def allocate(self, nbytes: int) -> Memory:
        """Return `nbytes` of device memory.

        Raises:
            DeviceMemoryError: there is not enough.
        """
        ...

    def host_buffer(self, nbytes: int) -> U8:
        """Return pinned host memory, uint8 [nbytes], freed together with the array.

        Raises:
            MachineError: the system gives none.
        """
        ...

    def stream(self) -> Stream:
        """Return a new stream."""
        ...
