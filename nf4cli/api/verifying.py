"""Check an output alone, by its manifest, or against its source: the work of `nf4cli.verify`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.discovery import MANIFEST
from ..checkpoint.file_io import name_of
from ..checkpoint.reader import count_tensors
from ..convert.listener import Stage
from ..errors import InputError, UsageError
from . import sources
from .adapters import as_merged
from .machine import Machine
from .verifying_bounded import Bounded

# What reads and checks is imported where it is used: it needs numpy, a refusal does not.
if TYPE_CHECKING:
    from ..checkpoint.adapter_files import Adapter
    from ..output.manifest import Manifest
    from ..output.report import Report


@dataclass(frozen=True)
class Check:
    """What to verify, and how.

    Attributes:
        path: a 4-bit checkpoint or pipeline, written by nf4 or not, here or on the Hub.
        source: what it was made from, None for a check of the output alone.
        calibration: text files, to calibrate again and compare with the output's record.
        sample: the part to check, as a share (0.05) or in bytes (an int); None for all.
        seed: chooses the sample, None for another one every time.
        disk: most bytes that may lie on the disk at once, None for no limit.
        machine: quantizes again.
        adapters: those that were merged before the weights were quantized, in order.

    Raises:
        UsageError: options that do not go together.
    """

    path: Path
    source: Path | None = None
    calibration: Sequence[Path] = ()
    sample: float | int | None = None
    seed: int | None = None
    disk: int | None = None
    machine: Machine = field(default_factory=Machine)
    adapters: Sequence[Path] = ()

    def __post_init__(self) -> None:
        if self.seed is not None and self.sample is None:
            raise UsageError("--seed needs --sample")
        if self.calibration and (self.source is None or self.sample is not None):
            raise UsageError("--calibration needs --source, and does not go with --sample")
        if self.disk is not None and (
            self.source is None or self.calibration or self.sample is not None
        ):
            raise UsageError(
                "--disk needs --source, and goes with neither --calibration nor --sample"
            )
        if self.adapters and self.source is None:
            raise UsageError("--adapter needs --source, the base that it was merged into")
        if self.machine.ray is not None:
            for option, given in (
                ("--calibration", self.calibration or None), ("--sample", self.sample),
                ("--disk", self.disk),
            ):  # fmt: skip
                if given is not None:
                    raise UsageError(f"{option} is for one machine: leave it or --ray out")


@dataclass(frozen=True)
class Verified:
    """The result of a verification.

    Attributes:
        path, source: the output and its source, where they lie on this machine.
        called: what messages call the output.
        name: the name of its own report.
        own: report of a checkpoint; of a pipeline, of its files beside the components.
        parts: reports by component of a pipeline.
    """

    path: Path
    source: Path | None
    called: str
    name: str
    own: Report
    parts: Mapping[str, Report]

    @property
    def ok(self) -> bool:
        """Return whether nothing is wrong."""
        return all(report.ok for report in (self.own, *self.parts.values()))

    @property
    def reports(self) -> dict[str, Report]:
        """Every report by its name."""
        return {
            self.name: self.own,
            **{f"{self.name}/{part}": report for part, report in self.parts.items()},
        }


def check(asked: Check) -> Verified:
    """Verify an output.

    Raises:
        UsageError, InputError, MachineError: it cannot be verified at all.
    """
    machine, path, source = asked.machine, asked.path, asked.source
    if asked.disk is not None and source is not None:
        own, called = Bounded(asked.disk, machine, asked.adapters).prove(path, source)
        return Verified(path, source, called, called, own, {})
    _require_there(asked)
    path = sources.shared(asked.path, machine)
    called = sources.shown(asked.path, path)
    against = called
    if source is not None:
        source = sources.as_recorded(source, _manifest_of(path), machine.listener.note)
        named, source = source, sources.shared(source, machine)
        against = f"{called} against {sources.shown(named, source)}"
    own, parts = _look(asked, path, source, against)
    if asked.calibration and source:
        from ..quality.calibration.run import prove

        prove(
            asked.calibration, path, source, machine.engine, machine.device, own, machine.listener
        )
    return Verified(
        path, source, called, name_of(path) if path == asked.path else called, own, parts
    )


def _require_there(asked: Check) -> None:
    """Refuse a path where nothing is, shown as a verification that has begun.

    Raises:
        InputError: there is neither a path nor a name on the Hub.
    """
    if sources.is_there(asked.path):
        return
    if asked.source is None and asked.sample is None:
        with asked.machine.listener.stage(Stage("verifying", 0, str(asked.path))):
            sources.require_there(asked.path)


def _look(
    asked: Check, path: Path, source: Path | None, against: str
) -> tuple[Report, Mapping[str, Report]]:
    """Return the report of the whole, and those of a pipeline's components."""
    from ..planning.pipeline_plan import is_pipeline, part_shards

    machine, pipeline = asked.machine, is_pipeline(path)
    if asked.sample is not None and pipeline:
        raise UsageError(
            f"--sample looks at one checkpoint and {path} is a pipeline: give a component's "
            "directory, like its transformer or unet"
        )
    engine, merging = machine.engine, () if pipeline else _merging(asked, path)
    weights = _weights(path, source) if machine.memory else 0
    limits = machine.resources(weights, merged=_largest(merging))
    places = [place for place in (path, source) if place]
    total = sum(file.stat().st_size for place in places for file in part_shards(place))
    stage = Stage("verifying", total, against, crowd=machine.crowd)
    with machine.listener.stage(stage) as progress:
        if asked.sample is not None:
            from ..proof.sample import verify_sample

            seed = asked.seed
            if seed is None:
                seed = random.SystemRandom().randrange(10**6)
            return verify_sample(
                path, source, asked.sample, seed, engine, limits, progress, merging
            ), {}
        if pipeline:
            if asked.adapters:
                raise UsageError(f"{path} is a pipeline, which no adapter is merged into")
            from ..proof.pipelines import verify_pipeline

            proof = verify_pipeline(path, source, engine, limits, progress, machine.cluster)
            return proof.own, proof.parts
        from ..proof.verify import verify as verify_checkpoint

        report = verify_checkpoint(
            path, source, engine, limits, progress, cluster=machine.cluster,
            merging=merging,
        )  # fmt: skip
        return report, {}


def _largest(merging: tuple[Adapter, ...]) -> int:
    from ..checkpoint.adapter_files import largest_matrix

    return largest_matrix(merging)


def _merging(asked: Check, path: Path) -> tuple[Adapter, ...]:
    """Return the adapters that the source's weights are merged with before they are compared.

    Raises:
        UsageError, InputError, MachineError: see `as_merged`.
    """
    if asked.source is None:
        return ()
    return as_merged(asked.adapters, _manifest_of(path), asked.machine)


def _manifest_of(path: Path) -> Manifest | None:
    """Return an output's manifest; None where it is missing or damaged, which is reported later."""
    from ..output.manifest import Manifest

    place = path / MANIFEST
    with suppress(InputError):
        return Manifest.from_file(place) if place.is_file() else None
    return None


def _weights(path: Path, source: Path | None) -> int:
    """Return how many weights verifying holds in memory.

    Every tensor of the source counts as a weight.  Of the output's tensors, every eighth does: a
    packed weight has six, and of each little more than its entry in the header is held.
    """
    from ..planning.pipeline_plan import part_shards

    counts = [0, 0]
    for number, place in enumerate((path, source)):
        for file in part_shards(place) if place else ():
            with suppress(InputError):  # reported where the checkpoint is opened
                counts[number] += count_tensors(file)
    return counts[0] // 8 + counts[1]
