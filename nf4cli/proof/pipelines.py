"""Verify a whole diffusers pipeline, component by component."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..callbacks import Progress, no_progress
from ..checkpoint.discovery import open_checkpoint
from ..convert.tasks import Cluster
from ..engines.protocol import Engine
from ..errors import InputError
from ..output.pipeline_record import check_copies, check_recorded, read_record
from ..output.report import Report
from ..planning.pipeline_plan import INDEX_FILE, components_of, is_pipeline, packed_components
from ..planning.resources import Resources
from .verify import verify


@dataclass(slots=True)
class PipelineReport:
    """What was found in a pipeline.

    Attributes:
        own: the report on everything but the converted components.
        parts: the report of each converted component, by name.
    """

    own: Report = field(default_factory=Report)
    parts: dict[str, Report] = field(default_factory=dict)


def verify_pipeline(
    path: Path,
    source: Path | None,
    engine: Engine,
    resources: Resources,
    progress: Progress = no_progress,
    cluster: Cluster | None = None,
) -> PipelineReport:
    """Check a pipeline with 4-bit components, written by nf4 or not.

    Args:
        path: the pipeline.
        source: the pipeline that it was made from; None for no proof.
        engine, resources, progress: see `Tools`.
        cluster: reads and quantizes; None to do it here.

    Raises:
        InputError: `path` holds no 4-bit component, `source` is no pipeline, or a component of it
            is damaged.
    """
    report = PipelineReport()
    record = read_record(path, report.own)
    try:
        components = components_of(path)
    except InputError as error:
        if record is None:
            raise
        report.own.add("structure", INDEX_FILE, str(error))
        return report
    recorded = record.components if record else ()
    packed = list(dict.fromkeys([*packed_components(path, components), *recorded]))
    if not packed and report.own.ok:
        raise InputError(
            f"{path} has no component with bitsandbytes 4-bit weights: there is nothing to "
            "verify. Make one with nf4 quantize"
        )
    originals = _originals(source, packed, report.own)
    report.own.check("structure", "model_index.json names what is there")
    check_recorded(path, record, packed, report.own)
    for name in packed:
        report.parts[name] = _verify_part(
            path / name, originals.get(name), engine, resources, progress, cluster
        )
    if source is not None:
        check_copies(path, source, packed, record, report.own)
    return report


def _originals(source: Path | None, packed: list[str], report: Report) -> dict[str, Path]:
    """Return the source's directory of each packed component; report those that it lacks.

    Raises:
        InputError: `source` is no pipeline, or a component of it is damaged.
    """
    if source is None:
        return {}
    if not is_pipeline(source):
        raise InputError(f"{source} is no diffusers pipeline: it has no {INDEX_FILE}")
    components = components_of(source)
    for name in packed:
        if name not in components:
            report.add("structure", name, f"{source} has no component {name}")
        else:
            open_checkpoint(source / name)  # a damaged source ends the run, see `_verify_part`
    return {name: source / name for name in packed if name in components}


def _verify_part(
    path: Path, source: Path | None, engine: Engine, resources: Resources, progress: Progress,
    cluster: Cluster | None,
) -> Report:  # fmt: skip
    """Verify a component; report an InputError, so that the others are verified as well."""
    try:
        return verify(path, source, engine, resources, progress, cluster=cluster)
    except InputError as error:
        report = Report()
        report.add("structure", path.name, str(error))
        return report
