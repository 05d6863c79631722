"""Write, read and check nf4_pipeline.json: the record of the files beside a pipeline's
components."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import model_files
from ..checkpoint.digest import ALGORITHMS, digest_file
from ..checkpoint.discovery import MANIFEST, PIPELINE_RECORD, is_weight_file
from ..checkpoint.untrusted import is_plain, is_regular, read_json
from ..errors import InputError
from ..planning.model_plan import Copies
from ..planning.pipeline_plan import components_of, copies_of, stray_weights
from ..version import __version__
from .against_manifest import check_other_file
from .already_there import require_no_finding, unlike_planned
from .manifest import FileRecord
from .report import Report

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """What nf4_pipeline.json says.

    Attributes:
        digest: algorithm of the digests.
        components: names of the converted components; their own manifests list their files.
        files: path in the output -> record, of every other file and of the components' manifests.
    """

    digest: str
    components: tuple[str, ...]
    files: Mapping[str, FileRecord]

    def to_json(self) -> str:
        """Return the text of nf4_pipeline.json."""
        document = {
            "nf4_pipeline": RECORD_VERSION,
            "tool": {"name": "nf4cli", "version": __version__},
            "digest": self.digest,
            "components": sorted(self.components),
            "files": [
                {"name": name, "size": record.size, "digest": record.digest}
                for name, record in sorted(self.files.items())
            ],
        }
        return json.dumps(document, indent=1) + "\n"

    @staticmethod
    def from_file(path: Path) -> Record:
        """Read a record.

        Raises:
            InputError: it is damaged, or of another format.
        """
        document = read_json(path)
        version = document.get("nf4_pipeline")
        if version != RECORD_VERSION:
            raise InputError(
                f"{path} has format {version!r}; this version of nf4 reads {RECORD_VERSION}: "
                "install the nf4cli that wrote it, or quantize again"
            )
        files, components = document.get("files"), document.get("components")
        if (
            document.get("digest") not in ALGORITHMS
            or not isinstance(components, list)
            or not all(isinstance(name, str) and is_plain(name) for name in components)
            or not isinstance(files, list)
            or not all(_is_file_entry(file) for file in files)
        ):
            raise InputError(
                f"{path} is damaged: it was edited by hand, or is incomplete. Quantize again, or "
                "remove it to check the files without it"
            )
        return Record(
            digest=str(document["digest"]),
            components=tuple(components),
            files={file["name"]: FileRecord(file["size"], file["digest"]) for file in files},
        )


def _is_file_entry(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and "\0" not in value["name"]
        and type(value.get("size")) is int
        and isinstance(value.get("digest"), str)
    )


def read_record(path: Path, report: Report) -> Record | None:
    """Return the record of an output; None if there is none or it is damaged (then reported)."""
    try:
        return (
            Record.from_file(path / PIPELINE_RECORD) if is_regular(path / PIPELINE_RECORD) else None
        )
    except InputError as error:
        report.add("manifest", PIPELINE_RECORD, str(error))
        return None


def check_recorded(path: Path, record: Record | None, packed: list[str], report: Report) -> None:
    """Check the files beside the converted components, and their manifests, by their digests.

    Args:
        path: directory of the output.
        record: None where there is none that can be read.
        packed: names of the converted components.
    """
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


def check_copies(
    path: Path, source: Path, packed: list[str], record: Record | None, report: Report
) -> None:
    """Check that the copied files of an output are those of its source.

    Args:
        path: directory of the output.
        source: directory of the source.
        packed: names of the converted components.
        record: of the output: it lists what --copy added, or an earlier version copied.
    """
    copies = copies_of(source, components_of(source), packed, record.files if record else ())
    since = {n for n in copies.files if record and n not in record.files and _is_part(n)}
    if since:
        report.unchecked.append(
            f"{', '.join(sorted(since)[:10])} of the source, which the output lacks: the version "
            "of nf4 that wrote it copied no such files"
        )
    files = {name: file for name, file in copies.files.items() if name not in since}
    _compare_copies(path, replace(copies, files=files), report)


def _is_part(name: str) -> bool:
    """Return whether a file holds weights beside a component's own."""
    last = name.rpartition("/")[2]
    return is_weight_file(last) and not model_files.is_same_weights(last)


def _compare_copies(path: Path, copies: Copies, report: Report) -> None:
    """Check that each file of `copies` is in an output as it is in the source."""
    source = copies.root
    for name, original in copies.files.items():
        copy = path / name
        if not is_regular(copy):
            report.add("source", name, f"{name} is missing: the source has {original}")
        elif digest_file(copy, "blake3") == digest_file(source / original, "blake3"):
            continue
        elif copy.name == "README.md":
            report.unchecked.append(f"{name}: it was edited since, as a model card may be")
        else:
            report.add("source", name, f"{name} is not the file {source / original}")
    for name, text in copies.texts.items():
        if not is_regular(path / name) or (path / name).read_bytes() != text.encode():
            report.add("source", name, f"{name} is not the index that the source gives")
    report.check("source", f"{len(copies.files)} copied files are those of the source")


def confirm_pipeline(output: Path, copies: Copies, converted: list[str]) -> None:
    """Raise UsageError unless what lies beside an output's components is what a run would write.

    Args:
        copies: what the run would copy.
        converted: names of the converted components.
    """
    report = Report()
    record = read_record(output, report)
    check_recorded(output, record, converted, report)
    _compare_copies(output, copies, report)
    require_no_finding(output, report)
    manifests = {f"{name}/{MANIFEST}" for name in converted}
    more = sorted({*(record.files if record else ())} - {*copies.files, *copies.texts} - manifests)
    if more:
        raise unlike_planned(output, f"it has a copy of {more[0]}, which this does not copy")
