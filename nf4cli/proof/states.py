"""Check the tables and statistics of packed weights: whether they can be what a quantizer wrote."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..checkpoint.packed import (
    PackedReader,
    PackedWeight,
    has_chosen_scales,
    standard_nested_map,
)
from ..format.codebook import codebook
from ..output.report import Report
from ..threads import run

if TYPE_CHECKING:
    from ..engines.protocol import F32

_BLOCKS_AT_A_TIME = 1 << 18
_SIGNED_SHARE = 0.1  # negative scales above this share were chosen; about half of those are
_NESTED_ROUNDING = 0.01  # of nested_absmax: half the widest step of the 8-bit codes


def check_states(
    reader: PackedReader,
    weights: Iterable[PackedWeight],
    workers: int,
    report: Report,
    zeros_are_wrong: bool,
    signed: bool,
    where: str = "",
) -> None:
    """Check the tables and statistics of packed weights.

    Args:
        weights: in the order of reading.
        workers: threads.
        zeros_are_wrong: report a weight of nothing but zeros.  There are models with such weights,
            but where nothing else proves the bytes, they are more likely lost data.
        signed: scales of either sign were chosen for them, as their manifest says.
        where: for the report: which weights these are, where they are not all.
    """
    lock = threading.Lock()

    def check(weight: PackedWeight) -> None:
        problems = list(_state_problems(reader, weight, zeros_are_wrong, signed))
        with lock:
            for message in problems:
                report.add("state", weight.name, message)

    run(weights, lambda: check, workers, lambda: None)
    report.check("state", f"tables are bitsandbytes' own, statistics are finite{where}")


def _state_problems(
    reader: PackedReader, weight: PackedWeight, zeros_are_wrong: bool, signed: bool
) -> Iterator[str]:
    """Yield what is wrong with the quantization state of a weight."""
    signed = signed or has_chosen_scales(weight)
    table = reader.floats(weight.quant_map)
    if not np.array_equal(table, codebook(weight.state.quant_type).decode):
        yield f"{weight.name}: quant_map is not the {weight.state.quant_type} table"
    if weight.nested_quant_map is not None and not standard_nested_map(
        reader.floats(weight.nested_quant_map)
    ):
        yield f"{weight.name}: nested_quant_map is not bitsandbytes' dynamic map"
    least = 0.0
    if weight.nested_absmax is not None:
        nested = reader.floats(weight.nested_absmax)
        if not np.isfinite(nested).all() or (nested < 0).any():
            yield f"{weight.name}: nested_absmax holds a value that is negative or not finite"
            return
        least = -float(nested.max()) * _NESTED_ROUNDING
        unscaled = next(_unscaled_runs(reader, weight, nested), None)
        if unscaled is not None:
            yield (
                f"{weight.name}: nested_absmax[{unscaled}] is zero, but the codes that it scales "
                "differ: it was overwritten"
            )
    all_zero = True
    for first in range(0, weight.blocks, _BLOCKS_AT_A_TIME):
        absmax = reader.absmax(weight, first, min(_BLOCKS_AT_A_TIME, weight.blocks - first))
        any_sign = signed or _are_signed(absmax)
        good = np.isfinite(absmax) & (any_sign | (absmax >= least))
        if not good.all():
            bad = int(np.argmin(good))
            yield (
                f"{weight.name}: absmax of block {first + bad} is {absmax[bad]}: expected "
                + (
                    "a finite scale"
                    if any_sign
                    else "the largest magnitude of a block, which is finite and not negative"
                )
            )
            return
        all_zero = all_zero and not absmax.any()
    if all_zero and zeros_are_wrong:
        yield f"{weight.name}: every absmax is zero, so the whole weight decodes to zeros"


def _are_signed(absmax: F32) -> bool:
    """Return whether so many scales are negative that they were chosen, not damaged.

    Args:
        absmax: float32 [blocks].
    """
    return bool((absmax < 0).mean() > _SIGNED_SHARE)


def _unscaled_runs(reader: PackedReader, weight: PackedWeight, nested: F32) -> Iterator[int]:
    """Yield the runs of double-quantized scales whose codes differ although their scale is zero.

    Args:
        nested: float32, the scale of each run.

    Yields:
        The number of the run.
    """
    size = weight.state.nested_blocksize
    for number in np.flatnonzero(nested == 0).tolist():
        start = number * size
        codes = reader.read(weight.absmax, start, min(size, weight.blocks - start))
        if (codes != codes[0]).any():
            yield number
