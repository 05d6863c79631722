"""Prove an output that does not fit on this disk with its source (nf4 verify --disk).

It is made again piece by piece. Its digests are compared, and nothing of it is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.listener import Stage
from . import sources
from .adapters import as_merged
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
    """A proof within a limit on the disk.

    Attributes:
        limit: most bytes that may lie on the disk at once.
        machine: quantizes again.
        adapters: those that were merged, in order.
    """

    limit: int
    machine: Machine
    adapters: Sequence[Path] = ()

    def prove(self, path: Path, source: Path) -> tuple[Report, str]:
        """Return the report of an output, and what messages call the output.

        Args:
            path, source: the output and its source as the user names them.

        Raises:
            UsageError: neither is on a Hub, one is a pipeline, or digests do not prove the output.
            InputError: the output has no manifest, or a damaged one.
            InputError, MachineError: see `sources.found` and `make_again`.
        """
        from ..errors import UsageError
        from ..hub.errors import is_offline
        from ..output.recipe_words import why_not_by_digests

        place, asked = _place(path), path
        if is_offline():  # no Hub states digests: read the files in the cache
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
        """Return the report; `place` names the directory that the run works beside."""
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
        merging = as_merged(self.adapters, manifest, self.machine)
        plan = plan_again(checkpoint, manifest, original.open(), report, merging)
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
        """Return what fetches the source, and the threads and buffers of the run.

        Raises:
            UsageError: the limit is too small.
        """
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

    def _verify_alone(self, checkpoint: Checkpoint, output: Source, earlier: Report) -> Report:
        """Return the report of an output on this disk, read whole, with earlier findings."""
        from ..proof.verify import verify

        limits = self.machine.resources(len(checkpoint.tensors) // 8)
        total = sum(shard.size for shard in checkpoint.shards)
        what = f"{output.called} against its manifest"
        with self.machine.listener.stage(Stage("verifying", total, what)) as progress:
            report = verify(
                output.path, None, self.machine.engine, limits, progress, elsewhere=True
            )
        report.findings += earlier.findings
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
        """Make the output again, and report each file whose digest differs."""
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
    """Return an output's manifest.

    Raises:
        UsageError: the output is a pipeline.
        InputError: there is no manifest, or it is damaged.
    """
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
    """Raise UsageError if a model is a pipeline."""
    from ..errors import UsageError
    from ..planning.pipeline_plan import is_pipeline

    if is_pipeline(source.path):
        raise UsageError(
            f"--disk does not go with a pipeline, and {source.called} is one: leave it out, and "
            "the files are fetched to the cache"
        )


def _refuse(output: Source, original: Source) -> None:
    """Raise UsageError if a limit makes no sense: nothing is fetched, or for a pipeline."""
    from ..errors import UsageError

    if output.snapshot is None and original.snapshot is None:
        raise UsageError(
            "--disk bounds what is fetched from a Hub, and both lie here: leave it out"
        )
    _refuse_pipeline(original)


def _place(path: Path) -> Path:
    """Return the directory that the run works beside, by the output's name; it is not written."""
    name = sources.named(path)
    if name is not None:
        return Path(f"models--{name.repo.replace('/', '--')}.proof")
    path = path.absolute()
    return path.parent / f"{path.name}.proof"
