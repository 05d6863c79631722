"""nf4 diff: say how two checkpoints differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..units import format_size, plural
from . import engine_choice
from .options import EngineOption, HtmlOption, JsonOption, MemoryOption, QuietOption, WorkersOption
from .show import terminal
from .show.listener import TerminalListener
from .show.rows import print_rows

if TYPE_CHECKING:
    from rich.console import Console

    from ..api.diffing import Compared
    from ..proof.difference import Difference, TensorDifference

_SHOWN = 20


def diff(
    a: Annotated[
        Path,
        typer.Argument(
            help="Any safetensors checkpoint: a directory, a file, or org/name on the Hub"
        ),
    ],
    b: Annotated[Path, typer.Argument(help="Another one")],
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say which tensors of two checkpoints differ, and how much; exit code 1 if any does."""
    from ..api.diffing import compare
    from .html_file import HtmlFile

    machine = engine_choice.machine(engine, None, workers, memory, TerminalListener(quiet or json))
    with HtmlFile(html, a, b) as file:
        done = compare(a, b, machine)
        file.write(lambda: _page(done))
    if json:
        terminal.print_json("diff", _document(done))
    elif not quiet:
        _print(terminal.out_console(), done)
    raise typer.Exit(0 if done.equal else 1)


def _page(done: Compared) -> bytes:
    from ..pictures.pages import of_diff

    return of_diff(done)


def _document(done: Compared) -> dict[str, Any]:
    """Return the document of --json; of a pipeline, each component's."""
    whole: dict[str, Any] = {"a": done.a, "b": done.b, "equal": done.equal}
    if "" in done.parts:
        return {**whole, **_part(done.parts[""])}
    components = {name: _part(part) for name, part in done.parts.items()}
    return {**whole, "components": components, "only_a": [*done.only_a], "only_b": [*done.only_b]}


def _part(found: Difference) -> dict[str, Any]:
    return {
        "bytes_a": found.bytes_a, "bytes_b": found.bytes_b, "same": found.same,
        "tensors": [asdict(difference) for difference in found.tensors],
        "config": [
            {"key": key, "a": _text(a), "b": _text(b)} for key, (a, b) in found.config.items()
        ],
    }  # fmt: skip


def _text(value: object) -> str | None:
    """Return a value of config.json as JSON text, which may be Infinity; None for none."""
    return None if value is None else dumps(value)


def _print(console: Console, done: Compared) -> None:
    """Print what differs, the largest differences first."""
    for name, found in done.parts.items():
        if name:
            console.print(f"[bold]{terminal.plain(name)}[/]")
        _print_part(console, found)
    for side, names in ((done.a, done.only_a), (done.b, done.only_b)):
        for name in names:
            console.print(f"only in {terminal.plain(side)}: the component {terminal.plain(name)}")
    verdict = "[green]no difference[/]" if done.equal else "[bold red]they differ[/]"
    console.print(
        f"{terminal.plain(done.a)} and {terminal.plain(done.b)}: {verdict}", soft_wrap=True
    )


def _print_part(console: Console, found: Difference) -> None:
    sizes = f"{format_size(found.bytes_a)} and {format_size(found.bytes_b)}"
    differ = plural(len(found.tensors), "weight")
    console.print(f"{sizes}; {plural(found.same, 'weight')} alike, {differ} not", soft_wrap=True)
    order = found.largest_first
    if order:
        headings = ("what", "weight", "changed", "codes", "rel. RMSE", "largest")
        print_rows(console, [headings, *map(_row, order[:_SHOWN])])
    if (hidden := len(order) - _SHOWN) > 0:
        console.print(f"... and {hidden:,} more; --json has them all")
    stored = Counter((d.a, d.b) for d in found.tensors if d.a != d.b)
    for (a, b), count in stored.most_common():
        sides = f"{a or 'nothing'} | {b or 'nothing'}"
        console.print(terminal.plain(f"{plural(count, 'weight')}: {sides}"), soft_wrap=True)
    for key, (a, b) in found.config.items():
        values = f"{_short(a)} | {_short(b)}"
        console.print(terminal.plain(f"config.json {key}: {values}"), soft_wrap=True)


def _row(difference: TensorDifference) -> tuple[str, ...]:
    """Return a line of the table of weights."""

    def share(count: int | None) -> str:
        return "-" if count is None else f"{count / max(1, difference.elements):.2%}"

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return (
        difference.kind, difference.name, share(difference.changed),
        share(difference.codes_changed), number(difference.rel_rmse, ".4f"),
        number(difference.max_abs, ".3g"),
    )  # fmt: skip


def _short(value: object) -> str:
    """Return a value of config.json, cut where it is long."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
