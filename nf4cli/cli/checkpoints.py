"""nf4 quantize, of one checkpoint."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import common, hub, step_summary, views
from .common import parse_size

if TYPE_CHECKING:
    from ..plan import Plan
    from .hub import Source
    from .request import Request


def quantize(request: Request, source: Source) -> None:
    """Plan, run, summarise."""
    from ..limits import check_output, require_place
    from ..plan import make_plan
    from ..quantize import write_checkpoint
    from ..summary import conversion_section

    trip = request.trip
    if request.config.on_nonfinite == "keep":
        source = hub.whole(source, "--on-nonfinite keep", trip.disk, not request.shows)
    checkpoint = source.open()
    output = request.output or Path(f"{checkpoint.name}-nf4")
    if request.config.on_nonfinite == "keep":  # before all is read
        require_place(checkpoint.root, output, checkpoint.is_file, request.resume)
    plan = make_plan(checkpoint, request.config, request.oracle, request.scan)
    engine = request.engine
    limits = common.resources(engine, request.workers, request.memory, len(plan.tensors))
    carrier = trip.carrier(source)
    need = carrier.disk_needed(plan, limits.workers) if carrier else None
    if request.plan:
        need = 0  # what does not fit here may be planned all the same
    check_output(plan, output, limits.workers, request.resume, need)
    if request.plan:

        def pushed() -> Plan:
            size = parse_size(request.shard_size or hub.LEAVING_SHARDS, "--max-shard-size")
            config = replace(request.config, max_shard_size=size)
            return make_plan(checkpoint, config, request.oracle)

        outlook = hub.outlook(source, carrier, plan, pushed, engine, limits)
        if request.json:
            document = {**views.plan_document(plan, limits, output), "source": source.name}
            common.print_json("plan", {**document, **({"hub": outlook} if outlook else {})})
        else:
            views.print_plan(common.out_console(), plan, limits, output)
            if outlook:
                hub.show_outlook(outlook)
        return
    started = time.monotonic()
    with common.ProgressDisplay(plan.source_bytes, "quantizing", request.shows) as display:
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
        )
    seconds = time.monotonic() - started
    step_summary.append(lambda: conversion_section(output, {"": (plan, manifest)}))
    published = carrier.published if carrier else None
    if request.json:
        run = {"engine": engine.name, "seconds": round(seconds, 3)}
        result = views.result_document(plan, manifest, output)
        common.print_json("quantize", {**result, **run, **hub.document_of(published)})
    elif not request.quiet:
        views.print_result(
            common.out_console(), plan, manifest, output, engine.name, seconds, source.name
        )
        hub.show_published(published)
