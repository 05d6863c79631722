"""nf4 quantize, of a checkpoint or of a pipeline: plan, run, summarise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import common, hub, step_summary, views
from .calibrating import calibrated
from .ledger import Ledger, tell_resources, tell_times, work_bytes
from .outcome import Outcome, print_outcome
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..hub.carrier import HubTransport
    from ..limits import Resources
    from ..manifest import Manifest
    from ..model_plan import ModelPlan
    from .hub import Source, Trip
    from .request import Request


@dataclass(frozen=True)
class Job:
    """A conversion, ready to be shown or run.

    Attributes:
        source: where the model is read from.
        model: what will be written.
        output: where, or where it would be.
        limits: what the run may take of the machine.
        transport: moves the files; None where they lie here and stay here.
        seconds: that planning took.
    """

    request: Request
    source: Source
    model: ModelPlan
    output: Path
    limits: Resources
    transport: HubTransport | None
    seconds: float


def quantize(request: Request, source: Source) -> None:
    """Plan, run, summarise; or only show the plan.

    Raises:
        UsageError: options that do not go with a pipeline, which the source is.
    """
    started = time.monotonic()
    with _planned(request, source) as (whole, model, output):
        job = _job(request, whole, model, output, started)
        if request.plan:
            _show_plan(job)
        else:
            _run(job)


@contextmanager
def _planned(request: Request, source: Source) -> Iterator[tuple[Source, ModelPlan, Path]]:
    """Yield (the source, with all of its bytes where they are needed, its plan, the output)."""
    from ..diffusion import is_pipeline, make_pipeline_plan
    from ..limits import require_place
    from ..model_plan import ModelPlan
    from ..plan import make_plan
    from ..source import name_of_directory

    trip, pipeline = request.trip, is_pipeline(source.path)
    if pipeline:
        _refuse_data(request)
    if request.config.on_nonfinite == "keep":
        source = hub.whole(source, "--on-nonfinite keep", trip.disk, not request.shows)
    if request.calibrating and not request.plan:
        source = hub.whole(source, "--calibration", trip.disk, not request.shows)
    if pipeline:
        output = trip.place(name_of_directory(source.path))
        if request.config.on_nonfinite == "keep":  # before all is read
            require_place(source.path, output, False, request.resume)
        yield source, make_pipeline_plan(
            source.path, request.config, request.oracle, request.scan, source.origin_of
        ), output  # fmt: skip
        return
    checkpoint = source.open()
    output = trip.place(checkpoint.name)
    if request.config.on_nonfinite == "keep" or (request.calibrating and not request.plan):
        require_place(checkpoint.root, output, checkpoint.is_file, request.resume)
    recipe, ask = request.config, request.oracle
    plan = make_plan(checkpoint, recipe, ask, request.scan, request.importance)
    if request.calibrating is None or request.plan:
        yield source, ModelPlan.of(plan), output
        return
    with calibrated(request.calibrating, plan, output, request) as data:
        final = make_plan(checkpoint, recipe, ask, request.scan, data.importance)
        yield source, ModelPlan.of(replace(final, codes=data.codes)), output


def _refuse_data(request: Request) -> None:
    """Raise UsageError for options that go with a single model only."""
    from ..errors import UsageError

    for option, given in (
        ("--importance", request.importance_file), ("--calibration", request.calibrating),
    ):  # fmt: skip
        if given is not None:
            raise UsageError(
                f"a pipeline's components are not calibrated: leave {option} out; --scale search "
                "needs no data"
            )


def _job(request: Request, source: Source, model: ModelPlan, output: Path, started: float) -> Job:
    """Return what is run or shown, with everything looked at that could refuse it."""
    from ..limits import check_output, unit_of

    limits = common.resources(
        request.engine, request.workers, request.memory, model.tensors, unit_of(request.config)
    )
    transport = request.trip.transport(source)
    need = transport.disk_needed(model, limits.workers) if transport else None
    if request.plan and not model.is_pipeline:
        need = 0  # what does not fit here may be planned all the same
    check_output(model, output, limits.workers, request.resume, need)
    return Job(request, source, model, output, limits, transport, time.monotonic() - started)


def _run(job: Job) -> None:
    """Carry a plan out and say what came of it."""
    from ..quantize import Execution, write_model
    from ..transport import LOCAL

    request, trip, model = job.request, job.request.trip, job.model
    if request.verbose:
        _tell_plan(job)
    started = time.monotonic()
    with ProgressDisplay(
        sum(map(work_bytes, model.parts.values())), "quantizing", request.shows,
        what=f"{job.source.name} -> {trip.destination(job.output)}", weights=model.parameters,
        transfers=job.transport.transfers if job.transport else None, place=job.output,
    ) as display:  # fmt: skip
        ledger = Ledger(display, request.verbose, request.notify)
        run = Execution(
            request.engine, job.limits, request.algorithm(job.source), request.fsync,
            request.resume, ledger, job.transport or LOCAL,
        )  # fmt: skip
        manifests = write_model(model, job.output, run)
    seconds = time.monotonic() - started
    if request.verbose:
        tell_times(job.seconds, seconds)
    _conclude(job, manifests, ledger, seconds)


def _tell_plan(job: Job) -> None:
    """Say what becomes of the weights, and what the run may take of the machine."""
    console = common.err_console()
    for name, plan in job.model.parts.items():
        if name:
            console.print(f"[bold]{common.plain(name)}[/]")
        views.print_groups(console, plan)
    tell_resources(job.request.engine.name, job.limits)


def _conclude(job: Job, manifests: dict[str, Manifest], ledger: Ledger, seconds: float) -> None:
    """Show the result: as JSON, or as a summary, and on the page of a job."""
    from ..summary import conversion_section

    request, trip, model = job.request, job.request.trip, job.model
    parts = {name: (model.parts[name], manifest) for name, manifest in manifests.items()}
    step_summary.append(lambda: conversion_section(trip.destination(job.output), parts))
    published = job.transport.outcome if job.transport else None
    if request.json:
        run = {"engine": request.engine.name, "seconds": round(seconds, 3)}
        document = views.model_document(model, manifests, trip.stays(job.output))
        common.print_json("quantize", {**document, **run, **hub.document_of(published)})
    elif not request.quiet:
        outcome = Outcome(
            source=job.source.name,
            output=job.output,
            parts=parts,
            config={} if model.is_pipeline else model.parts[""].output_config or {},
            notes=tuple(model.notes),
            copied=model.copies.nbytes if model.is_pipeline else None,
            engine=request.engine.name,
            workers=job.limits.workers,
            seconds=seconds,
            ledger=ledger,
            transfers=job.transport.transfers if job.transport else None,
            published=published,
            leaving=trip.leaving,
            disk=_bound_of_a_proof(trip, job.source, manifests),
        )
        print_outcome(common.out_console(), outcome)


def _bound_of_a_proof(trip: Trip, source: Source, manifests: dict[str, Manifest]) -> str | None:
    """Return the bound under which a proof of what was just made is possible; None for no bound."""
    from ..recipe import why_not_by_digests

    manifest = manifests.get("")
    if manifest is None or (source.snapshot is None and not trip.leaving):
        return None  # a pipeline, or all of it lies here
    why_not = why_not_by_digests(manifest.config, manifest.digest, trip.leaving)
    return trip.disk if why_not is None else None


def _show_plan(job: Job) -> None:
    """Print what would be written."""
    request, model = job.request, job.model
    outlook = hub.outlook(job.source, job.transport, model, lambda: _pushed(job), request.engine,
                          job.limits)  # fmt: skip
    if request.json:
        there = request.trip.stays(job.output)
        document = {
            **views.model_plan_document(model, job.limits, there),
            "source": job.source.name,
        }
        common.print_json("plan", {**document, **({"hub": outlook} if outlook else {})})
        return
    views.print_model_plan(
        common.out_console(), model, job.limits, request.trip.destination(job.output)
    )
    if outlook:
        hub.show_outlook(outlook)


def _pushed(job: Job) -> ModelPlan:
    """Return the plan of a run whose output leaves the disk."""
    from ..diffusion import make_pipeline_plan
    from ..model_plan import ModelPlan
    from ..plan import make_plan

    request = job.request
    size = common.parse_size(request.shard_size or hub.LEAVING_SHARDS, "--max-shard-size")
    recipe = replace(request.config, max_shard_size=size)
    if job.model.is_pipeline:
        return make_pipeline_plan(
            job.model.root, recipe, request.oracle, origin_of=job.source.origin_of
        )
    (plan,) = job.model.parts.values()
    return ModelPlan.of(
        make_plan(plan.checkpoint, recipe, request.oracle, importance=request.importance)
    )
