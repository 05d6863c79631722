"""Convert a model, from finding its source to publishing the output: the work of `nf4cli.quantize`.

`nf4cli.plan` is the same up to the plan.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..checkpoint.adapter_files import largest_matrix
from ..checkpoint.discovery import name_of_directory, with_copies
from ..convert.listener import Stage
from ..convert.output_place import check_output, require_place
from ..convert.transport import LOCAL
from ..convert.write_model import Execution, write_model
from ..errors import UsageError
from ..output.manifest import Manifest
from ..planning.make_plan import make_plan
from ..planning.model_plan import ModelPlan
from ..planning.pipeline_plan import is_pipeline, make_pipeline_plan
from ..planning.resources import Resources, unit_of
from ..planning.vllm_rules import require_loadable
from . import sources
from .request import LEAVING_SHARD_BYTES, Request
from .sources import Source

if TYPE_CHECKING:
    from ..hub.carrier import HubTransport, Outlook
    from ..hub.publish import Published

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")


@dataclass(frozen=True)
class Quantized:
    """The result of a conversion.

    Attributes:
        output: the new directory, None where the output is on the Hub alone.
        model: the plan that was carried out.
        manifests: by component; "" is a checkpoint without a pipeline.
        engine: name of the engine that converted.
        seconds: time of converting and writing.
        published: the commit on the Hub, None where nothing was published.
    """

    output: Path | None
    model: ModelPlan
    manifests: Mapping[str, Manifest]
    engine: str
    seconds: float
    published: Published | None


@dataclass(frozen=True)
class Job:
    """A conversion that is planned, and can be shown or run.

    Attributes:
        request: what was asked for.
        source: where the model is read from.
        model: the plan.
        output: see `Request.place`.
        limits: threads and buffers of the run.
        transport: fetches and uploads files, None for a run without a Hub.
        seconds: time of planning.
    """

    request: Request
    source: Source
    model: ModelPlan
    output: Path
    limits: Resources
    transport: HubTransport | None
    seconds: float

    @property
    def destination(self) -> str:
        """The output as messages call it: a directory, or a repository."""
        request = self.request
        return request.push_to if request.push_to and request.leaving else str(self.output)

    @property
    def stays(self) -> Path | None:
        """The output's directory, None where the output goes to the Hub alone."""
        return None if self.request.leaving else self.output

    def outlook(self) -> tuple[Outlook, float] | None:
        """Return what the run would fetch and keep, and the speed of this machine.

        Returns:
            The amounts, and bytes of the source converted a second, measured now; None for a
            source on this disk.

        Raises:
            OSError: the temporary directory is full.
        """
        from ..convert.trial import bytes_per_second

        if self.transport is None or not self.source.outline:
            return None
        outlook = self.transport.outlook(self.model, self._pushed(), self.limits.workers)
        engine = self.request.machine.engine
        return outlook, bytes_per_second(engine, self.limits, self.request.recipe)

    def _pushed(self) -> ModelPlan:
        """Return the plan of a run whose output goes to the Hub alone, in smaller files."""
        request = self.request
        size = request.shard_size or LEAVING_SHARD_BYTES
        recipe = replace(request.recipe, max_shard_size=size)
        if self.model.is_pipeline:
            origin_of = self.source.origin_of
            return make_pipeline_plan(
                self.model.root, recipe, request.oracle, origin_of=origin_of, copy=request.copy
            )
        (plan,) = self.model.parts.values()
        return ModelPlan.of(
            make_plan(
                plan.checkpoint, recipe, request.oracle, importance=request.importance,
                merging=request.merging,
            )
        )  # fmt: skip

    def run(self) -> Quantized:
        """Convert the model, write the output and publish it.

        Raises:
            UsageError, InputError, MachineError, OSError: see `write_model`.
            UnfinishedRunError: the run was stopped on the way and can be continued.
        """
        request, started = self.request, time.monotonic()
        stage = Stage(
            "quantizing", sum(plan.work_bytes for plan in self.model.parts.values()),
            f"{self.source.name} -> {self.destination}", self.model.parameters,
            self.transport.transfers if self.transport else None, self.output,
            request.machine.crowd,
        )  # fmt: skip
        with request.listener.stage(stage):
            manifests = write_model(
                self.model,
                self.output,
                Execution(
                    request.machine.engine, self.limits, request.algorithm(self.source),
                    request.fsync, request.resume, request.listener, self.transport or LOCAL,
                    request.machine.cluster,
                ),
            )  # fmt: skip
        return Quantized(
            self.stays, self.model, manifests,
            request.machine.called,
            time.monotonic() - started, self.transport.outcome if self.transport else None,
        )  # fmt: skip


@contextmanager
def prepared(request: Request, only_plan: bool = False) -> Iterator[Job]:
    """Yield a planned conversion, after every check that can refuse it before it starts.

    Args:
        only_plan: it will not be run. Then nothing is calibrated, and a checkpoint may be larger
            than the free disk.

    Raises:
        UsageError, InputError, MachineError: the model cannot be converted.
    """
    if request.machine.ray is not None and sources.named(request.source) is None:
        # The nodes' processes have working directories of their own.
        request = replace(request, source=Path(os.path.abspath(request.source)))  # noqa: PTH100
    keep = request.disk is None and not only_plan
    continued = request.place if request.resume else None
    asked = sources.Files(request.copy, headers_only=only_plan)
    with sources.found(request.source, keep, request.listener, continued, asked) as source:
        started = time.monotonic()
        with _planned(request, source, only_plan) as (whole, model, output):
            limits = request.machine.resources(
                model.tensors, unit_of(request.recipe), largest_matrix(request.merging)
            )
            transport = request.transport(whole)
            need = transport.disk_needed(model, limits.workers) if transport else None
            if only_plan and not model.is_pipeline:
                need = 0  # a plan may be larger than this disk
            check_output(model, output, limits.workers, request.resume, need)
            seconds = time.monotonic() - started
            yield Job(request, whole, model, output, limits, transport, seconds)


@contextmanager
def _planned(
    request: Request, source: Source, only_plan: bool
) -> Iterator[tuple[Source, ModelPlan, Path]]:
    """Yield the source, its plan and the output's directory.

    A source that has to be read before its plan is final is fetched whole.
    """
    bounded = request.disk is not None
    scans = request.config.on_nonfinite == "keep"
    calibrating = None if only_plan else request.calibrating
    if scans:
        source = sources.whole(source, "--on-nonfinite keep", bounded, request.listener)
    if is_pipeline(source.path):
        _refuse_data(request)
        if request.machine.ray is not None and source.snapshot is not None:
            raise UsageError(
                f"{source.name} is a pipeline, whose small components --ray does not fetch: "
                "download it into a directory that all nodes share, with hf download"
            )
        output = request.place(name_of_directory(source.path))
        if scans:  # refuse before the long reading
            require_place(source.path, output, False, request.resume)
        model = make_pipeline_plan(
            source.path, request.recipe, request.oracle, request.scan, source.origin_of,
            request.copy,
        )  # fmt: skip
        yield source, model, output
        return
    if calibrating:
        source = sources.whole(source, "--calibration", bounded, request.listener)
    checkpoint = with_copies(source.open(), request.copy)
    request.require_recipe_of(checkpoint)
    output = request.place(checkpoint.name)
    if scans or calibrating:
        require_place(checkpoint.root, output, checkpoint.is_file, request.resume)
    # A calibrated model is planned twice; transformers is asked and NaN are looked for once.
    recipe, ask, scan = request.recipe, _once(request.oracle), _once(request.scan)
    plan = make_plan(checkpoint, recipe, ask, scan, request.importance, request.merging)
    require_loadable(plan)
    if calibrating is None:
        yield source, ModelPlan.of(plan), output
        return
    from ..quality.calibration.run import calibrated

    machine = request.machine
    with calibrated(
        calibrating, plan, output, machine.engine, machine.device, request.resume, request.listener
    ) as data:
        final = make_plan(checkpoint, recipe, ask, scan, data.importance)
        yield source, ModelPlan.of(replace(final, codes=data.codes)), output


def _once(ask: Callable[[Asked], Answered]) -> Callable[[Asked], Answered]:
    """Return a function that calls `ask` the first time, and gives its answer from then on."""
    answers: list[Answered] = []

    def asked(about: Asked) -> Answered:
        if not answers:
            answers.append(ask(about))
        return answers[0]

    return asked


def _refuse_data(request: Request) -> None:
    """Raise UsageError if an option was given that does not go with a pipeline."""
    if request.recipe_file is not None:
        raise UsageError(
            "--recipe is for one checkpoint, and this is a pipeline: give a component's directory"
        )
    if request.adapters:
        raise UsageError(
            "--adapter is for a checkpoint of one model, and this is a pipeline: give the "
            "directory of one component, or merge it with diffusers' fuse_lora"
        )
    data = {"--importance": request.importance_file, "--calibration": request.calibrating}
    for option, given in data.items():
        if given is not None:
            raise UsageError(
                f"a pipeline's components are not calibrated: leave {option} out; --scale search "
                "needs no data"
            )
