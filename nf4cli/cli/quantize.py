"""nf4 quantize: parse, plan, run, summarise."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common
from .common import (
    EngineOption,
    FsyncOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    ShardSizeOption,
    SourceArgument,
    WorkersOption,
    format_size,
    plain,
    plural,
)  # fmt: skip

if TYPE_CHECKING:
    from rich.console import Console

    from ..limits import Resources
    from ..manifest import Manifest
    from ..plan import Plan


def quantize(
    source: SourceArgument,
    output: Annotated[
        Path | None,
        typer.Argument(help="New directory. Default: NAME-nf4 here.", show_default=False),
    ] = None,
    quant_type: Annotated[str, typer.Option("--quant-type", help="nf4 or fp4.")] = "nf4",
    blocksize: Annotated[
        int,
        typer.Option("--blocksize", help="Weights that share a scale: 32 to 4096, powers of 2."),
    ] = 64,
    double_quant: Annotated[
        bool,
        typer.Option(
            "--double-quant/--no-double-quant", help="Store the scales in 8 bits as well."
        ),
    ] = True,
    skip_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            "--skip-modules",
            metavar="PATTERN",
            show_default=False,
            help="Leave these modules in full precision: a glob over the module's path, or whole "
            "parts of it (mlp, layers.0). May be repeated.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Dtype of what stays float: auto (the model's), float32, float16, bfloat16.",
        ),
    ] = "auto",
    compute_dtype: Annotated[
        str,
        typer.Option(
            "--compute-dtype",
            help="Dtype loaders compute in: auto (the model's), float32, float16, bfloat16.",
        ),
    ] = "auto",
    quant_storage: Annotated[
        str,
        typer.Option(
            "--quant-storage", help="Dtype the packed bytes are stored as (FSDP-QLoRA: bfloat16)."
        ),
    ] = "uint8",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Who loads it: transformers; vllm or unsloth, which take experts in 4 bit.",
        ),
    ] = "transformers",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Ask the installed transformers which modules it holds in 4 bit. Done anyway for "
            "families that the rules are not known to be right for.",
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Let transformers run the model's own code when asked."
        ),
    ] = False,
    max_shard_size: ShardSizeOption = "5GB",
    digest: Annotated[
        str, typer.Option("--digest", help="Digest of files in the manifest: blake3 or sha256.")
    ] = "blake3",
    engine: EngineOption = "auto",
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    fsync: FsyncOption = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would be written, and write nothing.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a full-precision checkpoint to bitsandbytes 4-bit, streaming."""
    from ..digest import ALGORITHMS
    from ..errors import UsageError
    from ..families import consult
    from ..limits import check_output
    from ..plan import make_plan
    from ..quantize import write_checkpoint
    from ..records import QuantConfig
    from ..source import open_checkpoint

    if digest not in ALGORITHMS:
        raise UsageError(f"--digest {digest} is not one of {', '.join(ALGORITHMS)}")
    config = QuantConfig(
        quant_type=quant_type,
        blocksize=blocksize,
        double_quant=double_quant,
        quant_storage=quant_storage,
        compute_dtype=compute_dtype,
        dtype=dtype,
        keep=tuple(skip_modules or ()),
        target=target,
        max_shard_size=common.parse_size(max_shard_size, "--max-shard-size"),
    )
    checkpoint = open_checkpoint(source)
    if output is None:
        output = Path(f"{checkpoint.name}-nf4")
    decided = make_plan(checkpoint, config, lambda model: consult(model, exact, trust_remote_code))
    limits = common.resources(workers, memory, len(decided.tensors))
    check_output(decided, output, limits.workers)
    if plan:
        if json:
            common.print_json(_plan_document(decided, limits, output))
        else:
            _print_plan(common.out_console(), decided, limits, output)
        return
    chosen = common.load_engine(engine)
    started = time.monotonic()
    display = common.ProgressDisplay(decided.source_bytes, "quantizing", not (quiet or json))
    with display:
        manifest = write_checkpoint(decided, output, chosen, limits, digest, fsync, display)
    seconds = time.monotonic() - started
    if json:
        common.print_json(_result_document(decided, manifest, output, seconds))
    elif not quiet:
        _print_result(common.out_console(), decided, manifest, output, seconds, source)


def _groups(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "action": action,
            "reason": reason,
            "tensors": count,
            "elements": elements,
            "bytes": nbytes,
        }
        for action, reason, count, elements, nbytes in plan.groups()
    ]


def _plan_document(plan: Plan, limits: Resources, output: Path) -> dict[str, Any]:
    from ..limits import disk_bytes

    return {
        "source": str(plan.checkpoint.root),
        "output": str(output),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "files": [{"name": s.filename, "bytes": s.size} for s in plan.shards],
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "peak_memory_bytes": limits.memory,
        "peak_disk_bytes": disk_bytes(plan, limits.workers),
        "workers": limits.workers,
        "groups": _groups(plan),
        "tensors": [
            {
                "name": t.name, "action": t.action, "rule": t.rule, "reason": t.reason,
                "dtype": t.weight.stored.dtype, "shape": list(t.weight.shape),
                "bytes": t.nbytes_out,
            }
            for t in plan.tensors
        ],
        "skip_modules": (plan.output_config or {})
        .get("quantization_config", {})
        .get("llm_int8_skip_modules", []),
        "copied_files": list(plan.checkpoint.extra_files),
        "left_files": list(plan.checkpoint.left_files),
        "notes": list(plan.notes),
    }  # fmt: skip


def _table_of_groups(plan: Plan) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for heading in ("what", "why", "tensors", "weights", "bytes"):
        table.add_column(heading, justify="left" if heading in ("what", "why") else "right")
    words = {"quantize": "4-bit", "cast": f"to {plan.config.dtype}", "copy": "kept",
             "drop": "left out"}  # fmt: skip
    for action, reason, count, elements, nbytes in plan.groups():
        table.add_row(
            words[action], reason, f"{count:,}", f"{elements:,}", format_size(nbytes),
            style="bold" if action == "quantize" else None,
        )  # fmt: skip
    return table


def _print_notes(console: Console, plan: Plan) -> None:
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {plain(note)}")


def _print_plan(console: Console, plan: Plan, limits: Resources, output: Path) -> None:
    from ..limits import disk_bytes

    config = plan.config
    absmax = "nested" if config.double_quant else "float32"
    console.print(
        f"[bold]{plain(plan.checkpoint.name)}[/] -> [bold]{plain(output)}[/]: "
        f"{config.quant_type}, blocksize {config.blocksize}, {absmax} absmax"
    )
    _print_notes(console, plan)
    console.print(_table_of_groups(plan))
    console.print(
        f"output  {plan.shard_bytes:,} bytes in {plural(len(plan.shards), 'file')}, from "
        f"{plan.source_bytes:,}: {_bits(plan)}"
    )
    console.print(
        f"memory  at most {format_size(limits.memory)} with {plural(limits.workers, 'worker')}"
    )
    console.print(f"disk    {format_size(disk_bytes(plan, limits.workers))} at the peak")
    if plan.checkpoint.extra_files:
        console.print(f"copied  {plain(', '.join(plan.checkpoint.extra_files))}")
    if plan.checkpoint.left_files:
        console.print(f"left    {plain(', '.join(plan.checkpoint.left_files))}")


def _result_document(
    plan: Plan, manifest: Manifest, output: Path, seconds: float
) -> dict[str, Any]:
    return {
        "output": str(output),
        "engine": manifest.run.engine if manifest.run else None,
        "seconds": round(seconds, 3),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "files": [
            {"name": name, "bytes": record.size, manifest.digest: record.digest}
            for name, record in sorted(manifest.output_files.items())
        ],
        "parameters": plan.parameters,
        "quantized_parameters": plan.quantized_parameters,
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "groups": _groups(plan),
        "errors": {
            name: {"rel_rmse": record.error.rel_rmse, "max_abs": record.error.max_abs}
            for name, record in manifest.tensors.items()
            if record.error is not None
        },
        "notes": list(plan.notes),
    }


def _print_result(
    console: Console, plan: Plan, manifest: Manifest, output: Path, seconds: float, source: Path
) -> None:
    _print_notes(console, plan)
    console.print(_table_of_groups(plan))
    console.print(
        f"[bold]{plain(output)}[/]: {format_size(plan.source_bytes)} -> "
        f"{format_size(plan.shard_bytes)}, {_bits(plan)}, in {seconds:.2f} s "
        f"({format_size(plan.source_bytes / max(seconds, 1e-9))}/s, "
        f"{manifest.run.engine if manifest.run else ''})"
    )
    errors = {n: r.error.rel_rmse for n, r in manifest.tensors.items() if r.error is not None}
    worst = max(errors, key=lambda name: errors[name])
    console.print(
        f"error   relative RMSE {statistics.median(errors.values()):.4f} (median weight), worst "
        f"{errors[worst]:.4f} in {plain(worst)}"
    )
    console.print(f"next    nf4 verify {plain(output)} --source {plain(source)}")


def _bits(plan: Plan) -> str:
    packed = [t for t in plan.tensors if t.state is not None]
    bits = 8 * sum(t.nbytes_out for t in packed) / plan.quantized_parameters
    share = plan.quantized_parameters / plan.parameters
    return (
        f"{plan.bits_per_weight:.2f} bits a weight ({bits:.2f} in the {share:.0%} that are 4-bit)"
    )
