"""Check an output on many machines, file by file: alone, and against its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from ..callbacks import Progress, no_progress
from ..checkpoint.digest import digest_shards
from ..checkpoint.packed import PackedReader, PackedWeight, by_shard
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint, Shard
from ..convert.conversion import Conversion, Tools
from ..convert.resume import Standing
from ..convert.tasks import Cluster, SeesFiles
from ..convert.transfers import Transfers
from ..convert.units import (
    Collected,
    Made,
    Unit,
    UnitTask,
    cut,
    require_unchanged,
    source_files,
    standing_of,
    with_own_progress,
)
from ..engines.protocol import GRANULE
from ..output.against_manifest import check_lists, report_digests
from ..output.manifest import FileRecord, Manifest
from ..output.report import Finding, Report
from ..planning.plan import Plan
from .comparison import Compared, Comparison
from .states import check_states


@dataclass(frozen=True, slots=True)
class FileChecked:
    """What was found in a file.

    Attributes:
        findings: of its packed weights.
        digest: of the file; "" where no manifest has one to compare.
        tensors: digests by key, where the file's is not the recorded one.
    """

    findings: list[Finding]
    digest: str
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class CheckFile:
    """The `Task` that checks the packed weights of a file, and digests it.

    Attributes:
        shard: the file.
        weights: whose packed tensors lie in it.
        recorded: what the manifest has of it; None where there is no manifest, or not this file.
        algorithm: of the recorded digest.
        zeros_are_wrong, signed: see `check_states`.
    """

    shard: Shard
    weights: tuple[PackedWeight, ...]
    recorded: FileRecord | None
    algorithm: str
    zeros_are_wrong: bool
    signed: bool

    @property
    def name(self) -> str:
        return self.shard.path.name

    @property
    def nbytes(self) -> int:
        return self.shard.size

    @property
    def tensors(self) -> int:
        return len(self.shard.tensors)

    @property
    def granule(self) -> int:
        return GRANULE

    def do(self, tools: Tools, moved: Transfers) -> FileChecked:
        report, workers = Report(), tools.resources.workers
        shards = {p[0].path: p[0] for weight in self.weights for p in weight.parts()}
        with ShardReaders(shards.values()) as readers:
            reader = PackedReader(readers, tools.engine)
            check_states(reader, self.weights, workers, report, self.zeros_are_wrong, self.signed)
        if self.recorded is None:
            return FileChecked(report.findings, "", {})

        def digest(progress: Progress, tensors: bool) -> tuple[str, Mapping[str, str]]:
            ((digest, found),) = digest_shards(
                [self.shard], self.algorithm, workers, progress, tensors
            )
            return digest, found

        found, tensors = digest(tools.progress, False)
        if self.recorded != FileRecord(self.shard.size, found):
            found, tensors = digest(no_progress, True)
        return FileChecked(report.findings, found, tensors)


def check_files(
    cluster: Cluster, checkpoint: Checkpoint, weights: Mapping[str, PackedWeight],
    manifest: Manifest | None, report: Report, zeros_are_wrong: bool, signed: bool,
    progress: Progress,
) -> None:  # fmt: skip
    """Check every packed weight and, against a manifest, every file.

    Args:
        weights: of the checkpoint, by name.
        manifest: of the checkpoint; None where it has none.
        report: takes the findings.
        zeros_are_wrong, signed: see `check_states`.
    """
    of_file = {
        path: tuple(group)
        for path, group in groupby(by_shard(weights), lambda weight: weight.packed[0].path)
    }
    records = manifest.output_files if manifest else {}
    algorithm = manifest.digest if manifest else ""
    tasks = [
        CheckFile(
            shard, of_file.get(shard.path, ()), records.get(shard.path.name), algorithm,
            zeros_are_wrong, signed,
        )
        for shard in checkpoint.shards
    ]  # fmt: skip
    wrong = {}

    def take(task: CheckFile, found: FileChecked) -> None:
        report.findings += found.findings
        if task.recorded not in (None, FileRecord(task.shard.size, found.digest)):
            wrong[task.name] = task.shard, (found.digest, found.tensors)

    files = {shard.path: shard.size for shard in checkpoint.shards}
    cluster.do(tasks, SeesFiles(files), take, progress)
    report.check("state", "tables are bitsandbytes' own, statistics are finite")
    if manifest is not None:
        check_lists(checkpoint, weights, manifest, report)
        report_digests([wrong[name] for name in sorted(wrong)], manifest, report)


@dataclass(frozen=True, slots=True)
class CompareFile(UnitTask):
    """The `Task` that makes a unit again, and compares it with a finished file.

    Attributes:
        output: the tensors of the finished checkpoint that the unit would make.
        algorithm: of the source files' digests.
    """

    output: Checkpoint
    algorithm: str

    def do(self, tools: Tools, moved: Transfers) -> Compared:
        unit = self.unit
        with ShardReaders(self.output.shards) as readers:
            sink = Comparison(self.output, readers)
            conversion = Conversion(
                unit.plan, with_own_progress(unit, tools), sink, self.algorithm, standing_of(unit)
            )
            conversion.run()
        return sink.outcome(
            {name: conversion.results[name] for name in unit.made},
            {name: conversion.digested[name] for name in unit.digested},
        )


def compare_on_nodes(
    cluster: Cluster, plan: Plan, output: Checkpoint, algorithm: str, progress: Progress
) -> Compared:
    """Carry a plan out, and compare every tensor's bytes with those of a finished checkpoint.

    Args:
        plan: that would make the checkpoint again.
        output: the checkpoint.
        algorithm: of the source files' digests.

    Raises:
        InputError: a source file changed meanwhile, or see `Conversion.run`.
        UsageError, MachineError: see `Cluster`.
    """
    units, collected = cut(plan, Standing()), Collected(plan, Standing())
    first: dict[str, int] = {}
    states: dict[str, str] = {}
    total = 0

    def take(task: CompareFile, found: Compared) -> None:
        nonlocal total
        collected.add(task.unit, Made(found.results, {}, "", found.sources))
        first.update(found.first)
        states.update(found.states)
        total += found.nbytes

    tasks = [CompareFile(unit, _made_by(unit, output), algorithm) for unit in units]
    files = {shard.path: shard.size for shard in output.shards} | source_files(units)
    cluster.do(tasks, SeesFiles(files), take, progress)
    require_unchanged(plan.checkpoint.shards)
    return Compared(collected.results, collected.sources, first, states, total)


def _made_by(unit: Unit, output: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the tensors alone that a unit would make."""
    tensors = {
        key: output.tensors[key]
        for tensor in unit.plan.tensors
        if tensor.name in unit.made
        for key in tensor.outputs
        if key in output.tensors
    }
    shards = {shard.path: shard for shard, _ in tensors.values()}
    return replace(
        output, tensors=tensors, shards=tuple(shards.values()), config={}, params={},
        extra_files=(), left_files=(),
    )  # fmt: skip
