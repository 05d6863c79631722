"""nf4 inspect: a checkpoint at a glance, or one tensor in depth."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common
from .common import JsonOption, format_size

if TYPE_CHECKING:
    from rich.console import Console

    from ..inspection import Overview, TensorView


def inspect(
    path: Annotated[Path, typer.Argument(help="Any safetensors checkpoint (directory or file).")],
    tensor: Annotated[
        str | None, typer.Argument(help="One tensor: its state and histograms.", show_default=False)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what is 4-bit, what is not, sizes, bits a weight, and errors where they are known."""
    from .. import inspection
    from ..source import open_checkpoint

    checkpoint = open_checkpoint(path)
    if tensor is None:
        seen = inspection.overview(checkpoint)
        if json:
            common.print_json(asdict(seen))
        else:
            _print_overview(common.out_console(), seen, path)
        return
    view = inspection.tensor_view(checkpoint, tensor, common.load_engine("auto"))
    if json:
        common.print_json(asdict(view))
    else:
        _print_tensor(common.out_console(), view)


def _print_overview(console: Console, seen: Overview, path: Path) -> None:
    from rich import box
    from rich.table import Table

    share = seen.quantized_parameters / max(1, seen.parameters)
    console.print(
        f"[bold]{common.plain(seen.name)}[/] ({common.plain(seen.model_type or 'no model_type')}): "
        f"{seen.parameters:,} weights, {share:.1%} in 4 bit, "
        f"{seen.bits_per_weight:.2f} bits a weight, "
        f"{format_size(seen.nbytes)} in {common.plural(seen.files, 'file')}"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("kind", "tensors", "weights", "bytes", "for example"):
        right = heading in ("tensors", "weights", "bytes")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right)
    for group in seen.groups:
        table.add_row(
            ("4-bit: " if group.packed else "kept: ") + group.kind, f"{group.tensors:,}",
            f"{group.elements:,}", format_size(group.nbytes), common.plain(group.example),
            style="bold" if group.packed else None,
        )  # fmt: skip
    console.print(table)
    if seen.quant_method is not None:
        kept = ", ".join(common.plain(k) for k in seen.kept_modules) or "nothing of this model"
        console.print(f"config.json: {common.plain(seen.quant_method)}; kept out of 4 bit: {kept}")
    if seen.errors:
        ranked = sorted(seen.errors.items(), key=lambda item: -item[1].rel_rmse)
        middle = statistics.median(error.rel_rmse for error in seen.errors.values())
        console.print(f"error against the source: relative RMSE {middle:.4f} (median); the worst:")
        for name, error in ranked[:3]:
            console.print(
                f"  {error.rel_rmse:.4f}, largest {error.max_abs:.3g}, {common.plain(name)}"
            )
    elif any(group.packed for group in seen.groups):
        console.print("error against the source: not known, there is no manifest")
    for problem in seen.problems[:5]:
        console.print(f"[bold red]problem[/]  {common.plain(problem)}")
    if seen.problems:
        found = common.plural(len(seen.problems), "problem")
        console.print(f"{found}: nf4 verify {common.plain(path)} shows all")


def _print_tensor(console: Console, view: TensorView) -> None:
    console.print(f"[bold]{common.plain(view.name)}[/] in {common.plain(view.file)}")
    if view.state is None:
        what = f"part of the state of {view.owner}" if view.owner else "not in 4 bit"
        reason = f" ({view.reason})" if view.reason else ""
        size = format_size(view.nbytes)
        console.print(common.plain(f"{view.dtype} {list(view.shape)}, {size}, {what}{reason}"))
        return
    state = view.state
    nested = (
        f"nested in runs of {state.nested_blocksize}, offset {state.nested_offset:.6g}"
        if state.nested
        else "float32"
    )
    console.print(
        common.plain(
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
    width = max(10, min(60, console.width - len(label) - 24))
    block = "█" if console.encoding.startswith("utf") else "#"
    bar = block * round(width * count / max(1, largest))
    console.print(f"  {label}  {bar:<{width}} {count:>10,} {count / max(1, total):6.1%}")
