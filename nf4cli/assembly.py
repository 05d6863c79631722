"""A pipeline, quantized, verified or decoded: component by component, and what lies beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import stopping
from .card import write_card
from .complete import require_none
from .dequantize import Decoding, Summary, decode_into, plan_decoding
from .diffusion import (
    INDEX_FILE,
    Component,
    PipelinePlan,
    Record,
    components_of,
    copies_of,
    is_pipeline,
    packed_components,
    stray_weights,
)
from .digest import digest_file
from .engines import Engine, Notify, no_notice
from .errors import InputError
from .limits import Resources, disk_bytes, holds_output, refuse_place, require_disk, require_place
from .manifest import Manifest
from .output import clear
from .pipeline import Progress, no_progress
from .quantize import file_records, fill
from .report import Report
from .resume import header
from .source import PIPELINE_RECORD, name_of_directory, open_checkpoint
from .untrusted import is_regular, read_json
from .verify import verify
from .watch import NOBODY, Watch
from .workspace import Workspace
from .written import check_other_file

_RECORD_ROOM = 300  # bytes a file in nf4_pipeline.json


def pipeline_disk_bytes(plan: PipelinePlan, workers: int) -> int:
    """Bytes that the run needs on the output's disk."""
    parts = sum(disk_bytes(part, workers) for part in plan.parts.values())
    return parts + plan.copies.nbytes + _RECORD_ROOM * (len(plan.copies.files) + 10)


def check_pipeline_output(
    plan: PipelinePlan, output: Path, workers: int, resume: bool = False
) -> None:
    """Refuse an output that exists, overlaps the source, or does not fit on the disk.

    Raises:
        UsageError, MachineError: see limits.check_output.
    """
    require_place(plan.root, output, False, resume)
    if not (resume and holds_output(output)):
        require_disk(output, pipeline_disk_bytes(plan, workers))


def write_pipeline(
    plan: PipelinePlan,
    output: Path,
    engine: Engine,
    resources: Resources,
    digest: str = "blake3",
    fsync: bool = True,
    resume: bool = False,
    progress: Progress = no_progress,
    notify: Notify = no_notice,
    watch: Watch = NOBODY,
) -> dict[str, Manifest]:
    """Quantize into `output`, which appears complete or not at all; the manifests by component.

    Raises:
        UsageError, MachineError, InputError, OSError, UnfinishedRunError: see
            `quantize.write_checkpoint`.
    """
    check_pipeline_output(plan, output, resources.workers, resume)
    total = sum(part.written for part in plan.parts.values())
    place = plan.root, False
    with (
        stopping.finishing(),
        Workspace(
            output, place, header(plan.parts, digest), total, fsync=fsync, resume=resume
        ) as work,
    ):
        if not work.complete:
            clear(work.directory, {work.directory / name for name in plan.parts})
            plan.copies.write(work.directory)
        manifests = {
            name: fill(work, name, part, engine, resources, digest, progress, notify, watch=watch)
            for name, part in plan.parts.items()
        }
        if work.complete:
            report = Report()
            _check_recorded(work.output, _read_record(work.output, report), [*plan.parts], report)
            _check_copies(work.output, plan.root, [*plan.parts], report)
            require_none(work.output, report)
        else:
            _write_record(work.directory, plan, manifests, digest)
            index = read_json(work.directory / INDEX_FILE)
            write_card(work.directory, plan.root, name_of_directory(plan.root), manifests, index)
    return manifests


def _write_record(
    directory: Path, plan: PipelinePlan, manifests: Mapping[str, Manifest], digest: str
) -> None:
    known = {
        f"{name}/{file}": record.digest
        for name, manifest in manifests.items()
        for file, record in manifest.output_files.items()
    }
    files = file_records(directory, digest, known)
    beside = {name: record for name, record in files.items() if name not in known}
    record = Record(digest, tuple(plan.parts), beside)
    (directory / PIPELINE_RECORD).write_text(record.to_json(), "utf-8")


# -- verify -----------------------------------------------------------------------------------


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
    record = _read_record(path, found.own)
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
    _check_recorded(path, record, packed, found.own)
    for name in packed:
        found.parts[name] = _verify_part(
            path / name, originals.get(name), engine, resources, progress
        )
    if source is not None:
        _check_copies(path, source, packed, found.own)
    return found


def _read_record(path: Path, report: Report) -> Record | None:
    try:
        return (
            Record.from_file(path / PIPELINE_RECORD) if is_regular(path / PIPELINE_RECORD) else None
        )
    except InputError as error:
        report.add("manifest", PIPELINE_RECORD, str(error))
        return None


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


def _check_recorded(path: Path, record: Record | None, packed: list[str], report: Report) -> None:
    """Every file beside the converted components, and their manifests, by the digests we wrote."""
    if record is None:
        report.unchecked.append(
            f"that the files beside {', '.join(packed)} are the ones written: there is no "
            f"{PIPELINE_RECORD} that can be read"
        )
        return
    for name, file in sorted(record.files.items()):
        check_other_file(path, name, file, record.digest, report)
    for name in stray_weights(path, record.files.keys(), packed):
        report.add("manifest", name, f"{name} is not in {PIPELINE_RECORD}: it is of another run")
    report.check(
        "manifest", f"{len(record.files)} files beside them are the ones written ({record.digest})"
    )


def _check_copies(path: Path, source: Path, packed: list[str], report: Report) -> None:
    copies = copies_of(source, components_of(source), packed)
    for name, original in copies.files.items():
        here = path / name
        if not is_regular(here):
            report.add("source", name, f"{name} is missing: the source has {original}")
        elif digest_file(here, "blake3") == digest_file(source / original, "blake3"):
            continue
        elif here.name == "README.md":
            report.unchecked.append(f"{name}: it was edited since, as a model card may be")
        else:
            report.add("source", name, f"{name} is not the file {source / original}")
    for name, text in copies.texts.items():
        if not is_regular(path / name) or (path / name).read_bytes() != text.encode():
            report.add("source", name, f"{name} is not the index that the source gives")
    report.check("source", f"{len(copies.files)} copied files are those of the source")


# -- dequantize -------------------------------------------------------------------------------


def write_decoded_pipeline(
    path: Path,
    output: Path,
    engine: Engine,
    resources: Resources,
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
    fsync: bool = True,
    progress: Progress = no_progress,
) -> dict[str, Summary]:
    """Decode every 4-bit component into the new pipeline `output`, copy the others.

    Raises:
        InputError, UsageError, MachineError, OSError: see `write_dequantized`.
    """
    refuse_place(path, output)
    components = components_of(path)
    decodings: dict[str, Decoding] = {
        name: plan_decoding(open_checkpoint(path / name), engine, dtype, max_shard_size)
        for name in _require_packed(path, components)
    }
    copies = copies_of(path, components, decodings)
    require_disk(output, copies.nbytes + sum(d.disk_bytes for d in decodings.values()))
    summaries = {}
    with stopping.finishing(), Workspace(output, (path, False), fsync=fsync) as work:
        copies.write(work.directory)
        for name, decoding in decodings.items():
            place = work.directory / name
            place.mkdir()
            summaries[name] = decode_into(decoding, place, engine, resources, progress)
    return summaries


def _require_packed(path: Path, components: Mapping[str, Component]) -> list[str]:
    packed = packed_components(path, components)
    if not packed:
        raise InputError(
            f"{path} has no component with bitsandbytes 4-bit weights: there is nothing to decode"
        )
    return packed


def part_shards(path: Path) -> list[Path]:
    """The weight files directly in a checkpoint, or in the components of a pipeline."""
    if path.is_file():
        return [path]
    pattern = "*/*.safetensors" if is_pipeline(path) else "*.safetensors"
    return [file for file in path.glob(pattern) if is_regular(file)]
