"""Verify a 4-bit checkpoint, on three levels that each need more than the one before.

Alone: every file opens, every quantization state is complete and plausible, and config.json says
what the tensors need.  With the manifest beside it: every byte is the one that was written.  With
the source: every byte is the one that the source gives (see from_source.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..callbacks import Progress, no_progress
from ..checkpoint import bnb_format
from ..checkpoint.discovery import MANIFEST, index_name, open_checkpoint
from ..checkpoint.packed import (
    PackedReader,
    PackedWeight,
    by_shard,
    find_weights,
    has_chosen_scales,
    standard_nested_map,
)
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint
from ..convert.conversion import Tools
from ..engines.protocol import Engine
from ..errors import InputError
from ..format.codebook import codebook
from ..output.against_manifest import check_manifest, read_manifest
from ..output.report import LEVELS, Report
from ..planning import selection
from ..planning.resources import Resources
from ..threads import run
from .for_loaders import check_config
from .from_source import Proof, check_source

if TYPE_CHECKING:
    from ..engines.protocol import F32

_BLOCKS_AT_A_TIME = 1 << 18
_SIGNED_SHARE = 0.1  # negative scales above this share were chosen; about half of those are
_NESTED_ROUNDING = 0.01  # of nested_absmax: half the widest step of the 8-bit codes


def verify(
    path: Path,
    source: Path | None,
    engine: Engine,
    resources: Resources,
    progress: Progress = no_progress,
    elsewhere: bool = False,
) -> Report:
    """Check a 4-bit checkpoint, written by nf4 or not.

    Args:
        path: the checkpoint.
        source: the full-precision checkpoint that it was made from; None for no proof.
        engine, resources, progress: see `Tools`.
        elsewhere: the caller compares the bytes with the source (see by_digests.py).

    Raises:
        InputError: `path` or `source` is not a checkpoint at all.
    """
    report = Report()
    checkpoint = open_or_report(path, report)
    if checkpoint is None:
        return report
    with ShardReaders(checkpoint.shards) as readers:
        weights = check_structure(checkpoint, readers, report)
        check_config(checkpoint, weights, report)
        recorded = (checkpoint.root / MANIFEST).is_file()
        manifest = read_manifest(checkpoint, report)
        check_states(
            PackedReader(readers, engine),
            by_shard(weights),
            resources.workers,
            report,
            zeros_are_wrong=source is None and not (recorded or elsewhere),
            signed=manifest is not None and manifest.config.scale == "search",
        )
    if manifest is None:
        _say_what_is_kept(checkpoint, weights, report)
    else:
        check_manifest(checkpoint, weights, manifest, resources, report, progress)
    if source is None and not elsewhere:
        report.unchecked.append(
            "that the bytes are what the source gives: run again with --source DIRECTORY"
        )
    if source is not None:
        tools = Tools(engine, resources, progress)
        check_source(Proof(checkpoint, weights, manifest, source, tools, report))
    report.findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return report


def open_or_report(path: Path, report: Report) -> Checkpoint | None:
    """Open a checkpoint to verify; report that it is damaged, and return None.

    Raises:
        InputError: it is not a checkpoint at all.
    """
    try:
        return open_checkpoint(path)
    except InputError as error:
        if not path.is_dir() or not any(path.glob("*.safetensors")):
            raise
        report.add("structure", str(path), str(error))
        return None


# -- alone ------------------------------------------------------------------------------------


def check_structure(
    checkpoint: Checkpoint, readers: ShardReaders, report: Report
) -> dict[str, PackedWeight]:
    """Check that every quantization state is complete, and return the packed weights by name.

    Raises:
        InputError: the checkpoint has none, not even an incomplete one.
    """
    weights, problems = find_weights(checkpoint, readers)
    for owner, problem in problems:
        report.add("structure", owner, problem)
    if not weights and not problems:
        raise InputError(
            f"{checkpoint.root} holds no bitsandbytes 4-bit weight: there is nothing to verify. "
            "Make one with nf4 quantize"
        )
    parts = {part[1].name for weight in weights.values() for part in weight.parts()}
    for name, (_, tensor) in checkpoint.tensors.items():
        stateless = name not in parts and bnb_format.companion_owner(name) is None
        if stateless and tensor.dtype == "U8" and tensor.shape[1:] == (1,):
            report.add("structure", name, f"{name} looks packed but has no quant_state")
    index = index_name(checkpoint.stem)
    if len(checkpoint.shards) > 1 and not (checkpoint.root / index).is_file():
        report.add("structure", index, f"{index} is missing: loaders cannot find the shards")
    check_index(checkpoint, report)
    report.check(
        "structure",
        f"every file opens, {len(weights)} quantization states are complete",
    )
    return weights


def check_index(checkpoint: Checkpoint, report: Report) -> None:
    """Report what is not true in the index, even where it harms no loader."""
    for error in checkpoint.index_errors:
        index = index_name(checkpoint.stem)
        report.add("structure", index, f"{error}: expected what the shards' headers list")


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


def _say_what_is_kept(
    checkpoint: Checkpoint, weights: dict[str, PackedWeight], report: Report
) -> None:
    """Report weights in full precision that could be packed: nothing says why they are not."""
    context = selection.Context.of(checkpoint)
    unpacked = [
        (name, selection.rule_of(context, tensor).name)
        for name, (_, tensor) in checkpoint.tensors.items()
        if name not in weights and bnb_format.companion_owner(name) not in weights
    ]
    for rule, what in (("linear", "linear weights"), ("experts", "weights of experts")):
        kept = [name for name, its_rule in unpacked if its_rule == rule]
        if kept:
            report.unchecked.append(
                f"whether {len(kept)} {what} were meant to stay in full precision "
                f"({kept[0]}{', ...' if kept[1:] else ''})"
            )
