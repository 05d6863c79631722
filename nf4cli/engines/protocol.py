"""The protocol that every engine implements, and the arguments that its methods take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from ..format.dtypes import CODE_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..format.codebook import Ladder

    U8 = NDArray[np.uint8]
    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]

GRANULE = 65_536
"""Elements that share one row of error sums.  A tensor is cut into chunks at multiples of it, so
the sums, like the bytes, do not depend on the size of the chunks."""

STATS = 4
"""Numbers in a row of error sums, see `Engine.quantize`."""

OUTLIERS = 3
"""Column of a row of error sums that counts outlier blocks."""

ROW, SEGMENT = 16, 64
"""The order of error sums: 16 interleaved partial sums, over segments of 64 elements."""

DTYPE_CODES = {"F32": 0, "F16": 1, "BF16": 2}
"""Dtype -> its number in native code.

cuda/codec.h defines these constants as well; tests/engines/test_native_constants.py compares
them."""

CAST_CODES = {**DTYPE_CODES, "F64": 4}
"""The same for `Engine.cast`, which reads float64 as well."""


@dataclass(frozen=True, slots=True)
class Codes:
    """What turns stored codes into values, and where the codes at hand lie in their matrix.

    An element is (value of its code - zero point) * factor, in float32; the subtraction is exact.

    Attributes:
        first: index of the first code at hand, counted through the row-major matrix.
        columns: columns of the matrix.
        scale: float32, the factor of each block: [ceil(rows/block[0]), ceil(columns/block[1])],
            flattened.
        block: (rows, columns) of the elements that share a factor.
        kind: of the codes, see `codebook.code_values`.  Codes of 4 bits lie in pairs in a byte, the
            first one in the low bits; `first` and `columns` are then even.
        zero: float32, the zero point of each block, as `scale`; None for none.
        through: a dtype that the product is rounded to before the dtype that is asked for; None
            for none.
    """

    first: int
    columns: int
    scale: F32
    block: tuple[int, int]
    kind: str = "e4m3"
    zero: F32 | None = None
    through: str | None = None

    @property
    def bits(self) -> int:
        """Bits of a code, 8 or 4."""
        return CODE_BITS[self.kind]

    def count(self, src: U8) -> int:
        """Return how many codes `src` holds."""
        return src.nbytes * 8 // self.bits

    def from_(self, start: int) -> Codes:
        """Return the same for codes that begin `start` elements further on."""
        return replace(self, first=self.first + start)


@dataclass(frozen=True, slots=True)
class NestedAbsmax:
    """A part of an absmax vector in its double-quantized form.

    Attributes:
        codes: uint8 [n], from the start of a run of `blocksize` codes.
        skip: codes to leave out at the front, when the part begins within a run.
        blocksize: codes that share an entry of `absmax`.
        map: float32 [256], the value of each code.
        absmax: float32 [ceil(n/blocksize)], the scale of each run.
        offset: a float32 value, added to every decoded element.
    """

    codes: U8
    skip: int
    blocksize: int
    map: F32
    absmax: F32
    offset: float


@dataclass(frozen=True, slots=True)
class Importance:
    """The weight of an error in each input column of a matrix.

    Attributes:
        columns: float32 [columns of the matrix].
        first: index of the first element at hand, counted through the row-major matrix.
    """

    columns: F32
    first: int


@dataclass(frozen=True, slots=True)
class ChosenScales:
    """The scales that `Engine.search` chooses: block i gets steps[index[i]] * unit[i // run].

    `steps` and `run` are those of the ladder.

    Attributes:
        index: uint8 [blocks], the step of each block.
        unit: float32 [ceil(blocks/run)], the largest magnitude of each run of blocks.
    """

    index: U8
    unit: F32


class Engine(Protocol):
    """An implementation of the format's arithmetic.  Each method is thread-safe.

    Dtypes are safetensors names: "F32", "F16", "BF16".
    """

    name: str
    """The engine and its hardware, for a user to read: "cpu (avx512)"."""

    spare_threads: int
    """Threads that it can use in addition to one per processor, because they wait for a GPU."""

    extra_memory: int
    """Bytes of host memory that it takes once, in addition to those of the CPU engine."""

    worker_memory: int
    """Bytes of host memory that it takes for each calling thread, in addition to its buffers."""

    item_bytes: int
    """Bytes of source to hand over at a time, at the most: what is read, digested and encoded one
    after the other shall stay in the processor's cache, and a GPU shall be kept busy."""

    def buffer(self, nbytes: int) -> U8:
        """Return uninitialised host memory, uint8 [nbytes], that the engine can access directly.

        Other arrays are allowed as arguments too, but a GPU engine copies them once more.

        Raises:
            MachineError: the system gives no such memory.
        """
        ...

    def quantize(
        self,
        src: U8,
        dtype: str,
        blocksize: int,
        quant_type: str,
        packed: U8,
        absmax: F32,
        codes: Codes | None = None,
    ) -> F64:
        """Encode n elements in blocks, with each block's largest magnitude as its scale.

        Args:
            src: raw bytes of n elements of `dtype`: a whole tensor, or a part of one.  A part
                starts at a multiple of GRANULE elements, and all parts but the last one hold a
                multiple of GRANULE elements.
            blocksize: elements that share one absmax.
            quant_type: "nf4" or "fp4".
            packed: output, uint8 [(n+1)//2], the first element in the high nibble.
            absmax: output, float32 [ceil(n/blocksize)].
            codes: if given, src holds n codes, which are first decoded to `dtype` (see
                `decode_codes`).

        Returns:
            float64 [ceil(n/GRANULE), STATS], for each granule: the sum of the squared errors, the
            sum of the squared values, the largest error, and the number of outlier blocks.  Errors
            are those of the values decoded with the block's float32 absmax.  The absmax of an
            outlier block is above 10 times the root mean square of its other elements, at least
            one of which is neither zero nor as large as the absmax; cuda/codec.h defines it to the
            bit.

        Raises:
            NonFiniteError: src holds a NaN or an infinity, or a code decodes to one.
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
        scales: ChosenScales,
    ) -> F64:
        """Encode n elements in blocks, each with the scale of the ladder that has the least loss.

        The loss of an element is its squared error times the importance of its column or, without
        importance, times its magnitude.  cuda/cpu_scales.h defines it to the bit.

        Args:
            src: as for `quantize`; a part also starts at a multiple of a run of blocks.
            ladder: the scales to try.
            importance: the weight of each column's errors, None for none.
            packed: output, uint8 [(n+1)//2].
            scales: output, for ceil(n/blocksize) blocks.

        Returns:
            float64 [ceil(n/GRANULE), STATS], as `quantize` does; errors are those of the values
            decoded with the chosen scales.

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
        """Decode n elements: the inverse of `quantize`.

        Args:
            packed: uint8 [(n+1)//2], the first element in the high nibble.
            n: elements, from the start of a block.
            absmax: the scales of ceil(n/blocksize) blocks, float32 or double-quantized.
            out: output, raw bytes of n elements of `dtype`.
        """
        ...

    def sum(self, values: F32, carry: float) -> float:
        """Return carry + values[0] + values[1] + ..., added in float64 and in this order."""
        ...

    def nested_quantize(self, absmax: F32, offset: float, codes: U8, nested_absmax: F32) -> None:
        """Quantize (absmax - offset) to 8 bits, in runs of 256 elements.

        Args:
            absmax: float32 [n]; n is a multiple of 256 unless this part ends the vector.
            offset: a float32 value.
            codes: output, uint8 [n].
            nested_absmax: output, float32 [ceil(n/256)], the largest magnitude of each run.
        """
        ...

    def nested_dequantize(self, nested: NestedAbsmax) -> F32:
        """Decode an absmax vector: map[codes[i]] * absmax[i // blocksize] + offset.

        Returns:
            float32 [codes - skip], without the codes to skip.
        """
        ...

    def cast(self, src: U8, from_dtype: str, dst: U8, to_dtype: str) -> None:
        """Round every element to `to_dtype`, to the nearest value, of two equally near to the even.

        Args:
            src: raw bytes of n elements of `from_dtype`, which may be "F64".  A float64 is rounded
                once, and not to float32 first.
            dst: output, raw bytes of n elements of `to_dtype`.

        Raises:
            NonFiniteError: a finite value became infinite.
        """
        ...

    def decode_codes(self, src: U8, codes: Codes, dst: U8, to_dtype: str) -> None:
        """Decode n codes: (value - zero point) * factor in float32, rounded to `to_dtype`.

        Args:
            src: uint8 [n] or [n / 2], the codes.
            codes: what they stand for.
            dst: output, raw bytes of n elements of `to_dtype`.

        Raises:
            NonFiniteError: a result is NaN or infinite.
        """
        ...

    def add_product(self, values: F32, first: int, left: F32, right: F32, scale: float) -> None:
        """Add scale * (left @ right) to elements of a row-major matrix, in place.

        Every product and sum is rounded to float32.  The products of an element are added from the
        first rank to the last, then multiplied by the scale, then added to the element.

        Args:
            values: float32 [n], the elements from `first` on, counted from the row that `left`
                begins with.
            left: float32 [rows, rank], the rows that the elements lie in.
            right: float32 [rank, columns].
            scale: a float32 value.
        """
        ...

    def square_sums(self, values: F32) -> F64:
        """Return the sum of the squares of each row, float64 [rows].

        Element i is added to the sum i modulo ROW of its row; then the second half of the sums is
        added to the first, until one is left.

        Args:
            values: float32 [rows, columns].
        """
        ...
