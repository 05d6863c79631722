"""nf4 dequantize: decode a 4-bit checkpoint to an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..units import format_size, plural
from . import completion, engine_choice, options
from .options import (  # fmt: skip
    DeviceOption,
    EngineOption,
    FsyncOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    RayOption,
    ShardSizeOption,
    WorkersOption,
)
from .show import terminal
from .show.listener import TerminalListener

if TYPE_CHECKING:
    from ..api.decoding import Dequantized


def dequantize(
    source: Annotated[
        Path,
        typer.Argument(
            help="Any bitsandbytes 4-bit checkpoint: a directory, a file, or org/name on the Hub"
        ),
    ],
    output: Annotated[Path, typer.Argument(help="New directory")],
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            show_default=False,
            help="Of all floats (default auto)",
            autocompletion=completion.dtypes,
        ),
    ] = "auto",
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            show_default=False,
            help="PEFT LoRA to merge in; repeatable",
        ),
    ] = None,
    adapter_scale: Annotated[
        list[float] | None,
        typer.Option(
            "--adapter-scale",
            metavar="X",
            show_default=False,
            help="Factor of the adapter (default 1)",
        ),
    ] = None,
    max_shard_size: ShardSizeOption = "5GB",
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    ray: RayOption = None,
    fsync: FsyncOption = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decode a 4-bit checkpoint to an ordinary one that any loader reads, streaming."""
    from ..api.sources import require_there

    size = options.parse_size(max_shard_size, "--max-shard-size")
    asked = engine_choice.machine(engine, device, workers, memory, TerminalListener(quiet), ray)
    require_there(source)
    from ..api.decoding import decode  # it imports numpy: after what can be refused without

    adapters, scales = tuple(adapter or ()), tuple(adapter_scale or ())
    done = decode(source, output, dtype, size, fsync, asked, adapters, scales)
    if json:
        terminal.print_json("dequantize", _document(done))
    elif not quiet:
        console = terminal.out_console()
        for name, summary in done.parts.items():
            console.print(
                f"[bold]{terminal.plain(output / name)}[/]: {summary.decoded} weights decoded, "
                f"{summary.kept} kept, "
                f"{format_size(summary.nbytes)} in {plural(summary.files, 'file')}"
            )
        console.print(f"in {done.seconds:.2f} s ({done.engine})")


def _document(done: Dequantized) -> dict[str, Any]:
    """Return the document of --json: sums, and of a pipeline each component."""
    counts = {
        name: {"decoded": part.decoded, "kept": part.kept, "output_bytes": part.nbytes,
               "files": part.files}
        for name, part in done.parts.items()
    }  # fmt: skip
    whole: dict[str, Any] = {
        "output": str(done.output),
        "engine": done.engine,
        "seconds": round(done.seconds, 3),
        **{
            key: sum(part[key] for part in counts.values())
            for key in ("decoded", "kept", "output_bytes", "files")
        },
    }
    if "" not in done.parts:
        whole["components"] = counts
    return whole
