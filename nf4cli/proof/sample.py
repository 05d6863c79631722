"""Verify a sample of a large checkpoint: everything small, and tensors chosen at random.

Headers, index, configuration and the completeness of every quantization state are checked as
`verify` does.  Of the chosen tensors the bytes are read: their statistics are checked, their
digests compared with the manifest, and with a source they are quantized again and compared.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..callbacks import Progress, no_progress
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.digest import digest_tensor
from ..checkpoint.packed import PackedReader, PackedWeight, by_shard
from ..checkpoint.reader import ShardReaders
from ..checkpoint.types import Checkpoint, Placed
from ..convert.conversion import Tools
from ..engines.protocol import Engine
from ..errors import UsageError
from ..output.against_manifest import check_lists, read_manifest, recorded_digests, tensor_findings
from ..output.against_source import compare_beside
from ..output.manifest import Manifest
from ..output.report import LEVELS, Report, Sample
from ..planning.resources import Resources
from ..threads import run
from .for_loaders import check_config
from .from_source import Proof, add_differences, compare, plan_of
from .states import check_states
from .verify import check_structure, open_or_report


@dataclass(frozen=True, slots=True)
class Unit:
    """What is chosen as a whole: a packed weight with its companions, or a kept tensor."""

    name: str
    parts: tuple[Placed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(tensor.nbytes for _, tensor in self.parts)


def verify_sample(
    path: Path,
    source: Path | None,
    size: float | int,
    seed: int,
    engine: Engine,
    resources: Resources,
    progress: Progress = no_progress,
    merging: Sequence[Adapter] = (),
) -> Report:
    """Check a sample of a 4-bit checkpoint; `Report.sample` says how much that was.

    Args:
        path: the checkpoint.
        source: the checkpoint that it was made from, None for none; only the tensors that the
            sample needs are read.
        size: how much to check: a float from 0 to 1 for a share of the bytes, an int for bytes.
            At least one tensor is checked.
        seed: of the random choice.
        engine, resources, progress: see `Tools`.
        merging: adapters that are merged into `source`, in order.

    Raises:
        InputError: `path` or `source` is not a checkpoint at all.
        UsageError: `size` is not positive, or a share above 1.
    """
    if not size > 0 or (isinstance(size, float) and size > 1):  # `not >` refuses NaN as well
        raise UsageError("--sample must be more than nothing and at most 100%")
    report = Report()
    checkpoint, tools = open_or_report(path, report), Tools(engine, resources, progress)
    if checkpoint is None:
        return report
    with ShardReaders(checkpoint.shards) as readers:
        weights = check_structure(checkpoint, readers, report)
        check_config(checkpoint, weights, report)
        chosen, report.sample = _draw(units_of(checkpoint, weights), size, seed)
        names = {unit.name for unit in chosen}
        sampled = {name: weight for name, weight in weights.items() if name in names}
        manifest = read_manifest(checkpoint, report)
        check_states(
            PackedReader(readers, engine), by_shard(sampled), resources.workers, report,
            zeros_are_wrong=False, where=" in the sample",
            signed=manifest is not None and manifest.config.scale == "search",
        )  # fmt: skip
        if manifest is not None:
            check_lists(checkpoint, weights, manifest, report)
            _check_digests(chosen, readers, manifest, tools, report)
    if source is None:
        report.unchecked.append(
            "that the bytes are what the source gives: run again with --source DIRECTORY"
        )
    else:
        made = Proof(checkpoint, weights, manifest, source, tools, report, None, tuple(merging))
        _check_source(made, names)
    report.unchecked.append(
        f"{1 - report.sample.share:.1%} of the bytes, and the digests of whole files: this was a "
        "sample; without --sample all are checked"
    )
    report.findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return report


def units_of(checkpoint: Checkpoint, weights: Mapping[str, PackedWeight]) -> list[Unit]:
    """Return everything that can be chosen.

    Each companion of an incomplete weight counts as a tensor of its own.
    """
    units = [Unit(name, weight.parts()) for name, weight in weights.items()]
    in_units = {tensor.name for unit in units for _, tensor in unit.parts}
    units += [
        Unit(name, (placed,)) for name, placed in checkpoint.tensors.items() if name not in in_units
    ]
    return units


def _draw(units: list[Unit], size: float | int, seed: int) -> tuple[list[Unit], Sample]:
    """Choose a sample, and return it with the record of its size."""
    total = sum(unit.nbytes for unit in units)
    chosen = choose(units, int(size * total) if isinstance(size, float) else size, seed)
    return chosen, Sample(
        seed,
        sum(len(unit.parts) for unit in chosen),
        sum(unit.nbytes for unit in chosen),
        sum(len(unit.parts) for unit in units),
        total,
    )


def choose(units: list[Unit], nbytes: int, seed: int) -> list[Unit]:
    """Choose units at random, from every file in turn, that fit into `nbytes`, and at least one."""
    chance = random.Random(seed)
    files: dict[Path, list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: unit.name):
        files.setdefault(unit.parts[0][0].path, []).append(unit)
    queues = list(files.values())
    for queue in queues:
        chance.shuffle(queue)
    chance.shuffle(queues)
    chosen: list[Unit] = []
    left = nbytes
    while queues:
        for queue in queues:
            unit = queue.pop()
            if unit.nbytes <= left or not chosen:
                chosen.append(unit)
                left -= unit.nbytes
        queues = [queue for queue in queues if queue and left > 0]
    return chosen


def _check_digests(
    chosen: list[Unit],
    readers: ShardReaders,
    manifest: Manifest,
    tools: Tools,
    report: Report,
) -> None:
    """Compare the digests of the chosen tensors with those of the manifest."""
    expected = recorded_digests(manifest)
    lock = threading.Lock()

    def check(placed: Placed) -> None:
        shard, tensor = placed
        name = shard.path.name
        digest = digest_tensor(readers[shard], tensor, lambda count: tools.progress(name, count))
        # `check_lists` has reported a tensor that the manifest does not list.
        if digest != expected.get(tensor.name, digest):
            digests = {tensor.name: digest}
            with lock:
                report.findings += tensor_findings(name, digests, digests, expected)

    parts = [placed for unit in chosen for placed in unit.parts]
    run(parts, lambda: check, tools.resources.workers, lambda: None)
    report.check("manifest", "the sampled tensors are the ones written (xxh3_128 of the manifest)")


def _check_source(proof: Proof, names: set[str]) -> None:
    """Quantize the chosen weights again, and compare their bytes.

    Args:
        names: of the chosen weights.
    """
    manifest, report = proof.manifest, proof.report
    plan = plan_of(proof)
    if plan is not None:
        part = replace(plan, tensors=tuple(t for t in plan.tensors if t.name in names))
        found = compare(proof, part)
        add_differences(proof, found)
        compare_beside(proof.checkpoint, plan, manifest, report)
        if manifest is not None and manifest.config.feeds_back:
            report.unchecked.append(
                f"what the codes that {manifest.config.method} chose lose: run without --sample"
            )
        report.check(
            "source",
            f"the sampled tensors are those the source gives ({found.nbytes:,} bytes, quantized "
            f"again with {proof.tools.engine.name})",
        )
    if manifest is not None:
        report.unchecked.append("that the whole source is the one that the manifest names")
