"""nf4 verify: check an output, alone, with its manifest, or against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import common, views
from .common import (
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    WorkersOption,
)


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
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a 4-bit checkpoint; exit code 1 when something is wrong with it."""
    from ..assembly import part_shards, verify_pipeline
    from ..diffusion import is_pipeline
    from ..verify import verify as verify_checkpoint

    chosen = common.load_engine(engine, device, quiet, memory)
    limits = common.resources(chosen, workers, memory)
    total = sum(f.stat().st_size for place in (path, source) if place for f in part_shards(place))
    display = common.ProgressDisplay(total, "verifying", not (quiet or json))
    with display:
        if is_pipeline(path):
            pipeline = verify_pipeline(path, source, chosen, limits, display)
            own, parts = pipeline.own, pipeline.parts
        else:
            own, parts = verify_checkpoint(path, source, chosen, limits, display), {}
    reports = [own, *parts.values()]
    ok = all(report.ok for report in reports)
    if json:
        document = {"path": str(path), **views.report_document(own), "ok": ok}
        if parts:
            document["components"] = {n: views.report_document(r) for n, r in parts.items()}
        common.print_json(document)
    elif not quiet or not ok:
        console = common.out_console()
        for name, report in [*parts.items(), ("", own)]:
            if name and not quiet:
                console.print(f"[bold]{common.plain(name)}[/]")
            if not quiet:
                views.print_checks(console, report)
        views.print_verdict(console, [f for r in reports for f in r.findings], path)
    raise typer.Exit(0 if ok else 1)
