"""nf4 plan: choose a format for each module within a budget, and write the choice as a recipe."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..quality.calibration.defaults import DAMPING, TOKENS
from ..quality.calibration.run import Calibrating
from ..units import format_size, plural
from . import completion, engine_choice, panels
from .options import (
    DeviceOption,
    EngineOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    SourceArgument,
    WorkersOption,
    parse_size,
)
from .show import terminal
from .show.listener import TerminalListener
from .show.rows import Row, print_rows

if TYPE_CHECKING:
    from rich.console import Console

    from ..api.allocating import Allocated

_SHOWN = 12
_LENGTH = 256
"""Default: tokens of a window. Shorter ones than those of quantize are more samples of a text."""


def plan(
    source: SourceArgument,
    recipe: Annotated[
        Path | None,
        typer.Argument(help="New file. Default: NAME.recipe.toml here", show_default=False),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            metavar="X",
            show_default=False,
            help="Bits a weight of linear layers, with scales",
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            "--max-size",
            metavar="SIZE",
            show_default=False,
            help="Size of all output shards, like 6GB",
        ),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="X",
            show_default=False,
            help="KL divergence; needs --calibration",
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="PATH",
            show_default=False,
            help="Text to measure modules on; repeatable",
            rich_help_panel=panels.MEASURING,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int,
        typer.Option(
            "--calibration-tokens",
            metavar="N",
            help="Tokens to run",
            rich_help_panel=panels.MEASURING,
        ),
    ] = TOKENS,
    calibration_length: Annotated[
        int,
        typer.Option(
            "--calibration-length",
            metavar="N",
            help="Tokens per window",
            rich_help_panel=panels.MEASURING,
        ),
    ] = _LENGTH,
    scale: Annotated[
        str,
        typer.Option(
            "--scale",
            metavar="NAME",
            show_default=False,
            help="As quantize will: absmax (default), search",
            rich_help_panel=panels.MEASURING,
            autocompletion=completion.scales,
        ),
    ] = "absmax",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="NAME",
            show_default=False,
            help="As quantize will: the loader",
            rich_help_panel=panels.KEPT,
            autocompletion=completion.targets,
        ),
    ] = "transformers",
    keep: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            metavar="GLOB",
            show_default=False,
            help="As quantize will: left in float in any case",
            rich_help_panel=panels.KEPT,
        ),
    ] = None,
    workers: WorkersOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    memory: MemoryOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose each module's bits within a budget, and write them as a recipe."""
    from ..checkpoint.atomic_file import AtomicFile
    from ..checkpoint.discovery import name_of_directory
    from ..format.config import QuantConfig

    listener = TerminalListener(quiet)
    place = recipe or Path(f"{name_of_directory(source)}.recipe.toml")
    size = None if max_size is None else parse_size(max_size, "--max-size")
    calibrating = Calibrating.of(calibration, calibration_tokens, calibration_length, DAMPING, None)
    config = QuantConfig(scale=scale, target=target, keep=tuple(keep or ()))
    machine = engine_choice.machine(engine, device, workers, memory, listener)
    with AtomicFile(place, "RECIPE", replace=False) as file:
        from ..api.allocating import Budget, allocated

        budget = Budget(bits, size, max_kl)
        done = allocated(source, budget, config, calibrating, machine)
        file.write(done.text.encode())
    for sentence in _doubts(done):
        listener.note(sentence)
    if json:
        terminal.print_json("recipe", _document(done, place))
    elif not quiet:
        _print(terminal.out_console(), done, place, source)


def _doubts(done: Allocated) -> list[str]:
    """Return what a user should know before trusting the recipe."""
    if done.method != "text" or done.uniform is None or (done.saved and done.saved[0] > 0):
        return []
    why = "there is one window of it"
    if done.saved is not None:
        low, high = done.saved
        why = f"it saves {low:.0%} to {high:.0%} of the loss (95%)"
    return [
        f"the text is too short to tell this choice from the uniform one: {why}. Give more "
        "--calibration-tokens"
    ]


def _document(done: Allocated, place: Path) -> dict[str, Any]:
    check = done.check
    return {
        "recipe": str(place), "bits": done.bits, "shard_bytes": done.plan.shard_bytes,
        "method": done.method, "loss": done.loss, "bound": done.bound,
        "uniform": None if done.uniform is None else {
            "blocksize": done.uniform[0], "double_quant": done.uniform[1],
            "loss": done.uniform_loss,
        },
        "saved": None if done.saved is None else list(done.saved),
        "check": None if check is None else {
            "correlation": check.correlation, "factor": check.factor,
            "estimated": dict(check.estimated), "measured": dict(check.measured),
        },
        "modules": [
            {
                "modules": list(module.paths), "elements": module.elements,
                "bits": 8 * module.nbytes / module.elements, "loss": module.loss,
                "blocksize": module.packing[0] if module.packing else None,
                "double_quant": module.packing[1] if module.packing else None,
            }
            for module in done.modules
        ],
    }  # fmt: skip


def _print(console: Console, done: Allocated, place: Path, source: Path) -> None:
    """Print how many modules got which format, which got the most, and what it saves."""
    count: Counter[tuple[int, bool] | None] = Counter()
    elements: Counter[tuple[int, bool] | None] = Counter()
    nbytes: Counter[tuple[int, bool] | None] = Counter()
    for module in done.modules:
        count[module.packing] += len(module.paths)
        elements[module.packing] += module.elements
        nbytes[module.packing] += module.nbytes
    rows: list[Row] = [("format", "modules", "weights", "bits")]
    for packing in sorted(count, key=lambda p: nbytes[p] / elements[p]):
        share = elements[packing] / sum(elements.values())
        bits = 8 * nbytes[packing] / elements[packing]
        rows.append((_words(packing), f"{count[packing]:,}", f"{share:.1%}", f"{bits:.3f}"))
    print_rows(console, rows)
    kept = [path for module in done.modules if module.packing is None for path in module.paths]
    for path in kept[:_SHOWN]:
        console.print(f"in 16 bits: {terminal.plain(path)}", soft_wrap=True)
    if len(kept) > _SHOWN:
        console.print(f"... and {plural(len(kept) - _SHOWN, 'more module')}")
    size = format_size(done.plan.shard_bytes)
    console.print(f"{done.bits:.3f} bits a weight of linear layers; shards of {size}")
    _print_losses(console, done)
    console.print(
        f"[bold]{terminal.plain(str(place))}[/]: nf4 quantize {terminal.plain(str(source))} "
        f"--recipe {terminal.plain(str(place))}",
        soft_wrap=True,
    )


def _print_losses(console: Console, done: Allocated) -> None:
    what = "KL divergence" if done.method == "text" else "relative squared error"
    line = f"expected {what} {done.loss:.4g}"
    if done.uniform is not None and done.uniform_loss:
        less = 1 - done.loss / done.uniform_loss
        line += f", {less:.0%} less than {done.uniform_loss:.4g} of {_words(done.uniform)} for all"
        if done.saved is not None:
            line += f" ({done.saved[0]:.0%} to {done.saved[1]:.0%}, 95%)"
    console.print(line, soft_wrap=True)
    if done.check is not None:
        alone = f"checked on {plural(len(done.check.measured), 'module')} rounded alone"
        if done.check.correlation is not None:
            alone += f": correlation {done.check.correlation:.2f} of the logarithms"
        console.print(
            f"{alone}; of all together, measured over estimated {done.check.factor:.2f}",
            soft_wrap=True,
        )


def _words(packing: tuple[int, bool] | None) -> str:
    if packing is None:
        return "16 bits"
    return f"blocksize {packing[0]}{', nested' if packing[1] else ''}"
