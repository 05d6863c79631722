"""Tell whether an output that already exists is the one that a run would write."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..callbacks import Progress
from ..checkpoint.digest import digest_shards
from ..checkpoint.discovery import MANIFEST, open_checkpoint
from ..errors import InputError, UsageError
from ..planning.plan import Plan
from ..planning.resources import Resources
from ..version import __version__
from .against_manifest import check_manifest
from .against_source import compare_beside
from .manifest import Manifest
from .recorded_choices import copied_names
from .report import Report


def confirm(
    plan: Plan, output: Path, algorithm: str, resources: Resources, progress: Progress
) -> Manifest:
    """Return the manifest of a finished output, which has to be what `plan` would write.

    Every file of the output is digested, and every file of a source that comes from no Hub.
    Nothing is quantized.

    Args:
        algorithm: of the digests of files that the run would write.

    Raises:
        UsageError: the output is another one, or cannot be read.
        InputError: the source cannot be read.
    """
    try:
        manifest = Manifest.from_file(output / MANIFEST)
        checkpoint = open_checkpoint(output)
    except InputError as error:
        raise unlike_planned(output, str(error)) from error
    if (why := differs(plan, manifest, algorithm)) is not None:
        raise unlike_planned(output, why)
    if (why := copies_otherwise(plan, manifest)) is not None:
        raise unlike_planned(output, why)
    _require_source(plan, output, manifest, resources, progress)
    report = Report()
    check_manifest(checkpoint, {}, manifest, resources, report, progress)
    compare_beside(checkpoint, plan, manifest, report)
    require_no_finding(output, report)
    return manifest


def differs(plan: Plan, manifest: Manifest, algorithm: str) -> str | None:
    """Return how an output's recipe differs from the one that a run would use; None if it does not.

    Args:
        manifest: of the output.
        algorithm: of the digests of files that the run would write.
    """
    planned = {"tool": __version__, "digest": algorithm, **asdict(plan.config)}
    recorded = {
        "tool": manifest.tool_version, "digest": manifest.digest, **asdict(manifest.config)
    }  # fmt: skip
    for name, value in planned.items():
        if recorded[name] != value:
            return f"its {name} is {recorded[name]!r}, not {value!r}"
    return None


def is_of_commit(plan: Plan, manifest: Manifest) -> bool:
    """Return whether an output was made of the files that `plan` reads, from the same commit.

    Args:
        manifest: of the output.
    """
    origin = plan.checkpoint.origin
    names = {shard.path.name for shard in plan.checkpoint.shards}
    return (
        origin is not None
        and (manifest.source_repo, manifest.source_commit) == (origin.repo, origin.commit)
        and names == manifest.source_files.keys()
    )


def copies_otherwise(plan: Plan, manifest: Manifest) -> str | None:
    """Return how the copies of an output are not those that `plan` makes; None if they are."""
    planned = {*plan.checkpoint.extra_files} - {"config.json"}
    recorded = copied_names(manifest)
    if more := sorted(recorded - planned):
        return f"it has a copy of {more[0]}, which this does not copy"
    if fewer := sorted(planned - recorded):
        return f"it has no copy of {fewer[0]}"
    return None


def _require_source(
    plan: Plan, output: Path, manifest: Manifest, resources: Resources, progress: Progress
) -> None:
    """Raise UsageError unless an output was made of the files that `plan` reads.

    Args:
        manifest: of the output.
    """
    shards, origin = plan.checkpoint.shards, plan.checkpoint.origin
    if {shard.path.name for shard in shards} != manifest.source_files.keys():
        raise unlike_planned(output, "it was made of other files")
    if origin is not None:  # a commit does not change
        if (manifest.source_repo, manifest.source_commit) != (origin.repo, origin.commit):
            made_of = f"{manifest.source_repo or manifest.source_name}@{manifest.source_commit}"
            raise unlike_planned(
                output, f"it was made of {made_of}, not {origin.repo}@{origin.commit}"
            )
        return
    digests = digest_shards(shards, manifest.digest, resources.workers, progress, tensors=False)
    for shard, (digest, _) in zip(shards, digests, strict=True):
        if digest != manifest.source_files[shard.path.name].digest:
            raise unlike_planned(output, f"{shard.path} is not the file that it was made of")


def require_no_finding(output: Path, report: Report) -> None:
    """Raise UsageError if the report has a finding."""
    if report.findings:
        raise unlike_planned(output, report.findings[0].message)


def unlike_planned(output: Path, why: str) -> UsageError:
    """Return the error for an output that is not what a run would write."""
    return UsageError(
        f"{output} exists, and is not what this would write: {why}. Remove it first, or choose "
        "another output"
    )
