"""nf4 attest: an in-toto statement for an output, to be signed by existing tools."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import engine_choice
from .options import (  # fmt: skip
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    WorkersOption,
)
from .show import terminal, views
from .show.listener import TerminalListener
from .show.progress import ProgressDisplay

if TYPE_CHECKING:
    from ..engines.protocol import Engine
    from ..output.report import Finding
    from ..planning.resources import Resources


def attest(
    output: Annotated[
        Path, typer.Argument(help="A directory that nf4 quantize wrote", show_default=False)
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            help="New file; - is stdout. Default: OUTPUT.intoto.json beside it",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--source", metavar="PATH", help="Its source: prove it first, as verify does"),
    ] = None,
    builder_id: Annotated[
        str | None,
        typer.Option(
            "--builder-id",
            metavar="URI",
            show_default=False,
            help="SLSA's builder.id: who ran the conversion",
        ),
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write an unsigned statement of what an output is and was made from (SLSA).

    Every file is read first. Unless all are what the manifest says, no
    statement is written (exit code 1).
    """
    from ..checkpoint.atomic_file import AtomicFile
    from ..checkpoint.file_io import name_of
    from ..errors import UsageError
    from ..planning.pipeline_plan import part_shards
    from ..proof.attest import SELF_ATTESTED, Attestation
    from ..proof.attest import attest as make_statement

    to_stdout = str(file) == "-"
    if to_stdout and json:
        raise UsageError("- and --json both want stdout: name a FILE, or leave --json out")
    place = file or _beside(output)
    reading = [output, *([source] if source else [])]
    with ExitStack() as stack:
        target = None
        if not to_stdout:
            apart = [p for p in reading if p.is_dir()]
            target = stack.enter_context(AtomicFile(place, "FILE", apart, replace=False))
        machine = engine_choice.machine(
            engine if source else "cpu", device, workers, memory, TerminalListener(quiet)
        )
        chosen, limits = machine.engine, machine.resources()
        total = sum(f.stat().st_size for p in reading for f in part_shards(p))
        display = ProgressDisplay(
            total * (2 if source else 1), "attesting", not quiet, what=str(output)
        )
        with display:
            findings = _proof(output, source, chosen, limits, display) if source else []
            made = (
                Attestation(findings=findings)
                if findings
                else make_statement(
                    output, source, builder_id or SELF_ATTESTED, limits.workers, display
                )
            )
        if made.statement is not None and target is not None:
            target.write(made.to_bytes())
    for sentence in made.notes:
        terminal.note(sentence)
    ok = made.statement is not None
    if json:
        terminal.print_json("attest", {
            "path": str(output),
            "source": str(source) if source else None,
            "ok": ok,
            "statement": str(place) if ok else None,
            "subjects": len(made.statement["subject"]) if made.statement else 0,
            "notes": made.notes,
            "findings": views.finding_documents(made.findings),
        })  # fmt: skip
    elif not ok:
        views.print_verdict(terminal.out_console(), made.findings, str(output))
    elif to_stdout:
        sys.stdout.write(made.to_bytes().decode())
    elif not quiet and made.statement is not None:
        console = terminal.out_console()
        count = terminal.plural(len(made.statement["subject"]), "file")
        console.print(f"[bold]{terminal.plain(place)}[/]: {count}; nobody has signed it yet")
        console.print(
            f"next    cosign attest-blob --statement {terminal.plain(place)} "
            f"--bundle {terminal.plain(name_of(output))}.sigstore.json"
        )
    raise typer.Exit(0 if ok else 1)


def _beside(output: Path) -> Path:
    """Not inside: a statement cannot be one of the files that it speaks of."""
    whole = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() fails on loops
    parent = output.parent if output.name == whole.name else whole.parent
    return parent / f"{whole.name}.intoto.json"


def _proof(
    output: Path,
    source: Path,
    engine: Engine,
    resources: Resources,
    display: ProgressDisplay,
) -> list[Finding]:
    """What nf4 verify --source finds."""
    from ..planning.pipeline_plan import is_pipeline
    from ..proof.pipelines import verify_pipeline
    from ..proof.verify import verify

    if is_pipeline(output):
        found = verify_pipeline(output, source, engine, resources, display)
        return [f for report in (found.own, *found.parts.values()) for f in report.findings]
    return verify(output, source, engine, resources, display).findings
