"""nf4 verify: check an output, alone, with its manifest, or against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import common, step_summary, views
from .common import (
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    WorkersOption,
)
from .junit_file import JUnitFile


def verify(
    path: Annotated[Path, typer.Argument(help="A 4-bit checkpoint, written by nf4 or not.")],
    source: Annotated[
        Path | None,
        typer.Option("--source", help="What it was made from: quantize again and compare."),
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", metavar="FILE", help="Write a JUnit XML report there as well."),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a 4-bit checkpoint; exit code 1 when something is wrong with it."""
    from ..assembly import part_shards, verify_pipeline
    from ..diffusion import is_pipeline
    from ..summary import verification_section
    from ..verify import verify as verify_checkpoint

    with JUnitFile(junit, path, source) as report_file:
        chosen = common.load_engine(engine, device, quiet, memory)
        limits = common.resources(chosen, workers, memory)
        places = [place for place in (path, source) if place]
        total = sum(f.stat().st_size for place in places for f in part_shards(place))
        display = common.ProgressDisplay(total, "verifying", not (quiet or json))
        with display:
            if is_pipeline(path):
                pipeline = verify_pipeline(path, source, chosen, limits, display)
                own, parts = pipeline.own, pipeline.parts
            else:
                own, parts = verify_checkpoint(path, source, chosen, limits, display), {}
        name = common.name_of(path)
        named = {name: own, **{f"{name}/{part}": report for part, report in parts.items()}}
        report_file.write(named)
    step_summary.append(lambda: verification_section(path, named))
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
        views.print_verdict(console, [f for r in reports for f in r.findings], path)
    raise typer.Exit(0 if ok else 1)
