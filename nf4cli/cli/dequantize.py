"""nf4 dequantize: a 4-bit checkpoint back to an ordinary one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common, completing, hub
from .common import (
    DeviceOption,
    EngineOption,
    FsyncOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    ShardSizeOption,
    WorkersOption,
    format_size,
)  # fmt: skip
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..dequantize import Summary


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
            autocompletion=completing.dtypes,
        ),
    ] = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    fsync: FsyncOption = True,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decode a 4-bit checkpoint to an ordinary one that any loader reads, streaming."""
    from ..assembly import part_shards, write_decoded_pipeline
    from ..dequantize import write_dequantized
    from ..diffusion import is_pipeline
    from ..source import open_checkpoint

    size = common.parse_size(max_shard_size, "--max-shard-size")
    asked, source = source, hub.local(source, quiet)
    total = sum(file.stat().st_size for file in part_shards(source)) * 3
    what = f"{hub.shown(asked, source)} -> {output}"
    display = ProgressDisplay(total, "dequantizing", not quiet, what=what, place=output)
    chosen = common.load_engine(engine, device, quiet, memory)
    started = time.monotonic()
    if is_pipeline(source):
        limits = common.resources(chosen, workers, memory)
        with display:
            parts = write_decoded_pipeline(
                source, output, chosen, limits, dtype, size, fsync, display
            )
    else:
        checkpoint = open_checkpoint(source)
        limits = common.resources(chosen, workers, memory, len(checkpoint.tensors))
        with display:
            whole = write_dequantized(
                checkpoint, output, chosen, limits, dtype, size, fsync, display
            )
        parts = {"": whole}
    seconds = time.monotonic() - started
    if json:
        common.print_json("dequantize", _document(parts, output, chosen.name, seconds))
    elif not quiet:
        console = common.out_console()
        for name, summary in parts.items():
            console.print(
                f"[bold]{common.plain(output / name)}[/]: {summary.decoded} weights decoded, "
                f"{summary.kept} kept, "
                f"{format_size(summary.nbytes)} in {common.plural(summary.files, 'file')}"
            )
        console.print(f"in {seconds:.2f} s ({chosen.name})")


def _document(
    parts: dict[str, Summary], output: Path, engine: str, seconds: float
) -> dict[str, Any]:
    counts = {
        name: {"decoded": part.decoded, "kept": part.kept, "output_bytes": part.nbytes,
               "files": part.files}
        for name, part in parts.items()
    }  # fmt: skip
    whole: dict[str, Any] = {
        "output": str(output),
        "engine": engine,
        "seconds": round(seconds, 3),
        **{
            key: sum(part[key] for part in counts.values())
            for key in ("decoded", "kept", "output_bytes", "files")
        },
    }
    if "" not in parts:
        whole["components"] = counts
    return whole
