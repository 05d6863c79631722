"""nf4 attest: write an in-toto statement about an output, which existing tools can sign."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..units import plural
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

if TYPE_CHECKING:
    from ..proof.attest import Attestation


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
    from ..checkpoint.discovery import require_output
    from ..errors import UsageError

    to_stdout = str(file) == "-"
    if to_stdout and json:
        raise UsageError("- and --json both want stdout: name a FILE, or leave --json out")
    require_output(output)  # before what attests is imported

    from ..api.attesting import state
    from ..checkpoint.atomic_file import AtomicFile

    place = file or _beside(output)
    with ExitStack() as stack:
        target = None
        if not to_stdout:
            apart = [path for path in (output, source) if path is not None and path.is_dir()]
            target = stack.enter_context(AtomicFile(place, "FILE", apart, replace=False))
        machine = engine_choice.machine(engine, device, workers, memory, TerminalListener(quiet))
        made = state(output, source, builder_id, machine)
        if made.statement is not None and target is not None:
            target.write(made.to_bytes())
    for sentence in made.notes:
        terminal.note(sentence)
    if json:
        terminal.print_json("attest", _document(made, output, source, place))
    elif made.statement is None:
        views.print_verdict(terminal.out_console(), made.findings, str(output))
    elif to_stdout:
        sys.stdout.write(made.to_bytes().decode())
    elif not quiet:
        _print_next(place, len(made.statement["subject"]), output)
    raise typer.Exit(0 if made.statement is not None else 1)


def _beside(output: Path) -> Path:
    """Return the default file, beside the output: it cannot be one of the files that it states."""
    whole = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() fails on loops
    parent = output.parent if output.name == whole.name else whole.parent
    return parent / f"{whole.name}.intoto.json"


def _document(
    made: Attestation, output: Path, source: Path | None, place: Path
) -> dict[str, object]:
    """Return the document of --json."""
    ok = made.statement is not None
    return {
        "path": str(output),
        "source": str(source) if source else None,
        "ok": ok,
        "statement": str(place) if ok else None,
        "subjects": len(made.statement["subject"]) if made.statement else 0,
        "notes": made.notes,
        "findings": views.finding_documents(made.findings),
    }


def _print_next(place: Path, subjects: int, output: Path) -> None:
    """Print what was written, and the command that signs it."""
    from ..checkpoint.file_io import name_of

    console = terminal.out_console()
    count = plural(subjects, "file")
    console.print(f"[bold]{terminal.plain(place)}[/]: {count}; nobody has signed it yet")
    console.print(
        f"next    cosign attest-blob --statement {terminal.plain(place)} "
        f"--bundle {terminal.plain(name_of(output))}.sigstore.json"
    )
