"""nf4 quantize: parse, plan, run, summarise."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import common, completing, pipelines, step_summary, views
from .common import (
    DeviceOption,
    EngineOption,
    FsyncOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    ShardSizeOption,
    SourceArgument,
    WorkersOption,
)  # fmt: skip

if TYPE_CHECKING:
    from ..engines import Engine
    from ..plan import Plan
    from ..records import Answer, Checkpoint


def quantize(
    source: SourceArgument,
    output: Annotated[
        Path | None,
        typer.Argument(help="New directory. Default: NAME-nf4 here.", show_default=False),
    ] = None,
    quant_type: Annotated[
        str,
        typer.Option("--quant-type", help="nf4 or fp4.", autocompletion=completing.quant_types),
    ] = "nf4",
    blocksize: Annotated[
        int,
        typer.Option(
            "--blocksize",
            help="Weights that share a scale: 32 to 4096, powers of 2.",
            autocompletion=completing.blocksizes,
        ),
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
    on_nonfinite: Annotated[
        str,
        typer.Option(
            "--on-nonfinite",
            help="A weight that holds a NaN or an infinity: error refuses it, keep leaves it in "
            "full precision (and reads the source once more to find them, under --plan as well).",
            autocompletion=completing.on_nonfinite,
        ),
    ] = "error",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            help="Dtype of what stays float: auto (the model's), float32, float16, bfloat16.",
            autocompletion=completing.dtypes,
        ),
    ] = "auto",
    compute_dtype: Annotated[
        str,
        typer.Option(
            "--compute-dtype",
            help="Dtype loaders compute in: auto (the model's), float32, float16, bfloat16.",
            autocompletion=completing.dtypes,
        ),
    ] = "auto",
    quant_storage: Annotated[
        str,
        typer.Option(
            "--quant-storage",
            help="Dtype the packed bytes are stored as (FSDP-QLoRA: bfloat16).",
            autocompletion=completing.storages,
        ),
    ] = "uint8",
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="Who loads it: transformers; vllm or unsloth, which take experts in 4 bit.",
            autocompletion=completing.targets,
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
        str,
        typer.Option(
            "--digest",
            help="Digest of files in the manifest: blake3 or sha256.",
            autocompletion=completing.digests,
        ),
    ] = "blake3",
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    fsync: FsyncOption = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue a run that was stopped; start one where there is none."
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would be written, and write nothing.")
    ] = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Convert a full-precision checkpoint to bitsandbytes 4-bit, streaming."""
    from ..diffusion import is_pipeline
    from ..digest import ALGORITHMS
    from ..errors import UsageError
    from ..families import consult
    from ..limits import check_output, require_place
    from ..nonfinite import nonfinite_weights, scan_bytes
    from ..plan import make_plan
    from ..quantize import write_checkpoint
    from ..records import QuantConfig
    from ..source import open_checkpoint
    from ..summary import conversion_section

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
        on_nonfinite=on_nonfinite,
        max_shard_size=common.parse_size(max_shard_size, "--max-shard-size"),
    )

    def oracle(model: Checkpoint) -> Answer | None:
        return consult(model, exact, trust_remote_code)

    @cache
    def chosen() -> Engine:
        return common.load_engine(engine, device, quiet, memory)

    def scan(preliminary: Plan) -> frozenset[str]:
        limits = common.resources(chosen(), workers, memory, len(preliminary.tensors))
        total, show = scan_bytes(preliminary), not (quiet or json)
        with common.ProgressDisplay(total, "looking for NaN", show) as display:
            return nonfinite_weights(preliminary, chosen(), limits, display)

    if is_pipeline(source):
        pipelines.quantize(
            source,
            output,
            config,
            oracle,
            scan,
            digest,
            chosen(),
            workers,
            memory,
            fsync,
            resume,
            plan,
            json,
            quiet,
        )
        return
    checkpoint = open_checkpoint(source)
    if output is None:
        output = Path(f"{checkpoint.name}-nf4")
    if on_nonfinite == "keep":
        require_place(checkpoint.root, output, checkpoint.is_file, resume)  # before all is read
    decided = make_plan(checkpoint, config, oracle, scan)
    limits = common.resources(chosen(), workers, memory, len(decided.tensors))
    check_output(decided, output, limits.workers, resume)
    if plan:
        if json:
            common.print_json("plan", views.plan_document(decided, limits, output))
        else:
            views.print_plan(common.out_console(), decided, limits, output)
        return
    started = time.monotonic()
    notify = common.notices(quiet)
    display = common.ProgressDisplay(decided.source_bytes, "quantizing", not (quiet or json))
    with display:
        manifest = write_checkpoint(
            decided, output, chosen(), limits, digest, fsync, resume, display, notify
        )
    seconds = time.monotonic() - started
    step_summary.append(lambda: conversion_section(output, {"": (decided, manifest)}))
    if json:
        run = {"engine": chosen().name, "seconds": round(seconds, 3)}
        common.print_json("quantize", {**views.result_document(decided, manifest, output), **run})
    elif not quiet:
        views.print_result(
            common.out_console(), decided, manifest, output, chosen().name, seconds, source
        )
