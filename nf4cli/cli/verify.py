"""nf4 verify: check an output, alone, with its manifest, or against its source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common
from .common import EngineOption, JsonOption, MemoryOption, QuietOption, WorkersOption

if TYPE_CHECKING:
    from rich.console import Console

    from ..report import Report

_SHOWN = 20  # findings printed


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
                "checks": [asdict(check) for check in report.checks],
                "unchecked": report.unchecked,
                "findings": [asdict(finding) for finding in report.findings],
            }
        )
    elif not quiet or not report.ok:
        _print_report(common.out_console(), report, path, quiet)
    raise typer.Exit(0 if report.ok else 1)


def _print_report(console: Console, report: Report, path: Path, quiet: bool) -> None:
    if not quiet:
        for check in report.checks:
            mark = "[green]ok[/]    " if check.ok else "[bold red]FAILED[/]"
            console.print(f"{mark}  {common.plain(check.what)}")
        for sentence in report.unchecked:
            console.print(f"[yellow]not checked:[/] {common.plain(sentence)}")
    for finding in report.findings[:_SHOWN]:
        console.print(f"[bold red]{finding.level}[/]  {common.plain(finding.message)}")
    hidden = len(report.findings) - _SHOWN
    if hidden > 0:
        console.print(f"... and {common.plural(hidden, 'finding')} more; --json has them all")
    if report.ok:
        console.print(f"[bold green]{common.plain(path)} is good[/]")
    else:
        found = common.plural(len(report.findings), "finding")
        console.print(f"[bold red]{common.plain(path)} is NOT good: {found}[/]")


def _shards(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    return [path for path in place.glob("*.safetensors") if path.is_file()]
