"""nf4 verify: check an output alone, by its manifest, or against its source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..errors import UsageError
from . import engine_choice, options, panels, step_summary
from .options import (
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    RayOption,
    WorkersOption,
)
from .show import terminal, views
from .show.listener import TerminalListener

if TYPE_CHECKING:
    from ..api.verifying import Verified


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
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            show_default=False,
            help="With --source: the adapter that was merged",
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
    ray: RayOption = None,
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
    from ..api.verifying import Check, check
    from .junit_file import JUnitFile  # it needs an XML library, --help does not

    asked = Check(
        path,
        source,
        tuple(calibration or ()),
        None if sample is None else _amount(sample),
        seed,
        None if disk is None else options.parse_size(disk, "--disk"),
        engine_choice.machine(engine, device, workers, memory, TerminalListener(quiet), ray),
        tuple(adapter or ()),
    )
    with JUnitFile(junit, path, source) as report_file:
        done = check(asked)
        report_file.write(done.reports)
    _conclude(done, json, quiet)


def _amount(sample: str) -> float | int:
    """Return the part to check: a share from "5%", or bytes from "500MB".

    Raises:
        UsageError: the text is neither.
    """
    if not sample.strip().endswith("%"):
        return options.parse_size(sample, "--sample")
    try:
        return float(sample.strip()[:-1]) / 100
    except ValueError as error:
        raise UsageError(f"--sample {sample!r} is no share: write 5%, or a size") from error


def _conclude(done: Verified, json: bool, quiet: bool) -> NoReturn:
    """Show the result, and end the command with its exit code."""
    from .step_summary import verification_section

    step_summary.append(lambda: verification_section(done.called, done.reports))
    if json:
        document = {
            "path": str(done.path),
            "source": str(done.source) if done.source else None,
            **views.report_document(done.own),
            "ok": done.ok,
        }
        if done.parts:
            document["components"] = {
                name: views.report_document(report) for name, report in done.parts.items()
            }
        terminal.print_json("verify", document)
    elif not quiet or not done.ok:
        console = terminal.out_console()
        for name, report in [*done.parts.items(), ("", done.own)]:
            if name and not quiet:
                console.print(f"[bold]{terminal.plain(name)}[/]")
            if not quiet:
                views.print_checks(console, report)
        findings = [f for r in (done.own, *done.parts.values()) for f in r.findings]
        views.print_verdict(console, findings, done.called, done.own.sample)
    raise typer.Exit(0 if done.ok else 1)
