"""nf4 dequantize: a 4-bit checkpoint back to an ordinary one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from . import common
from .common import (
    EngineOption,
    FsyncOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    ShardSizeOption,
    WorkersOption,
    format_size,
)  # fmt: skip


def dequantize(
    source: Annotated[
        Path, typer.Argument(help="Any bitsandbytes 4-bit checkpoint (directory or file).")
    ],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Dtype of all floats: auto (the original), float32, float16, bfloat16.",
        ),
    ] = "auto",
    max_shard_size: ShardSizeOption = "5GB",
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    fsync: FsyncOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Decode a 4-bit checkpoint to an ordinary one that any loader reads, streaming."""
    from ..dequantize import write_dequantized
    from ..source import open_checkpoint

    size = common.parse_size(max_shard_size, "--max-shard-size")
    checkpoint = open_checkpoint(source)
    limits = common.resources(workers, memory, len(checkpoint.tensors))
    chosen = common.load_engine(engine)
    started = time.monotonic()
    total = sum(shard.size for shard in checkpoint.shards) * 3
    display = common.ProgressDisplay(total, "dequantizing", not (quiet or json))
    with display:
        summary = write_dequantized(checkpoint, output, chosen, limits, dtype, size, fsync, display)
    seconds = time.monotonic() - started
    if json:
        common.print_json(
            {
                "output": str(output),
                "engine": chosen.name,
                "seconds": round(seconds, 3),
                "decoded": summary.decoded,
                "kept": summary.kept,
                "output_bytes": summary.nbytes,
                "files": summary.files,
            }
        )
    elif not quiet:
        common.out_console().print(
            f"[bold]{common.plain(output)}[/]: {summary.decoded} weights decoded, "
            f"{summary.kept} kept, "
            f"{format_size(summary.nbytes)} in {common.plural(summary.files, 'file')}, "
            f"in {seconds:.2f} s ({chosen.name})"
        )
