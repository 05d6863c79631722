"""The engines: same inputs, same bytes, on whatever the machine has.

An engine is chosen once for a run, named in the output and the manifest, and never exchanged
behind the user's back.  All buffers are flat, contiguous, host-side NumPy arrays; 16-bit floats
travel as raw bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ..errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    U8 = NDArray[np.uint8]
    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]

GRANULE = 65_536
"""Elements that share one row of error sums.  Work is split at multiples of it, so that the sums,
like the bytes, do not depend on how a tensor was cut into chunks."""

NAMES = ("auto", "cpu", "torch")


class Engine(Protocol):
    """What every engine does.  Each method is thread-safe.

    Dtypes are safetensors names: "F32", "F16", "BF16".
    """

    name: str
    """What it is, for the output and the manifest: "cpu (avx512)"."""

    def quantize(
        self, src: U8, dtype: str, blocksize: int, quant_type: str, packed: U8, absmax: F32
    ) -> F64:
        """Encode n elements in blocks, each under its own largest magnitude.

        Args:
            src: raw bytes of n elements of `dtype`; the whole tensor, or a part of it that
                starts at a multiple of GRANULE elements and, unless it is the last part, holds
                a multiple of GRANULE elements.
            packed: out, (n+1)//2 bytes, the first element in the high nibble.
            absmax: out, ceil(n/blocksize) elements.

        Returns:
            float64 [ceil(n/GRANULE), 3]: sum of squared error, sum of squared value, largest
            error, each against the value decoded with the block's own float32 absmax.

        Raises:
            NonFiniteError: src holds a NaN or an infinity.
        """
        ...

    def dequantize(
        self, packed: U8, n: int, blocksize: int, quant_type: str, absmax: F32, dtype: str, out: U8
    ) -> None:
        """The inverse: n elements of `dtype` into `out` (raw bytes)."""
        ...

    def sum(self, values: F32, carry: float) -> float:
        """carry + values[0] + values[1] + ... in float64, in this order."""
        ...

    def nested_quantize(self, absmax: F32, offset: float, codes: U8, nested_absmax: F32) -> None:
        """Double quantization of (absmax - offset) in runs of 256.

        Args:
            absmax: n elements; a multiple of 256 unless it ends the vector.
            offset: a float32 value.
            codes: out, n bytes.
            nested_absmax: out, ceil(n/256) elements.
        """
        ...

    def nested_dequantize(
        self,
        codes: U8,
        nested_blocksize: int,
        nested_map: F32,
        nested_absmax: F32,
        offset: float,
        out: F32,
    ) -> None:
        """The inverse: nested_map[codes[i]] * nested_absmax[i // nested_blocksize] + offset."""
        ...

    def cast(self, src: U8, from_dtype: str, dst: U8, to_dtype: str) -> None:
        """Round every element of src (raw bytes) to `to_dtype`, to nearest even.

        Raises:
            NonFiniteError: a finite value became infinite.
        """
        ...

    def decode_float8(
        self, src: U8, first: int, columns: int, scale: F32, block: tuple[int, int],
        dst: U8, to_dtype: str,
    ) -> None:  # fmt: skip
        """Float8 e4m3 with scales: value * scale in float32, rounded once to `to_dtype`.

        Args:
            src: elements [first, first + n) of a row-major matrix of `columns` columns.
            scale: [ceil(rows/block[0]), ceil(columns/block[1])], flat, one a block.
            dst: out, n elements of `to_dtype` (raw bytes).

        Raises:
            NonFiniteError: a result is NaN or infinite.
        """
        ...


def load(name: str) -> Engine:
    """The engine called `name`; "auto" takes the fastest that this machine has.

    Raises:
        UsageError: no engine is called so.
        MachineError: it cannot run here; the message says what to install.
    """
    if name in ("auto", "cpu"):
        from .cpu import CpuEngine

        return CpuEngine()
    if name == "torch":
        from .torch import TorchEngine

        return TorchEngine()
    raise UsageError(f"no engine is called {name!r}: choose one of {', '.join(NAMES)}")
