"""nf4 verify: check an output, alone, with its manifest, or against its source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import common
from .common import EngineOption, JsonOption, MemoryOption, QuietOption, WorkersOption


def verify(
    path: Annotated[Path, typer.Argument(help="A 4-bit checkpoint, written by nf4 or not.")],
    source: Annotated[
        Path | None,
        typer.Option("--source", help="What it was made from: quantize again and compare."),
    ] = None,
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Check a 4-bit checkpoint; exit code 1 when something is wrong with it."""
    from .. import verify as library

    limits = common.resources(workers, memory)
    total = sum(file.stat().st_size for place in (path, source) if place for file in _shards(place))
    display = common.ProgressDisplay(total, "verifying", not (quiet or json))
    with display:
        report = library.verify(path, source, common.load_engine(engine), limits, display)
    if json:
        common.print_json(
            {
                "path": str(path),
                "ok": report.ok,
                "findings": [asdict(finding) for finding in report.findings],
                "checked": report.checked,
                "unchecked": report.unchecked,
            }
        )
    elif not quiet or not report.ok:
        console = common.out_console()
        for sentence in report.checked:
            console.print(f"[green]checked[/]  {sentence}")
        for sentence in report.unchecked:
            console.print(f"[yellow]not checked[/]  {sentence}")
        for finding in report.findings:
            console.print(f"[bold red]{finding.level}[/]  ", end="")
            console.print(finding.message, markup=False)
        if report.ok:
            console.print(f"[bold green]{path} is good[/]")
        else:
            console.print(
                f"[bold red]{path} is NOT good: {len(report.findings)} finding(s)[/]",
            )
    raise typer.Exit(0 if report.ok else 1)


def _shards(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return list(place.glob("*.safetensors")) if place.is_dir() else []
