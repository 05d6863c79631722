"""Diffusers pipelines on the command line: a section for each component."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import stopping
from . import common, hub, step_summary, views
from .common import format_size, plain, plural
from .ledger import Ledger, tell_resources, tell_times, work_bytes
from .outcome import Outcome, print_outcome
from .progress import ProgressDisplay
from .rows import listed

if TYPE_CHECKING:
    from ..diffusion import PipelinePlan
    from ..engines import Engine
    from ..limits import Resources
    from ..records import Checkpoint
    from .hub import Source
    from .request import Request


def quantize(request: Request, source: Source) -> None:
    """nf4 quantize, of a directory with model_index.json."""
    from ..assembly import check_pipeline_output, write_pipeline
    from ..diffusion import make_pipeline_plan
    from ..limits import require_place, unit_of
    from ..push import check, push
    from ..quantize import unpublished
    from ..source import name_of_directory
    from ..summary import conversion_section
    from ..transfers import Transfers

    json, quiet, trip = request.json, request.quiet, request.trip
    started = time.monotonic()
    _refuse_bound(request, source)
    if not request.plan or request.config.on_nonfinite == "keep":
        source = hub.whole(source, "a pipeline", trip.disk, not request.shows)
    output = trip.output or Path(f"{name_of_directory(source.path)}-nf4")
    if request.config.on_nonfinite == "keep":
        require_place(source.path, output, False, request.resume)  # before all is read
    decided = make_pipeline_plan(
        source.path, request.config, request.oracle, request.scan, source.origin_of
    )
    tensors = sum(len(part.tensors) for part in decided.parts.values())
    engine = request.engine
    limits = common.resources(
        engine, request.workers, request.memory, tensors, unit_of(request.config)
    )
    check_pipeline_output(decided, output, limits.workers, request.resume)
    if request.plan:
        if json:
            document = _plan_document(decided, limits, output)
            common.print_json("plan", {**document, "source": source.name})
        else:
            _print_plan(decided, limits, output)
        return
    publication = trip.publication(Transfers())
    if publication is not None:
        publication.prepare()
    planned = time.monotonic()
    if request.verbose:
        _tell_plan(decided, engine, limits)
    with stopping.finishing():
        with ProgressDisplay(
            sum(map(work_bytes, decided.parts.values())), "quantizing", request.shows,
            what=f"{source.name} -> {output}",
            weights=sum(part.parameters for part in decided.parts.values()), place=output,
        ) as display:  # fmt: skip
            ledger = Ledger(display, request.verbose)
            manifests = write_pipeline(
                decided,
                output,
                engine,
                limits,
                request.algorithm(source),
                request.fsync,
                request.resume,
                display,
                request.notify,
                ledger,
            )
        with unpublished(output):
            published = push(check(output, limits.workers), publication) if publication else None
    seconds = time.monotonic() - planned
    if request.verbose:
        tell_times(planned - started, seconds)
    parts = {name: (decided.parts[name], manifest) for name, manifest in manifests.items()}
    step_summary.append(lambda: conversion_section(str(output), parts))
    if json:
        common.print_json("quantize", {
            "output": str(output),
            "engine": engine.name,
            "seconds": round(seconds, 3),
            "source_bytes": decided.source_bytes,
            "output_bytes": decided.shard_bytes,
            "components": {
                name: views.result_document(part, manifest, output / name)
                for name, (part, manifest) in parts.items()
            },
            "copied_bytes": decided.copies.nbytes,
            "notes": list(decided.notes),
            **hub.document_of(published),
        })  # fmt: skip
        return
    if quiet:
        return
    outcome = Outcome(
        source=source.name,
        output=output,
        parts=parts,
        config={},
        notes=tuple(decided.notes),
        copied=decided.copies.nbytes,
        engine=engine.name,
        workers=limits.workers,
        seconds=seconds,
        ledger=ledger,
        published=published,
    )
    print_outcome(common.out_console(), outcome)


def _tell_plan(plan: PipelinePlan, engine: Engine, limits: Resources) -> None:
    """Say under --verbose what becomes of each component's tensors, and with what."""
    for name, part in plan.parts.items():
        common.err_console().print(f"[bold]{plain(name)}[/]")
        views.print_groups(common.err_console(), part)
    tell_resources(engine.name, limits)


def _refuse_bound(request: Request, source: Source) -> None:
    """Raises UsageError for what goes with a single model only."""
    from ..errors import UsageError

    if request.importance_file is not None:
        raise UsageError(
            "a pipeline's components are not calibrated: leave --importance out; --scale search "
            "needs no data"
        )
    if request.trip.disk is not None and not request.plan:
        raise UsageError(
            f"--disk does not go with a pipeline, and {source.name} is one: its components are "
            "converted one after another, with all of it here"
        )


def _plan_document(plan: PipelinePlan, limits: Resources, output: Path) -> dict[str, Any]:
    from ..assembly import pipeline_disk_bytes

    return {
        "source": str(plan.root),
        "output": str(output),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.shard_bytes,
        "peak_memory_bytes": limits.memory,
        "peak_disk_bytes": pipeline_disk_bytes(plan, limits.workers),
        "workers": limits.workers,
        "components": {
            name: views.plan_document(part, limits, output / name)
            for name, part in plan.parts.items()
        },
        "copied_files": sorted([*plan.copies.files, *plan.copies.texts]),
        "copied_bytes": plan.copies.nbytes,
        "left_files": plan.left_files,
        "notes": list(plan.notes),
    }


def _print_plan(plan: PipelinePlan, limits: Resources, output: Path) -> None:
    from ..assembly import pipeline_disk_bytes

    console = common.out_console()
    console.print(f"[bold]{plain(plan.root)}[/] -> [bold]{plain(output)}[/]")
    views.print_notes(console, plan.notes)
    for name, part in plan.parts.items():
        files = plural(len(part.shards), "file")
        console.print(f"[bold]{plain(name)}[/]: {part.shard_bytes:,} bytes in {files}")
        views.print_groups(console, part)
    console.print(
        f"output  {plan.shard_bytes:,} bytes in {plural(len(plan.parts), 'component')}, from "
        f"{plan.source_bytes:,}, and {plan.copies.nbytes:,} bytes copied"
    )
    console.print(
        f"memory  at most {format_size(limits.memory)} with {plural(limits.workers, 'worker')}"
    )
    console.print(f"disk    {format_size(pipeline_disk_bytes(plan, limits.workers))} at the peak")
    listed(console, "copied  ", sorted((*plan.copies.files, *plan.copies.texts)))
    if plan.left_files:
        listed(console, "left    ", plan.left_files)


def inspect(
    path: Path,
    called: str,
    tensor: str | None,
    json: bool,
    show_tensor: Callable[[Checkpoint, str, bool], None],
) -> None:
    """nf4 inspect: every component with weights that can be read, or one tensor of one of them.

    Args:
        called: what a user reads of `path`.

    Raises:
        UsageError: the tensor's name does not begin with a component's.
    """
    from ..diffusion import components_of
    from ..errors import InputError, UsageError
    from ..inspection import overview
    from ..source import open_checkpoint

    components = components_of(path)
    if tensor is not None:
        name, _, rest = tensor.replace("/", ".", 1).partition(".")
        if name not in components or not rest:
            raise UsageError(
                f"{tensor!r} names no component of {path}: write COMPONENT.TENSOR, where COMPONENT "
                f"is one of {', '.join(components)}"
            )
        show_tensor(open_checkpoint(path / name), rest, json)
        return
    seen = {}
    for name in components:
        try:
            seen[name] = overview(open_checkpoint(path / name))
        except InputError:
            if components[name].converts:
                raise
    if json:
        common.print_json("inspect", {
            "name": path.resolve().name,
            "components": {name: asdict(part) for name, part in seen.items()},
        })  # fmt: skip
        return
    console = common.out_console()
    for name, part in seen.items():
        views.print_overview(console, part, f"{called}/{name}")
