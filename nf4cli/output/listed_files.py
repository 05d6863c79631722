"""List the files that the manifests of an output answer for, and check that they are what was
written."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..callbacks import Progress
from ..checkpoint.digest import digests_of_file
from ..checkpoint.discovery import (
    CARD,
    LEFT_DIRECTORIES,
    MANIFEST,
    PIPELINE_RECORD,
    require_output,
)
from ..errors import InputError
from ..planning.model_plan import path_in_model
from ..threads import run
from .manifest import FileRecord, Manifest
from .pipeline_record import Record
from .report import Finding


@dataclass(frozen=True, slots=True)
class Listed:
    """A file that a manifest lists.

    Attributes:
        path: where it lies.
        record: its size and digest; None for a manifest or record whose digest no file lists.
        algorithm: of the digest.
    """

    path: Path
    record: FileRecord | None
    algorithm: str


def listed_output(path: Path) -> tuple[dict[str, Manifest], dict[str, Listed]]:
    """Return the manifests of an output, and every file that they answer for.

    Args:
        path: directory of the output.

    Returns:
        (component, "" for a single checkpoint -> manifest; name in the output -> file).

    Raises:
        InputError: there is none, one is damaged, or names a file outside of `path`.
    """
    record_place = path / PIPELINE_RECORD
    if record_place.is_file():
        record = Record.from_file(record_place)
        files = {n: Listed(path / n, r, record.digest) for n, r in record.files.items()}
        files[PIPELINE_RECORD] = Listed(record_place, None, record.digest)
        manifests = {name: _manifest(path / name) for name in record.components}
    else:
        require_output(path)
        files, manifests = {}, {"": _manifest(path)}
    for component, manifest in manifests.items():
        for name, file in manifest.output_files.items():
            name_in_output = path_in_model(component, name)
            files[name_in_output] = Listed(path / name_in_output, file, manifest.digest)
        manifest_name = path_in_model(component, MANIFEST)
        files.setdefault(manifest_name, Listed(path / manifest_name, None, manifest.digest))
    for name, listed in files.items():
        if not _lies_in(listed.path, path):
            raise InputError(f"{path}: {name[:200]!r} in a manifest leads out of the directory")
    return manifests, dict(sorted(files.items()))


def _lies_in(file: Path, directory: Path) -> bool:
    try:
        return file.resolve().is_relative_to(directory.resolve())
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
        return False


def _manifest(directory: Path) -> Manifest:
    if not (directory / MANIFEST).is_file():
        raise InputError(
            f"{directory} has no {MANIFEST}: expected a directory that nf4 quantize wrote, "
            "and a finished run has one"
        )
    return Manifest.from_file(directory / MANIFEST)


def strays(root: Path, listed: Mapping[str, object]) -> Iterable[str]:
    """Yield the files that no manifest lists, without model cards and files of git and of caches.

    Args:
        root: directory of the output.
        listed: names in the output that the manifests list.
    """
    for place, directories, files in os.walk(root):
        directory = Path(place)
        links = [d for d in directories if (directory / d).is_symlink()]
        directories[:] = sorted(set(directories) - set(LEFT_DIRECTORIES) - set(links))
        for file in sorted([*files, *links]):
            name = (directory / file).relative_to(root).as_posix()
            if name not in listed and not file.startswith(".git") and name != CARD:
                yield name


def read_listed(
    files: Mapping[str, Listed], workers: int, progress: Progress
) -> tuple[dict[str, str], list[Finding], list[str]]:
    """Read every file once, and compare it with its record.

    Args:
        files: name -> file.  The name of a file of the source begins with "source:".
        workers: threads that read.

    Returns:
        (name -> SHA-256 of each file that is as its record says, findings on the others, names of
        model cards that were edited).
    """
    digests: dict[str, str] = {}
    findings: list[Finding] = []
    edited: list[str] = []
    lock = threading.Lock()

    def check(item: tuple[str, Listed]) -> None:
        key, listed = item
        name = key.removeprefix("source:")
        sha256, message = None, None
        if not os.path.isfile(listed.path):  # noqa: PTH113 - False also for a name too long
            message = f"{listed.path} is missing: the manifest lists it"
        else:
            size, both = digests_of_file(
                listed.path, {"sha256", listed.algorithm}, lambda count: progress(name, count)
            )
            sha256, record = both["sha256"], listed.record
            if record not in (None, FileRecord(size, both[listed.algorithm])):
                if key == name == CARD or key.endswith(f"/{CARD}"):
                    with lock:
                        edited.append(name)
                    return
                assert record is not None
                message = (
                    f"{listed.path} is not what the manifest says: {listed.algorithm} is "
                    f"{both[listed.algorithm]}, expected {record.digest}"
                )
        with lock:
            if message is None and sha256 is not None:
                digests[key] = sha256
            else:
                level = "source" if key != name else "manifest"
                findings.append(Finding(level, name, message or ""))

    run(files.items(), lambda: check, min(workers, max(1, len(files))), lambda: None)
    return digests, sorted(findings, key=lambda finding: finding.where), sorted(edited)
