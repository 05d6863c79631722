"""nf4 quantize: convert a checkpoint or pipeline to 4-bit, or show the plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..quality.calibration.defaults import DAMPING, LENGTH, TOKENS
from ..quality.calibration.run import Calibrating
from . import completion, engine_choice, options, panels
from .options import (  # fmt: skip
    DeviceOption,
    EngineOption,
    FsyncOption,
    HtmlOption,
    JsonOption,
    MemoryOption,
    QuietOption,
    RayOption,
    SourceArgument,
    VerboseOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from ..api.quantizing import Job
    from .html_file import HtmlFile
    from .show.listener import TerminalListener


def quantize(
    source: SourceArgument,
    output: Annotated[
        Path | None,
        typer.Argument(help="New directory. Default: NAME-nf4 here", show_default=False),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what would be written; write nothing")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a stopped run; start one where there is none"),
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            show_default=False,
            help="Formats chosen by nf4 plan",
            rich_help_panel=panels.FORMAT,
        ),
    ] = None,
    blocksize: Annotated[
        int | None,
        typer.Option(
            "--blocksize",
            metavar="N",
            show_default=False,
            help="Weights per scale (default 64)",
            rich_help_panel=panels.FORMAT,
            autocompletion=completion.blocksizes,
        ),
    ] = None,
    quant_type: Annotated[
        str,
        typer.Option(
            "--quant-type",
            metavar="NAME",
            help="nf4 or fp4",
            rich_help_panel=panels.FORMAT,
            autocompletion=completion.quant_types,
        ),
    ] = "nf4",
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant",
            show_default=False,
            help="8-bit scales (default)",
            rich_help_panel=panels.FORMAT,
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="NAME",
            show_default=False,
            help="Loader: transformers (default), vllm or unsloth",
            rich_help_panel=panels.FORMAT,
            autocompletion=completion.targets,
        ),
    ] = "transformers",
    compute_dtype: Annotated[
        str,
        typer.Option(
            "--compute-dtype",
            metavar="NAME",
            show_default=False,
            help="Compute dtype (default auto)",
            rich_help_panel=panels.FORMAT,
            autocompletion=completion.dtypes,
        ),
    ] = "auto",
    quant_storage: Annotated[
        str,
        typer.Option(
            "--quant-storage",
            metavar="NAME",
            show_default=False,
            help="Dtype of codes (default uint8)",
            rich_help_panel=panels.FORMAT,
            autocompletion=completion.storages,
        ),
    ] = "uint8",
    skip_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--keep",
            "--skip-modules",
            metavar="GLOB",
            show_default=False,
            help="Modules to leave in float; repeatable",
            rich_help_panel=panels.KEPT,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="NAME",
            help="Dtype of these floats",
            rich_help_panel=panels.KEPT,
            autocompletion=completion.dtypes,
        ),
    ] = "auto",
    on_nonfinite: Annotated[
        str,
        typer.Option(
            "--on-nonfinite",
            metavar="NAME",
            show_default=False,
            help="NaN or infinity: error (default) or keep",
            rich_help_panel=panels.KEPT,
            autocompletion=completion.on_nonfinite,
        ),
    ] = "error",
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Take GPTQ and AWQ, rounded a second time",
            rich_help_panel=panels.KEPT,
        ),
    ] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Ask transformers which modules to keep",
            rich_help_panel=panels.KEPT,
        ),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let transformers run the model's code",
            rich_help_panel=panels.KEPT,
        ),
    ] = False,
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale",
            metavar="NAME",
            show_default=False,
            help="absmax (default), or search: less loss",
            rich_help_panel=panels.SCALES,
            autocompletion=completion.scales,
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="PATH",
            show_default=False,
            help="Text to measure inputs on; repeatable",
            rich_help_panel=panels.SCALES,
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            show_default=False,
            help="With --calibration: rtn, gptq or yaqa",
            rich_help_panel=panels.SCALES,
            autocompletion=completion.methods,
        ),
    ] = None,
    importance: Annotated[
        Path | None,
        typer.Option(
            "--importance",
            metavar="FILE",
            show_default=False,
            help="What an earlier --calibration measured",
            rich_help_panel=panels.SCALES,
        ),
    ] = None,
    save_importance: Annotated[
        Path | None,
        typer.Option(
            "--save-importance",
            metavar="FILE",
            show_default=False,
            help="Also write the measured importance there",
            rich_help_panel=panels.SCALES,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int,
        typer.Option(
            "--calibration-tokens",
            metavar="N",
            help="Tokens to run",
            rich_help_panel=panels.SCALES,
        ),
    ] = TOKENS,
    calibration_length: Annotated[
        int,
        typer.Option(
            "--calibration-length",
            metavar="N",
            help="Tokens per window",
            rich_help_panel=panels.SCALES,
        ),
    ] = LENGTH,
    damping: Annotated[
        float,
        typer.Option(
            "--damping", metavar="X", help="Damping of gptq and yaqa", rich_help_panel=panels.SCALES
        ),
    ] = DAMPING,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            show_default=False,
            help="PEFT LoRA to merge first; repeatable",
            rich_help_panel=panels.MERGING,
        ),
    ] = None,
    adapter_scale: Annotated[
        list[float] | None,
        typer.Option(
            "--adapter-scale",
            metavar="X",
            show_default=False,
            help="Factor of the adapter (default 1)",
            rich_help_panel=panels.MERGING,
        ),
    ] = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to",
            metavar="ORG/NAME",
            show_default=False,
            help="Publish the output there, in one commit",
            rich_help_panel=panels.HUB,
        ),
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            metavar="SIZE",
            show_default=False,
            help="Disk space to use at most, like 14GB",
            rich_help_panel=panels.HUB,
        ),
    ] = None,
    public: Annotated[
        bool,
        typer.Option("--public", help="Make a new repository public", rich_help_panel=panels.HUB),
    ] = False,
    replace_card: Annotated[
        bool,
        typer.Option(
            "--replace-card",
            help="Replace the repository's README.md",
            rich_help_panel=panels.HUB,
        ),
    ] = False,
    memory: MemoryOption = None,
    ray: RayOption = None,
    workers: WorkersOption = None,
    engine: EngineOption = "auto",
    device: DeviceOption = None,
    fsync: FsyncOption = True,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            show_default=False,
            help="Largest file: 5GB; 1GB with --disk --push-to",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    copy: Annotated[
        list[str] | None,
        typer.Option(
            "--copy",
            metavar="GLOB",
            show_default=False,
            help="More files of the source to copy; repeatable",
            rich_help_panel=panels.OUTPUT,
        ),
    ] = None,
    digest: Annotated[
        str,
        typer.Option(
            "--digest",
            metavar="NAME",
            show_default=False,
            help="Of files: auto (default), blake3, sha256",
            rich_help_panel=panels.OUTPUT,
            autocompletion=completion.digests,
        ),
    ] = "auto",
    html: HtmlOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a full-precision checkpoint to bitsandbytes 4-bit, streaming."""
    from ..api.request import Request
    from ..format.config import QuantConfig
    from .html_file import HtmlFile
    from .show.listener import TerminalListener  # --help shows neither run nor result
    from .show.outcome import show_plan

    _refuse_together({"--quiet": quiet, "--verbose": verbose})
    _refuse_together({"--plan": plan, "--html": html is not None})
    listener = TerminalListener(quiet, verbose)
    request = Request(
        source=source,
        output=output,
        config=QuantConfig(
            quant_type=quant_type,
            blocksize=64 if blocksize is None else blocksize,
            double_quant=double_quant is not False,
            quant_storage=quant_storage,
            compute_dtype=compute_dtype,
            dtype=dtype,
            keep=tuple(skip_modules or ()),
            target=target,
            on_nonfinite=on_nonfinite,
            requantize=requantize,
            scale=_scale(scale, importance, calibration),
            method=_method(method, calibration, save_importance),
        ),
        shard_size=_size(max_shard_size, "--max-shard-size"),
        copy=tuple(copy or ()),
        recipe_file=_recipe_file(recipe, blocksize, double_quant),
        importance_file=importance,
        calibrating=Calibrating.of(
            calibration, calibration_tokens, calibration_length, damping, save_importance
        ),
        exact=exact,
        trust_remote_code=trust_remote_code,
        digest=digest,
        machine=engine_choice.machine(engine, device, workers, memory, listener, ray),
        disk=_size(disk, "--disk"),
        push_to=push_to,
        public=public,
        replace_card=replace_card,
        fsync=fsync,
        resume=resume,
        listener=listener,
        adapters=tuple(adapter or ()),
        adapter_scales=tuple(adapter_scale or ()),
    )
    request.refuse_early()
    from ..api.quantizing import prepared  # it imports numpy: after what can be refused without

    with HtmlFile(html, source, output) as file, prepared(request, only_plan=plan) as job:
        if plan:
            show_plan(job, json)
        else:
            _run(job, file, listener, disk, json)


def _run(
    job: Job, file: HtmlFile, listener: TerminalListener, disk: str | None, json: bool
) -> None:
    """Convert, and show what was done.

    Args:
        disk: value of --disk as the user wrote it.
    """
    from .show.listener import tell_times
    from .show.outcome import conclude, page_of, tell_plan

    if listener.verbose:
        tell_plan(job)
    done = job.run()
    file.write(lambda: page_of(job, done))
    if listener.verbose:
        tell_times(job.seconds, done.seconds)
    conclude(job, done, listener, disk, json, listener.quiet)


def _refuse_together(given: dict[str, bool]) -> None:
    """Raise UsageError if all of these options are given."""
    from ..errors import UsageError

    if all(given.values()):
        names = " and ".join(given)
        raise UsageError(f"{names} do not go together: leave one of them out")


def _size(text: str | None, option: str) -> int | None:
    return None if text is None else options.parse_size(text, option)


def _recipe_file(recipe: Path | None, blocksize: int | None, nested: bool | None) -> Path | None:
    """Return --recipe.

    Raises:
        UsageError: an option is given that the recipe decides.
    """
    from ..errors import UsageError

    for option, given in (("--blocksize", blocksize), ("--double-quant", nested)):
        if recipe is not None and given is not None:
            raise UsageError(f"{option} is the recipe's to say, in [default]: leave it out")
    return recipe


def _scale(asked: str | None, importance: Path | None, calibration: list[Path] | None) -> str:
    """Return the --scale that is meant: with data, scales are searched for.

    Raises:
        UsageError: data is given twice, or with a --scale that uses none.
    """
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
    """Return the --method that is meant.

    Raises:
        UsageError: an option needs --calibration.
    """
    from ..errors import UsageError

    for option, given in (("--method", asked), ("--save-importance", save)):
        if given is not None and not calibration:
            raise UsageError(f"{option} needs --calibration, the text to measure with")
    return asked or "rtn"
