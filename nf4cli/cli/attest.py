"""nf4 attest: an in-toto statement for an output, to be signed by existing tools."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common, views
from .common import (
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    WorkersOption,
)  # fmt: skip
from .listener import TerminalListener
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..engines import Engine
    from ..limits import Resources
    from ..report import Finding


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
    from ..assembly import part_shards
    from ..atomic_file import AtomicFile
    from ..attest import SELF_ATTESTED, Attestation
    from ..attest import attest as make_statement
    from ..errors import UsageError
    from ..fileio import name_of

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
        machine = common.machine(
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
        common.note(sentence)
    ok = made.statement is not None
    if json:
        common.print_json("attest", {
            "path": str(output),
            "source": str(source) if source else None,
            "ok": ok,
            "statement": str(place) if ok else None,
            "subjects": len(made.statement["subject"]) if made.statement else 0,
            "notes": made.notes,
            "findings": views.finding_documents(made.findings),
        })  # fmt: skip
    elif not ok:
        views.print_verdict(common.out_console(), made.findings, str(output))
    elif to_stdout:
        sys.stdout.write(made.to_bytes().decode())
    elif not quiet and made.statement is not None:
        console = common.out_console()
        count = common.plural(len(made.statement["subject"]), "file")
        console.print(f"[bold]{common.plain(place)}[/]: {count}; nobody has signed it yet")
        console.print(
            f"next    cosign attest-blob --statement {common.plain(place)} "
            f"--bundle {common.plain(name_of(output))}.sigstore.json"
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
    from ..assembly import verify_pipeline
    from ..diffusion import is_pipeline
    from ..verify import verify

    if is_pipeline(output):
        found = verify_pipeline(output, source, engine, resources, display)
        return [f for report in (found.own, *found.parts.values()) for f in report.findings]
    return verify(output, source, engine, resources, display).findings
