"""Define the pieces of work of a conversion, and the state of a weight while it is worked on."""

from __future__ import annotations

import errno
import math
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.bnb_format import QuantState
from ..checkpoint.encoded import Factors
from ..checkpoint.file_io import read_at, write_at
from ..checkpoint.given_codes import CodeSource
from ..checkpoint.types import Shard, View, Weight
from ..errors import InputError
from ..format.codebook import Ladder
from ..format.dtypes import FLOAT64, ITEMSIZE
from ..output.manifest import TensorError
from ..planning.plan import TensorPlan
from ..planning.selection import module_path

if TYPE_CHECKING:
    from ..engines.protocol import F32, F64, U8

ABSMAX_PIECE = 1 << 18  # elements of the absmax vector double-quantized at a time


@dataclass(frozen=True, slots=True)
class Item:
    """One piece of work: `count` elements of a weight from element `start`.

    Elements are counted in the order of writing; those of a packed weight in the order of its
    codes.

    Attributes:
        source: what they are made from.
        digest: whether its bytes are read in file order, and digested on the way.
    """

    source: Source
    start: int
    count: int
    digest: bool

    @property
    def job(self) -> Job:
        """The weight that the elements belong to."""
        return self.source.job

    @property
    def within(self) -> int:
        """The first element, counted from the first of its source."""
        return self.start - self.source.first


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes [start, stop) of a source file that are read for its digest alone.

    A transposed weight is not read in file order, and of some tensors nothing is written.
    """

    shard: Shard
    start: int
    stop: int


@dataclass(eq=False, slots=True)
class Source:
    """A stored tensor that a weight is made from, or a part of it.

    Attributes:
        job: the weight.
        weight: the tensor as the model holds it; of a weight with parts, one of these.
        view: the stored matrix whose transpose is written; None for the tensor as it lies.
        first: index of its first element in the job's weight.
        pending: number of items that are not done.
        factors: of a tensor that is stored as codes.
        held: the files that stay open because factors are read from them.
        importance: float32 [columns], the weight of each column's error in the choice of scales;
            None for equal weights.
    """

    job: Job
    weight: Weight
    view: View | None
    first: int
    pending: int
    factors: Factors | None = None
    held: list[Shard] = field(default_factory=list)
    importance: F32 | None = None


@dataclass(eq=False, slots=True)
class Job:
    """A weight that is being worked on.

    Attributes:
        pending: number of sources that are not done.
        stats: the engine's error sums (float64) of each item, by its first element.
        absmax: temporary file of the float32 absmax vector, for double quantization.
        ladder: the scales to choose from; None where a scale is its block's largest magnitude.
        codes: gives the codes; None for the nearest.
        worst_block: the largest error of a block with given codes, see `given_codes.errors_of`.
        error: of the whole weight, once it is finished.
        state: the final quantization state, once it is finished.
        sources: XXH3-128 of the stored tensors that it was made from, by name, as far as known.
    """

    plan: TensorPlan
    pending: int
    stats: dict[int, F64] = field(default_factory=dict)
    absmax: AbsmaxFile | None = None
    ladder: Ladder | None = None
    codes: CodeSource | None = None
    worst_block: float | None = None
    error: TensorError | None = None
    state: QuantState | None = None
    sources: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class AbsmaxFile:
    """A float32 vector in a temporary file: it grows with the weight, so memory may not hold it.

    Args:
        directory: of the file; None for the system's.
    """

    def __init__(self, directory: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - see close

    def write(self, start: int, values: F32) -> None:
        """Write float32 [n] values from element `start` on."""
        write_at(self._file.fileno(), memoryview(values.view(np.uint8)), 4 * start)

    def pieces(self, size: int) -> Iterator[tuple[int, F32]]:
        """Yield the first `size` elements as (first element, float32 [at most ABSMAX_PIECE])."""
        for start in range(0, size, ABSMAX_PIECE):
            values = np.empty(min(ABSMAX_PIECE, size - start), np.float32)
            view = memoryview(values.view(np.uint8))
            if read_at(self._file.fileno(), view, 4 * start) < view.nbytes:
                raise OSError(errno.EIO, "a temporary file lost its end")
            yield start, values

    def close(self) -> None:
        self._file.close()


def widest(plan: TensorPlan) -> int:
    """Return the bytes of a worker's buffer that one element takes, at the most."""
    weight = plan.weight
    stored = max(-(-part.bits // 8) for part in weight.sources)
    if plan.deltas:  # what is read, its values, and those in float32
        return stored + 2 * ITEMSIZE["F32"]
    if plan.packed is not None:
        return max(stored, ITEMSIZE[plan.outputs[plan.name][0]])
    rearranged = any(is_rearranged(part, part.view) for part in weight.sources)
    if any(part.encoding for part in weight.sources) and (rearranged or plan.view is not None):
        return 1 + 3 * ITEMSIZE[weight.dtype]  # the codes, their values, and those rearranged
    if any(part.encoding for part in weight.sources) or weight.stored.dtype == FLOAT64:
        return stored + ITEMSIZE[weight.dtype]  # both lie in the source buffer
    if plan.action == "cast":  # an upcast writes more than it reads
        return max(stored, ITEMSIZE[plan.outputs[plan.name][0]])
    return stored


def item_size(plan: TensorPlan, weight: Weight, view: View | None, chunk: int, usual: int) -> int:
    """Return of how many elements an item of a weight shall be, so that the buffers hold it.

    Args:
        weight, view: see `Source`.
        chunk: bytes of a worker's buffer.
        usual: bytes that an engine takes at a time.
    """
    if plan.packed is not None and plan.view is not None:
        return chunk // widest(plan)  # written as columns, whose pieces shall be long
    if view is None or weight.encoding is not None:
        return min(chunk, usual) // widest(plan)
    # The more columns are read at once, the longer are the pieces of rows. One begins before the
    # item, and one ends behind it.
    return columns_buffer(chunk) // ITEMSIZE[weight.stored.dtype] - 2 * view.rows


def columns_buffer(chunk: int) -> int:
    """Return the bytes of a worker's two buffers, of `chunk` bytes each, that take the columns of a
    stored matrix: all but room for what is made of a part of them."""
    return 2 * chunk - chunk // 2  # a unit takes an eighth of a chunk at the most, see Resources


def is_rearranged(weight: Weight, view: View | None) -> bool:
    """Return whether a weight's elements are other than the stored ones from front to back.

    Args:
        view: the stored matrix whose transpose is written, None for the tensor as it lies.
    """
    encoding = weight.encoding
    if encoding is not None and encoding.layout != "rows":
        return True
    if encoding is not None and weight.numel * encoding.bits < 8 * weight.stored.nbytes:
        return True  # one of several weights that a stored tensor holds
    return view is not None or is_slab(weight, view)


def is_slab(weight: Weight, view: View | None) -> bool:
    """Return whether a weight is made of columns of stored codes; view: as `is_rearranged`."""
    encoding = weight.encoding
    return encoding is not None and (view is not None or encoding.transposed)


def unit_of_packed(plan: TensorPlan) -> int:
    """Return the fewest elements of a packed weight that are decoded together.

    That is a block, and whole rows of a weight that is transposed.
    """
    assert plan.packed is not None
    unit = plan.packed.state.blocksize
    return unit if plan.view is None else math.lcm(unit, plan.view.columns)


def quantized_dtype(plan: TensorPlan) -> str:
    """Return the dtype of the values that a weight's codes are chosen for."""
    return "F32" if plan.deltas else plan.weight.dtype


def require_finite(plan: TensorPlan, start: int, values: F32) -> None:
    """Raise InputError if a merged element is not finite.

    Args:
        start: index of the first element in the weight, as it is written.
        values: float32 [n].
    """
    finite = np.isfinite(values)
    if not finite.all():
        index = start + int(np.flatnonzero(~finite)[0])
        raise InputError(
            f"element {index:,} of {plan.name} is not finite once {plan.deltas[-1].adapter} is "
            "merged: the adapter is of another model, or its scale is too large"
        )


def element(item: Item, index: int) -> tuple[int, ...]:
    """Return the index in the stored tensor of an item's element `index`."""
    stored, view, flat = item.source.weight.stored, item.source.view, item.within + index
    if view is not None:
        column, row = divmod(flat, view.rows)
        flat = view.start + row * view.stride + column
    return tuple(int(i) for i in np.unravel_index(flat, stored.shape))


def stored_place(weight: Weight, view: View | None, flat: int) -> tuple[int, int]:
    """Return (row, column) among the stored codes of a weight's element `flat`; rows are counted
    through all matrices."""
    encoding = weight.encoding
    assert encoding is not None
    if view is not None:
        column, row = divmod(flat, view.rows)
        flat = view.start + row * view.stride + column
    elif encoding.transposed:
        matrix, inside = divmod(flat, encoding.rows * encoding.columns)
        column, row = divmod(inside, encoding.rows)
        return matrix * encoding.rows + row, column
    return divmod(flat, encoding.columns)


def damaged(weight: Weight, view: View | None, factors: Factors, flat: int, code: int) -> str:
    """Return the message about a code that does not decode to a finite value.

    Args:
        view: as `is_rearranged`.
        factors: of the weight.
        flat: index of its element in the weight, flattened.
        code: the code itself.
    """
    encoding = weight.encoding
    assert encoding is not None
    index = [int(i) for i in np.unravel_index(flat, weight.shape)]
    place = list(factors.index(*stored_place(weight, view, flat)))
    what = "byte" if encoding.bits == 8 else "code"
    times = f", times its factor in {encoding.scale[1].name}{place}" if encoding.scale else ""
    return (
        f"{weight.name}{index} in {weight.shard.path}, {what} 0x{code:02x}{times} is no "
        f"finite {weight.dtype}: the weight or its scales are damaged. Download both again (no "
        f"option keeps it: an output has no place for {encoding.format} as it is stored)"
    )


def nonfinite(item: Item, index: int, data: U8, dtype: str) -> str:
    """Return the message about a NaN or an infinity at an item's element `index`.

    Args:
        data: uint8, the item's bytes, in `dtype`.
    """
    weight, module = item.source.weight, module_path(item.job.plan.name)
    bits = int(data.view(f"u{ITEMSIZE[dtype]}")[index])
    mantissa = {"F32": 23, "F16": 10, "BF16": 7}[dtype]
    kind = "NaN" if bits & ((1 << mantissa) - 1) else "infinite"
    return (
        f"{weight.stored.name}{list(element(item, index))} in {weight.shard.path} is {kind}: a "
        "4-bit block cannot hold it. Repair the source, or leave this module in full precision "
        f"with --keep {module}, or every such weight with --on-nonfinite keep"
    )
