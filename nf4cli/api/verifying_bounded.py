"""A proof of what does not fit on this disk: nf4 verify --disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.listener import Stage
from . import sources
from .machine import Machine

if TYPE_CHECKING:
    from ..checkpoint.types import Checkpoint
    from ..hub.carrier import HubTransport
    from ..output.manifest import Manifest
    from ..output.report import Report
    from ..planning.plan import Plan
    from ..planning.resources import Resources
    from .sources import Source

    Carried = tuple[HubTransport, Resources]


@dataclass(frozen=True)
class Bounded:
    """What is asked.

    Attributes:
        limit: bytes that may lie on the disk at once.
    """

    limit: int
    machine: Machine

    def prove(self, path: Path, source: Path) -> tuple[Report, str]:
        """(what was found, what the output is called).

        Args:
            path, source: as given; one of them at least is a model of a Hub.

        Raises:
            UsageError: neither is; a pipeline; an output that digests do not prove.
            InputError: the output has no manifest that can be read.
            InputError, MachineError: see `found` and `make_again`.
        """
        from ..errors import UsageError
        from ..hub.errors import is_offline
        from ..output.recipe_words import why_not_by_digests

        place, asked = _place(path), path
        if is_offline():  # nobody states anything: the cache's own files are looked at
            path = sources.local(path, self.machine.listener)
        with sources.found(path, False, self.machine.listener) as output:
            called = output.called if output.snapshot else sources.shown(asked, path)
            manifest = _manifest_of(output)
            why = why_not_by_digests(manifest.config, manifest.digest, output.snapshot is not None)
            if why is not None:
                raise UsageError(f"--disk does not go with {called}: {why}. Leave it out")
            source = sources.as_recorded(source, manifest, self.machine.listener.note)
            with sources.found(source, False, self.machine.listener) as original:
                _refuse(output, original)
                return self._prove(output, manifest, original, place), called

    def _prove(self, output: Source, manifest: Manifest, original: Source, place: Path) -> Report:
        from ..errors import InputError
        from ..hub.errors import endpoint
        from ..output.report import Report
        from ..proof.by_digests import StatedFile, check_stated, plan_again

        report = Report()
        try:
            checkpoint = output.open()
        except InputError as error:
            report.add(
                "structure", output.called, str(error).replace(str(output.path), output.name)
            )
            report.check("structure", "every file opens")
            return report
        plan = plan_again(checkpoint, manifest, original.open(), report)
        carried = plan and self._carried(plan, original, output.called)
        if output.snapshot is not None:
            stated = {
                name: StatedFile(file.size, file.sha256)
                for name, file in output.snapshot.files.items()
            }
            check_stated(checkpoint, manifest, stated, endpoint(), report)
        else:
            report = self._verify_alone(checkpoint, output, report)
        if plan and carried:
            self._make(checkpoint, manifest, plan, carried, original, output, place, report)
        return report

    def _carried(self, plan: Plan, original: Source, called: str) -> Carried:
        """How the source comes here; refuses a bound that is too small before the long work."""
        from ..convert.transfers import Transfers
        from ..hub.carrier import HubTransport
        from ..planning.model_plan import ModelPlan
        from ..planning.resources import unit_of

        limits = self.machine.resources(len(plan.tensors), unit_of(plan.config))
        snapshot = original.snapshot if original.outline else None
        note = self.machine.listener.note
        transport = HubTransport(snapshot, self.limit, None, True, Transfers(), note, called)
        transport.disk_needed(ModelPlan.of(plan), limits.workers)
        return transport, limits

    def _verify_alone(self, checkpoint: Checkpoint, output: Source, found: Report) -> Report:
        """An output that lies here: its own bytes are looked at as well."""
        from ..proof.verify import verify

        limits = self.machine.resources(len(checkpoint.tensors) // 8)
        total = sum(shard.size for shard in checkpoint.shards)
        what = f"{output.called} against its manifest"
        with self.machine.listener.stage(Stage("verifying", total, what)) as progress:
            report = verify(
                output.path, None, self.machine.engine, limits, progress, elsewhere=True
            )
        report.findings += found.findings
        return report

    def _make(
        self,
        checkpoint: Checkpoint,
        manifest: Manifest,
        plan: Plan,
        carried: Carried,
        original: Source,
        output: Source,
        place: Path,
        report: Report,
    ) -> None:
        from ..convert.write_model import Execution
        from ..proof.by_digests import check_made, make_again

        transport, limits = carried
        listener = self.machine.listener
        stage = Stage(
            "verifying", plan.work_bytes, f"{output.called} against {original.called}",
            plan.parameters, transport.transfers, place,
        )  # fmt: skip
        with listener.stage(stage):
            run = Execution(
                self.machine.engine, limits, manifest.digest, fsync=False, listener=listener,
                transport=transport,
            )  # fmt: skip
            made = make_again(plan, place, run)
        source = Path(original.called)
        check_made(checkpoint, manifest, plan, made, source, self.machine.engine, report)


def _manifest_of(output: Source) -> Manifest:
    from ..checkpoint.discovery import MANIFEST
    from ..errors import InputError
    from ..output.manifest import Manifest

    _refuse_pipeline(output)
    if not (output.path / MANIFEST).is_file():
        raise InputError(
            f"{output.called} has no {MANIFEST}, by whose digests it could be proved within a "
            "bound on the disk: verify it without --disk"
        )
    return Manifest.from_file(output.path / MANIFEST)


def _refuse_pipeline(source: Source) -> None:
    """Raises UsageError for what is converted one component after another."""
    from ..errors import UsageError
    from ..planning.pipeline_plan import is_pipeline

    if is_pipeline(source.path):
        raise UsageError(
            f"--disk does not go with a pipeline, and {source.called} is one: leave it out, and "
            "the files are fetched to the cache"
        )


def _refuse(output: Source, original: Source) -> None:
    """Raises UsageError where a bound makes no sense."""
    from ..errors import UsageError

    if output.snapshot is None and original.snapshot is None:
        raise UsageError(
            "--disk bounds what is fetched from a Hub, and both lie here: leave it out"
        )
    _refuse_pipeline(original)


def _place(path: Path) -> Path:
    """Where what is made would lie: beside an output that is here, here for one on a Hub."""
    name = sources.named(path)
    if name is not None:
        return Path(f"models--{name.repo.replace('/', '--')}.proof")
    path = path.absolute()
    return path.parent / f"{path.name}.proof"
