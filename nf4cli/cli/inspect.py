"""nf4 inspect: show a checkpoint at a glance, or one tensor in depth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..units import format_size
from .options import HtmlOption, JsonOption
from .show import terminal, views
from .show.listener import TerminalListener

if TYPE_CHECKING:
    from rich.console import Console

    from ..api.inspecting import Inspected
    from ..output.inspection import TensorView


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="Any safetensors checkpoint: a directory, a file, or org/name on the Hub"
        ),
    ],
    tensor: Annotated[
        str | None,
        typer.Argument(help="Show one tensor: its state and histograms", show_default=False),
    ] = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Show what is 4-bit and what is not, sizes, bits a weight, known errors."""
    from ..api.inspecting import look, look_at_tensor
    from .html_file import HtmlFile

    listener = TerminalListener(quiet=json)
    if tensor is not None:
        if html is not None:
            raise UsageError("--html is for a whole checkpoint: leave it out, or the tensor")
        view = look_at_tensor(path, tensor, listener)
        if json:
            terminal.print_json("tensor", asdict(view))
        else:
            _print_tensor(terminal.out_console(), view)
        return
    with HtmlFile(html, path) as file:
        seen = look(path, listener)
        file.write(lambda: _page(path, seen, listener))
    if not json:
        for name, part in seen.parts.items():
            called = f"{seen.called}/{name}" if name else seen.called
            views.print_overview(terminal.out_console(), part, called)
    elif "" in seen.parts:
        terminal.print_json("inspect", asdict(seen.parts[""]))
    else:
        components = {name: asdict(part) for name, part in seen.parts.items()}
        terminal.print_json("inspect", {"name": seen.name, "components": components})


def _page(path: Path, seen: Inspected, listener: TerminalListener) -> bytes:
    from ..api.inspecting import figures_of
    from ..pictures.pages import of_inspect

    figures = figures_of(path, seen, listener)
    return of_inspect(
        seen.called, {name: (figures[name], part.errors) for name, part in seen.parts.items()}
    )


def _print_tensor(console: Console, view: TensorView) -> None:
    """Print a tensor's dtype, state, error and histograms."""
    console.print(f"[bold]{terminal.plain(view.name)}[/] in {terminal.plain(view.file)}")
    if view.state is None:
        role = f"part of the state of {view.owner}" if view.owner else "not in 4 bit"
        reason = f" ({view.reason})" if view.reason else ""
        size = format_size(view.nbytes)
        console.print(terminal.plain(f"{view.dtype} {list(view.shape)}, {size}, {role}{reason}"))
        return
    state = view.state
    nested = (
        f"nested in runs of {state.nested_blocksize}, offset {state.nested_offset:.6g}"
        if state.nested
        else "float32"
    )
    console.print(
        terminal.plain(
            f"{state.quant_type}, blocksize {state.blocksize}, decodes to {state.dtype} "
            f"{list(state.shape)}; absmax {nested}"
        )
    )
    console.print(
        f"{format_size(view.nbytes)} with its state, {view.bits_per_weight:.3f} bits a weight"
    )
    if view.error is not None:
        console.print(
            f"error against the source: relative RMSE {view.error.rel_rmse:.4f}, "
            f"largest {view.error.max_abs:.3g}"
        )
        if view.error.outlier_blocks is not None:
            console.print(
                f"outlier blocks (absmax above 10 times the RMS of the rest): "
                f"{view.error.outlier_blocks:,} of {view.error.blocks:,} "
                f"({view.error.outlier_share:.2%})"
            )
    console.print("\ncodes, by value:")
    by_value = sorted(range(16), key=lambda code: (view.code_values[code], code))
    total = sum(view.codes)
    for code in by_value:
        label = f"{code:2d} {view.code_values[code]:+.4f}"
        _print_bar(console, label, view.codes[code], max(view.codes), total)
    console.print("\nabsmax, blocks by size:")
    for low, high, count in zip(
        view.absmax_edges, view.absmax_edges[1:], view.absmax_counts, strict=False
    ):
        label = f"{low:.4g} to {high:.4g}"
        _print_bar(console, f"{label:>22}", count, max(view.absmax_counts), sum(view.absmax_counts))


def _print_bar(console: Console, label: str, count: int, largest: int, total: int) -> None:
    """Print a line of a histogram: a bar, the count and its share of `total`."""
    width = max(10, min(60, console.width - len(label) - 24))
    block = "█" if console.encoding.startswith("utf") else "#"
    bar = block * round(width * count / max(1, largest))
    console.print(f"  {label}  {bar:<{width}} {count:>10,} {count / max(1, total):6.1%}")
