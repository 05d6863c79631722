"""A whole diffusers pipeline proved, component by component."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..callbacks import Progress, no_progress
from ..checkpoint.discovery import open_checkpoint
from ..engines.protocol import Engine
from ..errors import InputError
from ..output.pipeline_record import check_copies, check_recorded, read_record
from ..output.report import Report
from ..planning.pipeline_plan import INDEX_FILE, components_of, is_pipeline, packed_components
from ..planning.resources import Resources
from .verify import verify


@dataclass(slots=True)
class PipelineReport:
    """Attributes:
    own: what was found beside the converted components.
    parts: by component.
    """

    own: Report = field(default_factory=Report)
    parts: dict[str, Report] = field(default_factory=dict)


def verify_pipeline(
    path: Path,
    source: Path | None,
    engine: Engine,
    resources: Resources,
    progress: Progress = no_progress,
) -> PipelineReport:
    """Check a pipeline with 4-bit components, written by nf4 or not.

    Raises:
        InputError: `path` holds no 4-bit component, or `source` is no pipeline.
    """
    found = PipelineReport()
    record = read_record(path, found.own)
    try:
        components = components_of(path)
    except InputError as error:
        if record is None:
            raise
        found.own.add("structure", INDEX_FILE, str(error))
        return found
    recorded = record.components if record else ()
    packed = list(dict.fromkeys([*packed_components(path, components), *recorded]))
    if not packed and found.own.ok:
        raise InputError(
            f"{path} has no component with bitsandbytes 4-bit weights: there is nothing to "
            "verify. Make one with nf4 quantize"
        )
    originals = _originals(source, packed, found.own)
    found.own.check("structure", "model_index.json names what is there")
    check_recorded(path, record, packed, found.own)
    for name in packed:
        found.parts[name] = _verify_part(
            path / name, originals.get(name), engine, resources, progress
        )
    if source is not None:
        check_copies(path, source, packed, found.own)
    return found


def _originals(source: Path | None, packed: list[str], report: Report) -> dict[str, Path]:
    """The source's directory of each component."""
    if source is None:
        return {}
    if not is_pipeline(source):
        raise InputError(f"{source} is no diffusers pipeline: it has no {INDEX_FILE}")
    components = components_of(source)
    for name in packed:
        if name not in components:
            report.add("structure", name, f"{source} has no component {name}")
        else:
            open_checkpoint(source / name)  # what is wrong with a source ends the run
    return {name: source / name for name in packed if name in components}


def _verify_part(
    path: Path, source: Path | None, engine: Engine, resources: Resources, progress: Progress
) -> Report:
    try:
        return verify(path, source, engine, resources, progress)
    except InputError as error:
        report = Report()
        report.add("structure", path.name, str(error))
        return report
