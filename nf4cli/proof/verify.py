"""Verify a 4-bit checkpoint, on three levels that each need more than the one before.

Alone: every file opens, every quantization state is complete and plausible, and config.json says
what the tensors need.  With the manifest beside it: every byte is the one that was written.  With
the source: every byte is the one that the source gives (see from_source.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..callbacks import Progress, no_progress
from ..checkpoint import bnb_format
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.discovery import MANIFEST, index_name, open_checkpoint
from ..checkpoint.packed import PackedReader, PackedWeight, by_shard, find_weights
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint
from ..convert.conversion import Tools
from ..convert.tasks import Cluster
from ..engines.protocol import Engine
from ..errors import InputError, UsageError
from ..output.against_manifest import check_manifest, read_manifest
from ..output.report import LEVELS, Report
from ..planning import selection
from ..planning.resources import Resources
from .for_loaders import check_config
from .from_source import Proof, check_source
from .on_nodes import check_files
from .states import check_states


def verify(
    path: Path,
    source: Path | None,
    engine: Engine,
    resources: Resources,
    progress: Progress = no_progress,
    elsewhere: bool = False,
    cluster: Cluster | None = None,
    merging: Sequence[Adapter] = (),
) -> Report:
    """Check a 4-bit checkpoint, written by nf4 or not.

    Args:
        path: the checkpoint.
        source: the full-precision checkpoint that it was made from; None for no proof.
        engine, resources, progress: see `Tools`.
        elsewhere: the caller compares the bytes with the source (see by_digests.py).
        cluster: reads and quantizes; None to do it here.
        merging: adapters that are merged into the source, in order.

    Raises:
        InputError: `path` or `source` is not a checkpoint at all.
        UsageError: a cluster cannot prove it.
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
        if cluster is not None and source is not None and manifest is None:
            raise UsageError(
                f"{checkpoint.root} has no {MANIFEST} to say how it was made: prove it on one "
                "machine, without --ray"
            )
        zeros_are_wrong = source is None and not (recorded or elsewhere)
        signed = manifest is not None and manifest.config.scale == "search"
        if cluster is None:
            reader, order = PackedReader(readers, engine), by_shard(weights)
            check_states(reader, order, resources.workers, report, zeros_are_wrong, signed)
    if cluster is not None:
        check_files(
            cluster, checkpoint, weights, manifest, report, zeros_are_wrong, signed, progress
        )
    elif manifest is not None:
        check_manifest(checkpoint, weights, manifest, resources, report, progress)
    if manifest is None:
        _say_what_is_kept(checkpoint, weights, report)
    if source is not None:
        tools, merged = Tools(engine, resources, progress), tuple(merging)
        check_source(Proof(checkpoint, weights, manifest, source, tools, report, cluster, merged))
    elif not elsewhere:
        report.unchecked.append(
            "that the bytes are what the source gives: run again with --source DIRECTORY"
        )
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
    check_index(checkpoint, report)
    report.check(
        "structure",
        f"every file opens, {len(weights)} quantization states are complete",
    )
    return weights


def check_index(checkpoint: Checkpoint, report: Report) -> None:
    """Report an index that is missing, or says other than the headers of the shards."""
    index = index_name(checkpoint.stem)
    if len(checkpoint.shards) > 1 and not (checkpoint.root / index).is_file():
        report.add("structure", index, f"{index} is missing: loaders cannot find the shards")
    for error in checkpoint.index_errors:
        report.add("structure", index, f"{error}: expected what the shards' headers list")


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
