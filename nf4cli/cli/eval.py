"""nf4 eval: measure how far an output is from its source, as a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import engine_choice, options, panels
from .options import (
    EngineOption,
    HtmlOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    TorchDeviceOption,
    TorchDtypeOption,
    WorkersOption,
)
from .show import terminal
from .show.listener import TerminalListener

if TYPE_CHECKING:
    from rich.console import Console

    from ..api.evaluating import Evaluated

_KINDS = {"causal": "language model", "encoder": "encoder"}


def eval_(
    output: Annotated[
        Path,
        typer.Argument(help="A 4-bit checkpoint or any other model, here or org/name on the Hub"),
    ],
    source: Annotated[
        Path, typer.Option("--source", metavar="PATH", help="The model it was made from")
    ],
    other: Annotated[
        Path | None,
        typer.Option(
            "--other",
            metavar="PATH",
            show_default=False,
            help="Another output, to compare with",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="PATH",
            show_default=False,
            help="Text to measure on; repeatable. Default: two built-in texts",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="N", help="At most, of each text")
    ] = 8192,
    context: Annotated[int, typer.Option("--context", metavar="N", help="Tokens per window")] = 512,
    dtype: TorchDtypeOption = "auto",
    device: TorchDeviceOption = None,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir",
            metavar="PATH",
            show_default=False,
            help="Where the source's results are kept",
            rich_help_panel=panels.CACHE,
        ),
    ] = None,
    cache_size: Annotated[
        str,
        typer.Option(
            "--cache-size",
            metavar="SIZE",
            help="How large that may become",
            rich_help_panel=panels.CACHE,
        ),
    ] = "4GB",
    max_kl: Annotated[
        float | None,
        typer.Option(
            "--max-kl",
            metavar="X",
            show_default=False,
            help="Largest mean KL divergence of a text",
            rich_help_panel=panels.LIMITS,
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            "--min-top1",
            metavar="X",
            show_default=False,
            help="Smallest share of equal most likely tokens",
            rich_help_panel=panels.LIMITS,
        ),
    ] = None,
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity, KL divergence, agreement with the source (extra: eval)."""
    from ..api.evaluating import Evaluation, compare
    from .html_file import HtmlFile

    asked = Evaluation(
        output=output,
        source=source,
        other=other,
        texts=tuple(text or ()),
        tokens=tokens,
        context=context,
        dtype=dtype,
        device=device,
        cache_directory=cache_dir,
        cache_size=options.parse_size(cache_size, "--cache-size"),
        max_kl=max_kl,
        min_top1=min_top1,
        machine=engine_choice.machine(engine, None, workers, memory, TerminalListener(quiet)),
    )
    with HtmlFile(html, output, source) as file:
        done = compare(asked)
        file.write(lambda: _page(done))
    if json:
        terminal.print_json("eval", _document(done, context))
    elif not quiet or done.failures:
        _print(terminal.out_console(), done)
    raise typer.Exit(0 if done.ok else 1)


def _page(done: Evaluated) -> bytes:
    from ..pictures.pages import of_eval

    return of_eval(done, _rows(done))


def _document(done: Evaluated, context: int) -> dict[str, Any]:
    """Return the document of --json."""
    return {
        "path": str(done.path),
        "source": str(done.source),
        **({"other": str(done.other)} if done.other else {}),
        "kind": done.kind,
        "context": context,
        "texts": {
            name: {
                "positions": measured.positions,
                **{figure: value.as_list() for figure, value in measured.figures.items()},
            }
            for name, measured in done.texts.items()
        },
        "failures": list(done.failures),
        "ok": done.ok,
    }


_ROWS = {
    "causal": (
        ("perplexity, source", "perplexity_source", "{:.2f}"),
        ("perplexity, output", "perplexity_output", "{:.2f}"),
        ("their ratio", "perplexity_ratio", "{:.4f}"),
        ("KL divergence, mean", "kl_mean", "{:.4f}"),
        ("  of the other", "kl_other", "{:.4f}"),
        ("  share of it", "kl_ratio", "{:.1%}"),
        ("  median", "kl_median", "{:.4f}"),
        ("  95%", "kl_95", "{:.3f}"),
        ("  99%", "kl_99", "{:.3f}"),
        ("  99.9%", "kl_999", "{:.3f}"),
        ("  largest", "kl_max", "{:.3f}"),
        ("same most likely token", "top1", "{:.2%}"),
    ),
    "encoder": (
        ("cosine, mean", "cosine_mean", "{:.5f}"),
        ("  of the other", "cosine_other", "{:.5f}"),
        ("  1 - cosine, share of the other's", "distance_ratio", "{:.1%}"),
        ("  5%", "cosine_5", "{:.5f}"),
        ("  1%", "cosine_1", "{:.5f}"),
        ("  smallest", "cosine_min", "{:.5f}"),
    ),
}


def _rows(done: Evaluated) -> list[tuple[str, str, str]]:
    """Return (label, name, format) of the figures that were measured."""
    measured = next(iter(done.texts.values())).figures
    return [row for row in _ROWS[done.kind] if row[1] in measured]


def _print(console: Console, done: Evaluated) -> None:
    """Print the figures as a table, one column a text, and the limits that are not kept."""
    from rich.table import Table

    console.print(
        f"[bold]{terminal.plain(done.called)}[/], a {_KINDS[done.kind]}; in brackets: 95% "
        "confidence"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    unit = "positions" if done.kind == "causal" else "pieces"
    for name, measured in done.texts.items():
        heading = f"{terminal.plain(name)}, {measured.positions:,} {unit}"
        table.add_column(heading, justify="right")
    for label, figure, shape in _rows(done):
        cells = []
        for measured in done.texts.values():
            value, low, high = (shape.format(x) for x in measured.figures[figure].as_list())
            cells.append(f"{value} \\[{low}, {high}]")
        table.add_row(label, *cells)
    console.print(table)
    for failure in done.failures:
        console.print(f"[red]wrong[/]   {terminal.plain(failure)}")
