"""nf4 inspect: a checkpoint at a glance, or one tensor in depth."""

from __future__ import annotations

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

    share = seen.packed_parameters / max(1, seen.parameters)
    console.print(
        f"[bold]{seen.name}[/] ({seen.model_type or 'no config.json'}): "
        f"{seen.parameters:,} weights, {share:.1%} in 4 bit, "
        f"{seen.bits_per_weight:.2f} bits a weight, "
        f"{format_size(seen.nbytes)} in {seen.files} file(s)"
    )
    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("kind", "tensors", "weights", "bytes", "for example"):
        right = heading in ("tensors", "weights", "bytes")
        table.add_column(heading, justify="right" if right else "left", no_wrap=right)
    for group in seen.groups:
        table.add_row(
            ("4-bit: " if group.packed else "kept: ") + group.kind, f"{group.tensors:,}",
            f"{group.elements:,}", format_size(group.nbytes), group.example,
            style="bold" if group.packed else None,
        )  # fmt: skip
    console.print(table)
    if seen.quant_method is not None:
        console.print(
            f"config.json: quant_method {seen.quant_method}; not quantized: "
            f"{', '.join(seen.skip_modules) or '(empty list)'}",
        )
    if seen.errors:
        ranked = sorted(seen.errors.items(), key=lambda item: -item[1].rel_rmse)
        middle = ranked[len(ranked) // 2][1].rel_rmse
        console.print(f"error against the source: relative RMSE {middle:.4f} (median); the worst:")
        for name, error in ranked[:3]:
            console.print(
                f"  {error.rel_rmse:.4f}  max {error.max_abs:.4g}  {name}", soft_wrap=True
            )
    elif any(group.packed for group in seen.groups):
        console.print("error against the source: not known, there is no manifest")
    for problem in seen.problems[:5]:
        console.print("[bold red]problem[/]  ", end="")
        console.print(problem, markup=False)
    if seen.problems:
        console.print(
            f"{len(seen.problems)} problem(s): nf4 verify {path} shows all", soft_wrap=True
        )


def _print_tensor(console: Console, view: TensorView) -> None:
    console.print(f"[bold]{view.name}[/] in {view.file}")
    if view.state is None:
        console.print(
            f"{view.dtype} {list(view.shape)}, {format_size(view.nbytes)}, full precision"
            + (f": {view.reason}" if view.reason else "")
        )
        return
    state = view.state
    nested = (
        f"nested in runs of {state.nested_blocksize}, offset {state.nested_offset!r}"
        if state.nested
        else "float32"
    )
    console.print(
        f"{state.quant_type}, blocksize {state.blocksize}, decodes to {state.dtype} "
        f"{list(state.shape)}; absmax {nested}"
    )
    console.print(
        f"{format_size(view.nbytes)} with its state, {view.bits_per_weight:.3f} bits a weight"
    )
    if view.error is not None:
        console.print(
            f"error against the source: relative RMSE {view.error.rel_rmse:.4f}, max "
            f"{view.error.max_abs:.4g}"
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
    bar = "█" * round(width * count / max(1, largest))
    console.print(
        f"  {label}  {bar:<{width}} {count:>10,} {count / max(1, total):6.1%}", soft_wrap=True
    )
