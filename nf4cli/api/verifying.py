"""nf4cli.proof.verify: an output alone, with its manifest, or against its source."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.discovery import MANIFEST
from ..checkpoint.file_io import name_of
from ..checkpoint.reader import count_tensors
from ..convert.listener import Stage
from ..errors import InputError, UsageError
from ..output.manifest import Manifest
from ..output.report import Report
from ..planning.pipeline_plan import is_pipeline, part_shards
from ..proof.pipelines import verify_pipeline
from ..proof.sample import verify_sample
from ..proof.verify import verify as verify_checkpoint
from . import sources
from .machine import Machine
from .verifying_bounded import Bounded


@dataclass(frozen=True)
class Check:
    """What shall be verified, and how.

    Attributes:
        path: a 4-bit checkpoint or pipeline, written by nf4 or not; a model of the Hub.
        source: what it was made from, for the proof.
        calibration: text to measure again what the output records of its calibration.
        sample: share (0.05) of the weights, or bytes (an int), to look at; None for all.
        seed: of the sample, None for another one every time.
        disk: bytes that may lie on the disk at once, None for no bound.

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


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        path, source: that were looked at, where they lie.
        called: what a user reads of `path`.
        name: what the report of the whole is called.
        own: the report of a checkpoint, or of what a pipeline has beside its components.
        parts: by component of a pipeline.
    """

    path: Path
    source: Path | None
    called: str
    name: str
    own: Report
    parts: Mapping[str, Report]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return all(report.ok for report in (self.own, *self.parts.values()))

    @property
    def reports(self) -> dict[str, Report]:
        """Every report, by what it is of."""
        return {
            self.name: self.own,
            **{f"{self.name}/{part}": report for part, report in self.parts.items()},
        }


def check(asked: Check) -> Verified:
    """Verify.

    Raises:
        UsageError, InputError, MachineError: it cannot be verified at all.
    """
    machine, path, source = asked.machine, asked.path, asked.source
    if asked.disk is not None and source is not None:
        own, called = Bounded(asked.disk, machine).prove(path, source)
        return Verified(path, source, called, called, own, {})
    path = sources.local(asked.path, machine.listener)
    called = sources.shown(asked.path, path)
    against = called
    if source is not None:
        source = sources.as_recorded(source, _manifest_of(path), machine.listener.note)
        named, source = source, sources.local(source, machine.listener)
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


def _look(
    asked: Check, path: Path, source: Path | None, against: str
) -> tuple[Report, Mapping[str, Report]]:
    """Return the report of the whole, and those of a pipeline's components."""
    machine, pipeline = asked.machine, is_pipeline(path)
    if asked.sample is not None and pipeline:
        raise UsageError(
            f"--sample looks at one checkpoint and {path} is a pipeline: give a component's "
            "directory, like its transformer or unet"
        )
    engine = machine.engine
    limits = machine.resources(_weights(path, source) if machine.memory else 0)
    places = [place for place in (path, source) if place]
    total = sum(file.stat().st_size for place in places for file in part_shards(place))
    with machine.listener.stage(Stage("verifying", total, against)) as progress:
        if asked.sample is not None:
            seed = asked.seed
            if seed is None:
                seed = random.SystemRandom().randrange(10**6)
            return verify_sample(path, source, asked.sample, seed, engine, limits, progress), {}
        if pipeline:
            found = verify_pipeline(path, source, engine, limits, progress)
            return found.own, found.parts
        return verify_checkpoint(path, source, engine, limits, progress), {}


def _manifest_of(path: Path) -> Manifest | None:
    """Return an output's manifest; None where there is none, or a damaged one, which is reported
    later."""
    place = path / MANIFEST
    with suppress(InputError):
        return Manifest.from_file(place) if place.is_file() else None
    return None


def _weights(path: Path, source: Path | None) -> int:
    """Return how many weights verifying holds in memory.

    Every tensor of the source counts as a weight.  Of the output's tensors, every eighth does: a
    packed weight has six, and of each little more than its entry in the header is held.
    """
    counts = [0, 0]
    for number, place in enumerate((path, source)):
        for file in part_shards(place) if place else ():
            with suppress(InputError):  # reported where the checkpoint is opened
                counts[number] += count_tensors(file)
    return counts[0] // 8 + counts[1]
