"""Is the output that is there what this run would write?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from .. import __version__
from ..callbacks import Progress
from ..checkpoint.digest import digest_shards
from ..checkpoint.discovery import MANIFEST, open_checkpoint
from ..errors import InputError, UsageError
from ..planning.plan import Plan
from ..planning.resources import Resources
from .against_manifest import check_manifest
from .against_source import compare_beside
from .manifest import Manifest
from .report import Report


def confirm(
    plan: Plan, output: Path, algorithm: str, resources: Resources, progress: Progress
) -> Manifest:
    """The manifest of a finished output, when it is what `plan` would write.

    Every file of it is digested, and every file of the source; nothing is quantized.

    Raises:
        UsageError: it is not.
        InputError: the source cannot be read.
    """
    try:
        found = Manifest.from_file(output / MANIFEST)
        checkpoint = open_checkpoint(output)
    except InputError as error:
        raise another(output, str(error)) from error
    if (why := differs(plan, found, algorithm)) is not None:
        raise another(output, why)
    _require_source(plan, output, found, resources, progress)
    report = Report()
    check_manifest(checkpoint, {}, resources, report, progress)
    compare_beside(checkpoint, plan, found, report)
    require_none(output, report)
    return found


def differs(plan: Plan, found: Manifest, algorithm: str) -> str | None:
    """In which option an output is another than the one that `plan` would write."""
    wanted = {"tool": __version__, "digest": algorithm, **asdict(plan.config)}
    there = {"tool": found.tool_version, "digest": found.digest, **asdict(found.config)}
    for name, value in wanted.items():
        if there[name] != value:
            return f"its {name} is {there[name]!r}, not {value!r}"
    return None


def is_of_commit(plan: Plan, found: Manifest) -> bool:
    """Whether an output was made of the files that `plan` reads, of the same commit of a Hub."""
    origin = plan.checkpoint.origin
    names = {shard.path.name for shard in plan.checkpoint.shards}
    return (
        origin is not None
        and (found.source_repo, found.source_commit) == (origin.repo, origin.commit)
        and names == found.source_files.keys()
    )


def _require_source(
    plan: Plan, output: Path, found: Manifest, resources: Resources, progress: Progress
) -> None:
    """Raises UsageError unless `found` was made of the files that `plan` reads."""
    shards, origin = plan.checkpoint.shards, plan.checkpoint.origin
    if {shard.path.name for shard in shards} != found.source_files.keys():
        raise another(output, "it was made of other files")
    if origin is not None:  # a commit does not change
        if (found.source_repo, found.source_commit) != (origin.repo, origin.commit):
            made_of = f"{found.source_repo or found.source_name}@{found.source_commit}"
            raise another(output, f"it was made of {made_of}, not {origin.repo}@{origin.commit}")
        return
    digests = digest_shards(shards, found.digest, resources.workers, progress, tensors=False)
    for shard, (digest, _) in zip(shards, digests, strict=True):
        if digest != found.source_files[shard.path.name].digest:
            raise another(output, f"{shard.path} is not the file that it was made of")


def require_none(output: Path, report: Report) -> None:
    """Raises UsageError when the report has a finding."""
    if report.findings:
        raise another(output, report.findings[0].message)


def another(output: Path, why: str) -> UsageError:
    return UsageError(
        f"{output} exists, and is not what this would write: {why}. Remove it first, or choose "
        "another output"
    )
