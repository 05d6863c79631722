"""Prove an output within a bound on the disk: make it again, file by file, for its digests.

Neither the source nor the output has to be on this disk.  The source's files pass through as in a
conversion; each output file is compared by its digest with the manifest, and removed.  Of an output
on a Hub only the manifest, the small files and the headers are fetched: the Hub states the SHA-256
of every weight file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.adapter_files import Adapter
from ..checkpoint.discovery import CARD, MANIFEST
from ..checkpoint.types import Checkpoint
from ..convert.write_model import Execution, write_model
from ..engines.protocol import Engine
from ..errors import InputError, UsageError
from ..output.against_manifest import check_lists
from ..output.against_source import compare_beside
from ..output.manifest import Manifest
from ..output.recorded_choices import recorded_answer, recorded_copies, recorded_importance
from ..output.report import LEVELS, Report
from ..planning.make_plan import make_plan
from ..planning.model_plan import ModelPlan
from ..planning.plan import Plan
from .from_source import compare_manifest
from .verify import check_index


class StatedFile(NamedTuple):
    """What a Hub states of a file.

    Attributes:
        size: bytes.
        sha256: hexadecimal; None for a file that lies in git and not in LFS.
    """

    size: int
    sha256: str | None


def plan_again(
    output: Checkpoint,
    manifest: Manifest,
    original: Checkpoint,
    report: Report,
    merging: Sequence[Adapter] = (),
) -> Plan | None:
    """Return the plan that would make `output` from `original`, by the recipe of its manifest.

    Args:
        merging: adapters that are merged into `original`, in order.

    Returns:
        None where there is no such plan; the report then says why.

    Raises:
        InputError: `original` cannot be quantized.
    """
    original = recorded_copies(original, manifest, report)
    importance = recorded_importance(output, manifest.config, report)
    if manifest.config.importance and importance is None:
        return None
    try:
        return make_plan(
            original, manifest.config, lambda _: recorded_answer(manifest), importance=importance,
            merging=merging,
        )  # fmt: skip
    except UsageError as error:
        report.add("source", original.name, f"{original.name} does not fit the recipe: {error}")
        return None


def check_stated(
    output: Checkpoint,
    manifest: Manifest,
    stated: Mapping[str, StatedFile],
    hub: str,
    report: Report,
) -> None:
    """Check every file of an output on a Hub, without the bytes of its weights.

    Args:
        output: its outline: small files whole, of weight files the headers.
        stated: what the Hub states of its files, by name.
        hub: the Hub's address.

    Raises:
        InputError: the Hub states no SHA-256 of a weight file.
    """
    check_index(output, report)
    listed = check_lists(output, {}, manifest, report)
    for shard in listed:
        name, file = shard.path.name, stated[shard.path.name]
        record = manifest.output_files[name]
        if file.sha256 is None:
            raise InputError(
                f"{hub} states no SHA-256 of {name}, which lies in git and not in LFS: verify "
                "without --disk"
            )
        if (file.size, file.sha256) != (record.size, record.digest):
            report.add(
                "manifest",
                name,
                f"{name} has {file.size:,} bytes and the SHA-256 {file.sha256} on {hub}, the "
                f"manifest has {record.size:,} and {record.digest}",
            )
    report.check(
        "manifest",
        f"every file is the one written: {hub} states the SHA-256 of the manifest, and the small "
        "files have theirs",
    )
    report.unchecked.append(
        f"the bytes of the weight files, which were not fetched: that they have the SHA-256 which "
        f"{hub} states is its word"
    )


def make_again(plan: Plan, place: Path, run: Execution) -> Manifest:
    """Convert a plan's source, keep no file, and return the manifest of what was made.

    A run that is stopped leaves its workspace, and the next one continues there.

    Args:
        place: where an output would be; the workspace lies beside it.
        run: with a transport that removes every output file.

    Raises:
        UsageError: the bound is too small, or another run is making the same.
        InputError, MachineError: see `write_model`.
    """
    return write_model(ModelPlan.of(plan), place, run)[""]


def check_made(
    output: Checkpoint,
    manifest: Manifest,
    plan: Plan,
    made: Manifest,
    source: Path,
    engine: Engine,
    report: Report,
) -> None:
    """Compare an output with what was made again.

    Args:
        output: its small files and headers are read.
        manifest: of the output.
        plan: that was carried out.
        made: the manifest of what was made.
        source: that was read, for messages.
        engine: that quantized, for messages.
    """
    compare_manifest(output, manifest, made, source, report)
    for name, record in sorted(made.output_files.items()):
        listed = manifest.output_files.get(name)
        if listed != record and name != CARD:
            stated = "no such file" if listed is None else f"{listed.size:,} bytes, {listed.digest}"
            report.add(
                "source",
                name,
                f"{name}: the source gives {record.size:,} bytes with the {made.digest} "
                f"{record.digest}, {MANIFEST} has {stated}",
            )
    compare_beside(output, plan, manifest, report)
    total = sum(record.size for record in made.output_files.values())
    report.check(
        "source",
        f"every file is the one the source gives, by its {made.digest} ({total:,} bytes, made "
        f"again with {engine.name})",
    )
    report.findings.sort(key=lambda finding: LEVELS.index(finding.level))
