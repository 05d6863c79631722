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
from .ledger import work_bytes
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..dequantize import Summary


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
    from ..dequantize import plan_decoding, write_decoded

    size = common.parse_size(max_shard_size, "--max-shard-size")
    asked, source = source, hub.local(source, quiet)
    chosen = common.load_engine(engine, device, quiet, memory)
    started = time.monotonic()
    model = plan_decoding(source, chosen, dtype, size)
    limits = common.resources(chosen, workers, memory, model.tensors)
    with ProgressDisplay(
        sum(map(work_bytes, model.parts.values())), "dequantizing", not quiet,
        what=f"{hub.shown(asked, source)} -> {output}", place=output,
    ) as display:  # fmt: skip
        parts = write_decoded(model, output, chosen, limits, fsync, display)
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
