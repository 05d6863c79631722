"""What every engine does, and what it is given: buffers, factors, importance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..format.codebook import Ladder

    U8 = NDArray[np.uint8]
    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]

GRANULE = 65_536
"""Elements that share one row of error sums.  Work is split at multiples of it, so that the sums,
like the bytes, do not depend on how a tensor was cut into chunks."""

STATS = 4
"""Figures in such a row, see `Engine.quantize`."""

OUTLIERS = 3
"""Which of them counts outlier blocks."""

ROW, SEGMENT = 16, 64
"""How error sums are added up: interleaved partial sums, and the elements they run over."""

DTYPE_CODES = {"F32": 0, "F16": 1, "BF16": 2}
"""Element types as native code numbers them.

cuda/codec.h holds all of these as well; tests/engines/test_native_constants.py has them
compared."""


@dataclass(frozen=True, slots=True)
class Float8:
    """What turns float8 e4m3 bytes into values: where they lie in their matrix, and its factors.

    Attributes:
        first: elements of the row-major matrix before them.
        columns: of the matrix.
        scale: float32 [ceil(rows/block[0]), ceil(columns/block[1])], flat, one a block.
        block: (rows, columns) of elements that share a factor.
    """

    first: int
    columns: int
    scale: F32
    block: tuple[int, int]

    def from_(self, start: int) -> Float8:
        """The same, `start` elements further on."""
        return replace(self, first=self.first + start)


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """An absmax vector as double quantization left it.

    Attributes:
        codes: uint8, from the start of a run on.
        skip: codes before the first that is meant.
        blocksize: codes that share an entry of `absmax`.
        map: float32 [256].
        absmax: float32 [ceil(codes/blocksize)].
        offset: a float32 value.
    """

    codes: U8
    skip: int
    blocksize: int
    map: F32
    absmax: F32
    offset: float


@dataclass(frozen=True, slots=True)
class Importance:
    """How much an error in each input column of a weight's matrix costs.

    Attributes:
        columns: float32 [columns of the matrix].
        first: elements of the row-major matrix before those at hand.
    """

    columns: F32
    first: int


class Engine(Protocol):
    """What every engine does.  Each method is thread-safe.

    Dtypes are safetensors names: "F32", "F16", "BF16".
    """

    name: str
    """What it is, for the output and the manifest: "cpu (avx512)"."""

    spare_threads: int
    """Threads beyond one a processor that it can keep busy (they wait for a GPU)."""

    extra_memory: int
    """Bytes of host memory that it takes beyond what the CPU engine does, whoever calls it."""

    worker_memory: int
    """Bytes of host memory that it takes for a thread that calls it, beside `buffer`s."""

    def buffer(self, nbytes: int) -> U8:
        """Host memory, not initialised, that the engine reads and writes without detours."""
        ...

    def quantize(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        packed: U8,
        absmax: F32,
        float8: Float8 | None = None,
    ) -> F64:
        """Encode n elements in blocks, each under its own largest magnitude.

        Args:
            src: raw bytes of n elements of `dtype`; the whole tensor, or a part of it that
                starts at a multiple of GRANULE elements and, unless it is the last part, holds
                a multiple of GRANULE elements.
            float8: src is n float8 bytes, decoded to `dtype` first (see `decode_float8`).
            packed: out, (n+1)//2 bytes, the first element in the high nibble.
            absmax: out, ceil(n/blocksize) elements.

        Returns:
            float64 [ceil(n/GRANULE), STATS]: sum of squared error, sum of squared value, largest
            error, each against the value decoded with the block's own float32 absmax; and how
            many blocks are outlier blocks: absmax above 10 times the root mean square of the
            other elements, some of which are neither zero nor as large (cuda/codec.h has
            it to the bit).

        Raises:
            NonFiniteError: src holds a NaN or an infinity, or decodes to one.
        """
        ...

    def search(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        ladder: Ladder,
        importance: Importance | None,
        packed: U8,
        index: U8,
        unit: F32,
    ) -> F64:
        """Encode n elements in blocks, each under the scale of least loss that the ladder has.

        The loss of an element is its squared error times the importance of its column, or, without
        importance, times its magnitude. cuda/cpu_scales.h defines it to the bit.

        Args:
            src: as for `quantize`; a part starts at a multiple of a run of blocks as well.
            packed: out, (n+1)//2 bytes.
            index: out, ceil(n/blocksize) bytes: the step that each block takes.
            unit: out, ceil(ceil(n/blocksize) / ladder.run) elements: block i is decoded with the
                scale steps[index[i]] * unit[i // run].

        Returns:
            As `quantize`, but against the values as they will be decoded.

        Raises:
            NonFiniteError: src holds a NaN or an infinity.
        """
        ...

    def dequantize(
        self,
        packed: U8,
        n: int,
        blocksize: int,
        quant_type: str,
        absmax: F32 | NestedAbsmax,
        dtype: str,
        out: U8,
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

    def nested_dequantize(self, nested: NestedAbsmax) -> F32:
        """The inverse: map[codes[i]] * absmax[i // blocksize] + offset, of all codes but those
        to skip."""
        ...

    def cast(self, src: U8, from_dtype: str, dst: U8, to_dtype: str) -> None:
        """Round every element of src (raw bytes) to `to_dtype`, to nearest even.

        Raises:
            NonFiniteError: a finite value became infinite.
        """
        ...

    def decode_float8(self, src: U8, float8: Float8, dst: U8, to_dtype: str) -> None:
        """Float8 e4m3 with scales: value * scale in float32, rounded once to `to_dtype`.

        Args:
            src: n bytes.
            dst: out, n elements of `to_dtype` (raw bytes).

        Raises:
            NonFiniteError: a result is NaN or infinite.
        """
        ...
