"""nf4 quantize, of one checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import common, hub, step_summary, views
from .calibrating import calibrated
from .ledger import Ledger, tell_resources, tell_times, work_bytes
from .outcome import Outcome, print_outcome
from .progress import ProgressDisplay

if TYPE_CHECKING:
    from ..hub.carrier import Carrier
    from ..limits import Resources
    from ..manifest import Manifest
    from ..planned import Plan
    from .hub import Source, Trip
    from .request import Request


def quantize(request: Request, source: Source) -> None:
    """Plan, run, summarise."""
    from ..limits import require_place
    from ..plan import make_plan

    trip = request.trip
    if request.config.on_nonfinite == "keep":
        source = hub.whole(source, "--on-nonfinite keep", trip.disk, not request.shows)
    if request.calibrating and not request.plan:
        source = hub.whole(source, "--calibration", trip.disk, not request.shows)
    checkpoint = source.open()
    output = trip.place(checkpoint.name)
    if request.config.on_nonfinite == "keep":  # before all is read
        require_place(checkpoint.root, output, checkpoint.is_file, request.resume)
    plan = make_plan(checkpoint, request.config, request.oracle, request.scan, request.importance)
    if request.calibrating is None or request.plan:
        _convert(request, source, plan, output)
        return
    require_place(checkpoint.root, output, checkpoint.is_file, request.resume)
    with calibrated(request.calibrating, plan, output, request) as data:
        recipe, asked = request.config, request.oracle
        final = make_plan(checkpoint, recipe, asked, request.scan, data.importance)
        _convert(request, source, replace(final, codes=data.codes), output)


def _convert(request: Request, source: Source, plan: Plan, output: Path) -> None:
    """Run, summarise; or show the plan."""
    from ..limits import check_output, unit_of
    from ..quantize import write_checkpoint
    from ..summary import conversion_section

    trip, started, engine = request.trip, time.monotonic(), request.engine
    limits = common.resources(
        engine, request.workers, request.memory, len(plan.tensors), unit_of(plan.config)
    )
    carrier = trip.carrier(source)
    need = carrier.disk_needed(plan, limits.workers) if carrier else None
    if request.plan:
        need = 0  # what does not fit here may be planned all the same
    check_output(plan, output, limits.workers, request.resume, need)
    if request.plan:
        _show_plan(request, source, carrier, plan, limits, output)
        return
    planned = time.monotonic()
    if request.verbose:
        views.print_groups(common.err_console(), plan)
        tell_resources(engine.name, limits)
    with ProgressDisplay(
        work_bytes(plan), "quantizing", request.shows,
        what=f"{source.name} -> {trip.destination(output)}", weights=plan.parameters,
        transfers=carrier.transfers if carrier else None, place=output,
    ) as display:  # fmt: skip
        ledger = Ledger(display, request.verbose)
        manifest = write_checkpoint(
            plan,
            output,
            engine,
            limits,
            request.algorithm(source),
            request.fsync,
            request.resume,
            display,
            request.notify,
            carrier,
            ledger,
        )
    seconds = time.monotonic() - planned
    if request.verbose:
        tell_times(planned - started, seconds)
    parts = {"": (plan, manifest)}
    step_summary.append(lambda: conversion_section(trip.destination(output), parts))
    published = carrier.published if carrier else None
    if request.json:
        run = {"engine": engine.name, "seconds": round(seconds, 3)}
        result = views.result_document(plan, manifest, trip.stays(output))
        common.print_json("quantize", {**result, **run, **hub.document_of(published)})
    elif not request.quiet:
        outcome = Outcome(
            source=source.name,
            output=output,
            parts=parts,
            config=plan.output_config or {},
            notes=plan.notes,
            copied=None,
            engine=engine.name,
            workers=limits.workers,
            seconds=seconds,
            ledger=ledger,
            transfers=carrier.transfers if carrier else None,
            published=published,
            leaving=trip.leaving,
            disk=_bound_of_a_proof(trip, source, manifest),
        )
        print_outcome(common.out_console(), outcome)


def _bound_of_a_proof(trip: Trip, source: Source, manifest: Manifest) -> str | None:
    """The bound under which a proof of what was just made is possible; None for no bound."""
    from ..recipe import why_not_by_digests

    if source.snapshot is None and not trip.leaving:
        return None  # all of it lies here
    why_not = why_not_by_digests(manifest.config, manifest.digest, trip.leaving)
    return trip.disk if why_not is None else None


def _show_plan(
    request: Request,
    source: Source,
    carrier: Carrier | None,
    plan: Plan,
    limits: Resources,
    output: Path,
) -> None:
    from ..plan import make_plan

    def pushed() -> Plan:
        size = common.parse_size(request.shard_size or hub.LEAVING_SHARDS, "--max-shard-size")
        config = replace(request.config, max_shard_size=size)
        return make_plan(plan.checkpoint, config, request.oracle, importance=request.importance)

    outlook = hub.outlook(source, carrier, plan, pushed, request.engine, limits)
    if request.json:
        there = request.trip.stays(output)
        document = {**views.plan_document(plan, limits, there), "source": source.name}
        common.print_json("plan", {**document, **({"hub": outlook} if outlook else {})})
        return
    views.print_plan(common.out_console(), plan, limits, request.trip.destination(output))
    if outlook:
        hub.show_outlook(outlook)
