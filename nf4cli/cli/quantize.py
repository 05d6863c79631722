"""nf4 quantize: parse, plan, run, summarise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..calibration.run import DAMPING, LENGTH, TOKENS, Calibrating
from . import common, completing
from .common import (
    DeviceOption,
    EngineOption,
    FsyncOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    SourceArgument,
    VerboseOption,
    WorkersOption,
)  # fmt: skip
from .listener import TerminalListener, tell_times
from .outcome import conclude, show_plan, tell_plan


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
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale",
            show_default=False,
            help="absmax, bitsandbytes' own bytes (the default); search, the scale of least loss, "
            "of either sign: same size, closer to the source.",
            autocompletion=completing.scales,
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            "--importance",
            metavar="FILE",
            show_default=False,
            help="Weight that loss by the importance of each input, as measured by an earlier "
            "--calibration. Needs neither torch nor text.",
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="FILE|DIR",
            show_default=False,
            help="Text (.txt, .md, .jsonl) to run through the model first, one block in memory at "
            "a time: measures that importance. May be repeated. Extra: calibrate.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            show_default=False,
            help="With --calibration: rtn rounds to the nearest code (the default), gptq feeds "
            "each rounding's error to the columns that are still to come.",
            autocompletion=completing.methods,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", help="How much of that text.")
    ] = TOKENS,
    calibration_length: Annotated[
        int, typer.Option("--calibration-length", help="Tokens of a window.")
    ] = LENGTH,
    damping: Annotated[
        float,
        typer.Option("--damping", help="Of gptq: added to the diagonal, in units of its mean."),
    ] = DAMPING,
    save_importance: Annotated[
        Path | None,
        typer.Option(
            "--save-importance",
            metavar="FILE",
            show_default=False,
            help="Where to write the measured importance as well, for --importance.",
        ),
    ] = None,
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
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            show_default=False,
            help="Largest size of an output file. Default: 5GB; 1GB where files are pushed and "
            "leave a bounded disk, which then needs less.",
        ),
    ] = None,
    digest: Annotated[
        str,
        typer.Option(
            "--digest",
            help="Digest of files in the manifest: blake3 (quicker), sha256 (which a Hub states as "
            "well), or auto: sha256 where the source or the output lies on a Hub.",
            autocompletion=completing.digests,
        ),
    ] = "auto",
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            metavar="SIZE",
            show_default=False,
            help="A bound on what lies on the disk at once: files of a Hub are fetched, read and "
            "removed one after another, not kept in the cache.",
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to",
            metavar="ORG/NAME",
            show_default=False,
            help="Publish the output on the Hub, in one commit at the end. Files are uploaded as "
            "they are complete; where no OUTPUT is given, nothing stays here.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see the repository, if it is new.")
    ] = False,
    replace_card: Annotated[
        bool,
        typer.Option(
            "--replace-card", help="Replace a README.md that is there. It is kept otherwise."
        ),
    ] = False,
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
    verbose: VerboseOption = False,
) -> None:
    """Convert a full-precision checkpoint to bitsandbytes 4-bit, streaming."""
    from ..api.quantizing import Request, prepared
    from ..errors import UsageError
    from ..records import QuantConfig

    if quiet and verbose:
        raise UsageError("--quiet and --verbose do not go together: leave one of them out")
    listener = TerminalListener(quiet, verbose)
    request = Request(
        source=source,
        output=output,
        config=QuantConfig(
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            quant_storage=quant_storage,
            compute_dtype=compute_dtype,
            dtype=dtype,
            keep=tuple(skip_modules or ()),
            target=target,
            on_nonfinite=on_nonfinite,
            scale=_scale(scale, importance, calibration),
            method=_method(method, calibration, save_importance),
        ),
        shard_size=_size(max_shard_size, "--max-shard-size"),
        importance_file=importance,
        calibrating=Calibrating.of(
            calibration, calibration_tokens, calibration_length, damping, save_importance
        ),
        exact=exact,
        trust_remote_code=trust_remote_code,
        digest=digest,
        machine=common.machine(engine, device, workers, memory, listener),
        disk=_size(disk, "--disk"),
        push_to=push_to,
        public=public,
        replace_card=replace_card,
        fsync=fsync,
        resume=resume,
        listener=listener,
    )
    with prepared(request, only_plan=plan) as job:
        if plan:
            show_plan(job, json)
            return
        if verbose:
            tell_plan(job)
        done = job.run()
        if verbose:
            tell_times(job.seconds, done.seconds)
        conclude(job, done, listener, disk, json, quiet)


def _size(text: str | None, option: str) -> int | None:
    return None if text is None else common.parse_size(text, option)


def _scale(asked: str | None, importance: Path | None, calibration: list[Path] | None) -> str:
    """The --scale that is meant: data has a say only where scales are searched for."""
    from ..errors import UsageError

    if importance and calibration:
        raise UsageError(
            "--importance is what --calibration measures: leave one of them out, or keep what is "
            "measured with --save-importance"
        )
    if not importance and not calibration:
        return asked or "absmax"
    if asked not in (None, "search"):
        option = "--importance" if importance else "--calibration"
        raise UsageError(f"--scale {asked} looks at no data: leave out {option}, or --scale")
    return "search"


def _method(asked: str | None, calibration: list[Path] | None, save: Path | None) -> str:
    """The --method that is meant."""
    from ..errors import UsageError

    for option, given in (("--method", asked), ("--save-importance", save)):
        if given is not None and not calibration:
            raise UsageError(f"{option} needs --calibration, the text to measure with")
    return asked or "rtn"
