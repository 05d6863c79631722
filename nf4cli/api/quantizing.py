"""Convert a model, from finding its source to publishing the output: the work of `nf4cli.quantize`.

`nf4cli.plan` is the same up to the plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..checkpoint.digest import ALGORITHMS
from ..checkpoint.discovery import name_of_directory, with_copies
from ..checkpoint.types import Checkpoint
from ..convert.listener import NOBODY, Listener, Stage
from ..convert.output_place import check_output, require_place
from ..convert.transport import LOCAL
from ..convert.write_model import Execution, write_model
from ..errors import UsageError
from ..format.config import QuantConfig
from ..output.manifest import Manifest
from ..planning.answer import Answer
from ..planning.make_plan import make_plan
from ..planning.model_plan import ModelPlan
from ..planning.pipeline_plan import is_pipeline, make_pipeline_plan
from ..planning.resources import Resources, unit_of
from ..planning.vllm_rules import require_loadable
from . import sources
from .machine import Machine
from .sources import Source, require_repository

if TYPE_CHECKING:
    from ..checkpoint.importance_file import ImportanceFile
    from ..convert.transfers import Transfers
    from ..hub.carrier import HubTransport, Outlook
    from ..hub.publish import Publication, Published
    from ..planning.plan import Plan
    from ..quality.calibration.run import Calibrating

Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

SHARD_BYTES, LEAVING_SHARD_BYTES = 5_000_000_000, 1_000_000_000
"""Default of the largest output file: as loaders write it; where files leave a bounded disk."""


@dataclass(frozen=True)
class Request:
    """What to convert, how, and where the output goes.

    Attributes:
        source: a path, or a model on the Hub.
        output: a new directory. None for NAME-nf4 in the working directory; with `push_to`, None
            for an output on the Hub alone.
        config: the recipe; `recipe` replaces its `max_shard_size`.
        shard_size: bytes of the largest output file, None for the default.
        copy: patterns of files that are copied beside those that a model is made of.
        importance_file: weights errors when scales are searched for, None for no data.
        calibrating: text to run through the model first, None for no calibration.
        exact: ask transformers which modules it holds in 4 bit, whatever the family.
        trust_remote_code: let transformers run the model's own code for that.
        digest: algorithm of the files' digests; "auto" is SHA-256 where a Hub is involved.
        machine: converts.
        disk: most bytes that may lie on the disk at once, None for no limit.
        push_to: the repository to publish the output in, None for none.
        public, replace_card: see `Publication`.
        fsync, resume: see `Execution`.
        listener: told of stages, progress and notes.

    Raises:
        UsageError: options that do not go together.
    """

    source: Path
    output: Path | None = None
    config: QuantConfig = field(default_factory=QuantConfig)
    shard_size: int | None = None
    copy: tuple[str, ...] = ()
    importance_file: Path | None = None
    calibrating: Calibrating | None = None
    exact: bool = False
    trust_remote_code: bool = False
    digest: str = "auto"
    machine: Machine = field(default_factory=Machine)
    disk: int | None = None
    push_to: str | None = None
    public: bool = False
    replace_card: bool = False
    fsync: bool = True
    resume: bool = False
    listener: Listener = NOBODY

    def __post_init__(self) -> None:
        if self.digest not in ("auto", *ALGORITHMS):
            raise UsageError(f"--digest {self.digest} is not one of auto, {', '.join(ALGORITHMS)}")
        if self.push_to is not None:
            require_repository(self.push_to)
        for option, given in (("--public", self.public), ("--replace-card", self.replace_card)):
            if given and self.push_to is None:
                raise UsageError(f"{option} needs --push-to")

    @property
    def leaving(self) -> bool:
        """Return whether the output goes to the Hub alone."""
        return self.push_to is not None and self.output is None

    @cached_property
    def recipe(self) -> QuantConfig:
        """The recipe, with the largest output file decided."""
        leaves = self.disk is not None and self.leaving
        default = LEAVING_SHARD_BYTES if leaves else SHARD_BYTES
        return replace(self.config, max_shard_size=self.shard_size or default)

    def place(self, name: str) -> Path:
        """Return the output's directory; the run works beside it.

        Without an output on this disk the name is that of the repository, as the Hub's own cache
        would write it, so that no other file of the user is in its way.

        Args:
            name: of the source model.
        """
        if self.push_to is not None and self.leaving:
            return Path(f"models--{self.push_to.replace('/', '--')}")
        return self.output or Path(f"{name}-nf4")

    def algorithm(self, source: Source) -> str:
        """Return the algorithm of the files' digests: "blake3" or "sha256"."""
        if self.digest != "auto":
            return self.digest
        return "sha256" if source.snapshot or self.push_to else "blake3"

    @cached_property
    def importance(self) -> ImportanceFile | None:
        """The importance file, read at its first use; None where none was asked for.

        Raises:
            InputError: it is damaged.
        """
        from ..checkpoint.importance_file import load

        return None if self.importance_file is None else load(self.importance_file)

    def oracle(self, model: Checkpoint) -> Answer | None:
        """Return what transformers says of a model; None where it need not be asked.

        An argument of `make_plan`.
        """
        from ..planning.families import consult

        return consult(model, self.exact, self.trust_remote_code)

    def scan(self, preliminary: Plan) -> frozenset[str]:
        """Return the names of the weights that hold a NaN or an infinity, read with progress.

        An argument of `make_plan`.
        """
        from ..convert.find_nonfinite import nonfinite_weights, scan_bytes

        limits = self.machine.resources(len(preliminary.tensors))
        stage = Stage("looking for NaN", scan_bytes(preliminary))
        with self.listener.stage(stage) as progress:
            return nonfinite_weights(preliminary, self.machine.engine, limits, progress)

    def transport(self, source: Source) -> HubTransport | None:
        """Return what fetches and uploads the files of a run; None for a run without a Hub."""
        from ..convert.transfers import Transfers
        from ..hub.carrier import HubTransport

        snapshot = source.snapshot if source.outline else None
        if snapshot is None and self.disk is None and self.push_to is None:
            return None
        transfers = Transfers()
        return HubTransport(
            snapshot, self.disk, self._publication(transfers), self.leaving, transfers,
            self.listener.note,
        )  # fmt: skip

    def _publication(self, transfers: Transfers) -> Publication | None:
        """Return the commit in the making, None where nothing is published."""
        from ..hub.errors import report_to
        from ..hub.publish import Publication

        if self.push_to is None:
            return None
        report_to(self.listener.note)
        return Publication(
            self.push_to, self.public, self.replace_card, self.listener.note,
            transfers.add_uploaded,
        )  # fmt: skip


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
            make_plan(plan.checkpoint, recipe, request.oracle, importance=request.importance)
        )

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
        )  # fmt: skip
        with request.listener.stage(stage):
            manifests = write_model(
                self.model,
                self.output,
                Execution(
                    request.machine.engine, self.limits, request.algorithm(self.source),
                    request.fsync, request.resume, request.listener, self.transport or LOCAL,
                ),
            )  # fmt: skip
        return Quantized(
            self.stays, self.model, manifests, request.machine.engine.name,
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
    keep = request.disk is None and not only_plan
    continued = request.place if request.resume else None
    asked = sources.Files(request.copy, headers_only=only_plan)
    with sources.found(request.source, keep, request.listener, continued, asked) as source:
        started = time.monotonic()
        with _planned(request, source, only_plan) as (whole, model, output):
            limits = request.machine.resources(model.tensors, unit_of(request.recipe))
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
    output = request.place(checkpoint.name)
    if scans or calibrating:
        require_place(checkpoint.root, output, checkpoint.is_file, request.resume)
    # A calibrated model is planned twice; transformers is asked and NaN are looked for once.
    recipe, ask, scan = request.recipe, _once(request.oracle), _once(request.scan)
    plan = make_plan(checkpoint, recipe, ask, scan, request.importance)
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
    data = {"--importance": request.importance_file, "--calibration": request.calibrating}
    for option, given in data.items():
        if given is not None:
            raise UsageError(
                f"a pipeline's components are not calibrated: leave {option} out; --scale search "
                "needs no data"
            )
