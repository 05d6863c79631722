"""nf4 write-text: have a model write text, to calibrate it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..units import plural
from . import engine_choice
from .options import QuietOption, TorchDeviceOption, TorchDtypeOption
from .show import terminal
from .show.listener import TerminalListener


def write_text(
    model: Annotated[
        Path, typer.Argument(help="A language model: a directory, or org/name on the Hub")
    ],
    file: Annotated[Path, typer.Argument(help="A .jsonl file to write, one document a line")],
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="Tokens to write, at least")
    ] = 40_000,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the random numbers")] = 0,
    dtype: TorchDtypeOption = "auto",
    device: TorchDeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Have a model write text, to calibrate it on without data (extra: calibrate)."""
    from ..api.writing import Writing, write

    machine = engine_choice.machine("auto", None, None, None, TerminalListener(quiet))
    done = write(Writing(model, file, tokens, seed, dtype, device, machine))
    if quiet:
        return
    console = terminal.out_console()
    name = terminal.plain(str(done.file))
    console.print(f"{plural(done.documents, 'document')} in {name}", soft_wrap=True)
    console.print(
        f"next    nf4 quantize {terminal.plain(done.called)} --calibration {name}", soft_wrap=True
    )
