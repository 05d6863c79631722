"""nf4 verify: check an output, alone, with its manifest, or against its source."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..errors import InputError, UsageError
from . import common, hub, panels, step_summary, views
from .bounded import Bounded
from .calibrating import prove
from .common import (
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    WorkersOption,
)
from .junit_file import JUnitFile
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..engines import Engine
    from ..limits import Resources
    from ..manifest import Manifest
    from ..report import Report


def verify(
    path: Annotated[Path, typer.Argument(help="A 4-bit checkpoint, here or org/name on the Hub")],
    source: Annotated[
        Path | None,
        typer.Option(
            "--source",
            metavar="PATH",
            help="Its source: quantize it again and compare",
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="PATH",
            show_default=False,
            help="With --source: measure on this text again",
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            metavar="SIZE",
            help="Only random tensors, like 5% or 500MB",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="N", help="Choose the --sample by this seed", min=0),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            metavar="SIZE",
            show_default=False,
            help="With --source: disk space to use at most",
        ),
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    junit: Annotated[
        Path | None,
        typer.Option(
            "--junit",
            metavar="FILE",
            help="Also write a JUnit XML report there",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a 4-bit checkpoint; exit code 1 when something is wrong with it."""
    from ..assembly import part_shards, verify_pipeline
    from ..diffusion import is_pipeline
    from ..verify import verify as verify_checkpoint

    if seed is not None and sample is None:
        raise UsageError("--seed needs --sample")
    if calibration and (source is None or sample is not None):
        raise UsageError("--calibration needs --source, and does not go with --sample")
    if disk is not None:
        if source is None or calibration or sample is not None:
            raise UsageError(
                "--disk needs --source, and goes with neither --calibration nor --sample"
            )
        limit = common.parse_size(disk, "--disk")
        with JUnitFile(junit, path, source) as report_file:
            chosen = common.load_engine(engine, device, quiet, memory)
            own, called = Bounded(limit, chosen, workers, memory, quiet).prove(path, source)
            report_file.write({called: own})
        _conclude(path, source, called, {called: own}, own, {}, json, quiet)
    asked, path = path, hub.local(path, quiet)
    called = hub.shown(asked, path)
    name = common.name_of(path) if path == asked else called
    if source is not None:
        source = hub.as_recorded(source, _manifest_of(path), common.notices(quiet))
    asked, source = source or Path(), source and hub.local(source, quiet)
    against = f"{called} against {hub.shown(asked, source)}" if source else called
    with JUnitFile(junit, path, source) as report_file:
        chosen = common.load_engine(engine, device, quiet, memory)
        limits = common.resources(chosen, workers, memory, _weights(path, source) if memory else 0)
        places = [place for place in (path, source) if place]
        total = sum(f.stat().st_size for place in places for f in part_shards(place))
        display = ProgressDisplay(total, "verifying", not quiet, what=against)
        with display:
            if sample is not None:
                own, parts = _look(path, source, sample, seed, chosen, limits, display), {}
            elif is_pipeline(path):
                pipeline = verify_pipeline(path, source, chosen, limits, display)
                own, parts = pipeline.own, pipeline.parts
            else:
                own, parts = verify_checkpoint(path, source, chosen, limits, display), {}
        if calibration and source:
            prove(calibration, path, source, chosen, quiet, own)
        named = {name: own, **{f"{name}/{part}": report for part, report in parts.items()}}
        report_file.write(named)
    _conclude(path, source, called, named, own, parts, json, quiet)


def _manifest_of(path: Path) -> Manifest | None:
    """The manifest of an output; None where there is none, or a damaged one, which is reported
    later."""
    from ..manifest import Manifest
    from ..source import MANIFEST

    place = path / MANIFEST
    with suppress(InputError):
        return Manifest.from_file(place) if place.is_file() else None
    return None


def _conclude(
    path: Path,
    source: Path | None,
    called: str,
    named: Mapping[str, Report],
    own: Report,
    parts: Mapping[str, Report],
    json: bool,
    quiet: bool,
) -> NoReturn:
    """Say what was found, and end the command.

    Args:
        called: what a user reads of `path`.
        named: every report, by what it is of.
        own, parts: the same, by component of a pipeline.
    """
    from ..summary import verification_section

    step_summary.append(lambda: verification_section(called, named))
    reports = [own, *parts.values()]
    ok = all(report.ok for report in reports)
    if json:
        document = {
            "path": str(path),
            "source": str(source) if source else None,
            **views.report_document(own),
            "ok": ok,
        }
        if parts:
            document["components"] = {n: views.report_document(r) for n, r in parts.items()}
        common.print_json("verify", document)
    elif not quiet or not ok:
        console = common.out_console()
        for name, report in [*parts.items(), ("", own)]:
            if name and not quiet:
                console.print(f"[bold]{common.plain(name)}[/]")
            if not quiet:
                views.print_checks(console, report)
        findings = [f for r in reports for f in r.findings]
        views.print_verdict(console, findings, called, own.sample)
    raise typer.Exit(0 if ok else 1)


def _look(
    path: Path,
    source: Path | None,
    sample: str,
    seed: int | None,
    engine: Engine,
    limits: Resources,
    display: ProgressDisplay,
) -> Report:
    from ..diffusion import is_pipeline
    from ..sample import verify_sample

    if is_pipeline(path):
        raise UsageError(
            f"--sample looks at one checkpoint and {path} is a pipeline: give a component's "
            "directory, like its transformer or unet"
        )
    size: float | int
    if sample.strip().endswith("%"):
        try:
            size = float(sample.strip()[:-1]) / 100
        except ValueError as error:
            raise UsageError(f"--sample {sample!r} is no share: write 5%, or a size") from error
    else:
        size = common.parse_size(sample, "--sample")
    if seed is None:
        seed = random.SystemRandom().randrange(10**6)
    return verify_sample(path, source, size, seed, engine, limits, display)


def _weights(path: Path, source: Path | None) -> int:
    """Weights to keep in mind: those of the source, and those of the output, whose packed ones are
    six tensors each, known by little more than their headers."""
    from ..assembly import part_shards
    from ..reader import read_shard

    counts = [0, 0]
    for number, place in enumerate((path, source)):
        for file in part_shards(place) if place else ():
            with suppress(InputError):  # reported where the checkpoint is opened
                counts[number] += len(read_shard(file).tensors)
    return counts[0] // 8 + counts[1]
