"""An in-toto statement of a finished output, for others to sign: docs/attest.md describes it.

The statement says that these files (SHA-256, which signing tools look for) are the ones that the
manifests list, made from those sources with this recipe.  It is made from the files as they are
read now, and only when every one of them is what its manifest says.  No clock, no path, no host is
in it: the same output gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .diffusion import Record
from .digest import digests_of_file
from .errors import InputError, UsageError
from .manifest import FileRecord, Manifest
from .pipeline import Progress, no_progress, run
from .report import Finding
from .source import CARD, LEFT_DIRECTORIES, MANIFEST, PIPELINE_RECORD

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:nf4cli:quantize:v1"
SELF_ATTESTED = "urn:nf4cli:self-attested"
"""The builder where nobody names one: no build platform vouches for the statement."""


@dataclass(slots=True)
class Attestation:
    """What was found, and the statement when all is well.

    Attributes:
        statement: None when there are findings.
        findings: files that are not what their manifest says.
        notes: what the statement leaves out.
    """

    statement: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """The statement as it is signed."""
        return (json.dumps(self.statement, indent=1, allow_nan=False) + "\n").encode()


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file as a manifest lists it: where it lies, what it should be, in which algorithm."""

    path: Path
    record: FileRecord | None
    algorithm: str


def attest(
    path: Path,
    source: Path | None = None,
    builder: str = SELF_ATTESTED,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Attestation:
    """Read every file of an output (and of its source) and make the statement.

    Args:
        path: a directory that nf4 quantize wrote: a checkpoint or a pipeline.
        source: what it was made from; its files are read, and their SHA-256 are in the statement.
        builder: URI of who ran the conversion, SLSA's builder.id.
        workers: files read at a time.

    Raises:
        UsageError: `builder` is no URI.
        InputError: `path` has no manifest, one is damaged, or a name is not Unicode.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x20]+", builder):
        raise UsageError(f"--builder-id {builder!r} is no URI: write one like https://ci.example/1")
    manifests, output = _listed_output(path)
    found = Attestation()
    for name in _strays(path, output):
        message = f"{name} is in no manifest: remove it, or keep it beside {path.name}"
        found.findings.append(Finding("manifest", name, message))
    sources = _listed_sources(manifests, source) if source else {}
    digests = _read({**output, **{f"source:{n}": f for n, f in sources.items()}}, workers, found,
                    progress)  # fmt: skip
    if not found.findings:
        found.statement = _statement(
            {name: digests[name] for name in output if name in digests},
            {name: digests[f"source:{name}"] for name in sources},
            manifests,
            builder,
        )
    return found


def _listed_output(path: Path) -> tuple[dict[str, Manifest], dict[str, _Listed]]:
    """The manifests by component ("" for a checkpoint), and every file that they answer for."""
    record_place = path / PIPELINE_RECORD
    if record_place.is_file():
        record = Record.from_file(record_place)
        files = {n: _Listed(path / n, r, record.digest) for n, r in record.files.items()}
        files[PIPELINE_RECORD] = _Listed(record_place, None, record.digest)
        manifests = {name: _manifest(path / name) for name in record.components}
    elif path.is_dir():
        files, manifests = {}, {"": _manifest(path)}
    else:
        raise InputError(f"{path} is no directory: give one that nf4 quantize wrote")
    for component, manifest in manifests.items():
        for name, file in manifest.output_files.items():
            files[_joined(component, name)] = _Listed(
                path / component / name, file, manifest.digest
            )
        own = _joined(component, MANIFEST)
        files.setdefault(own, _Listed(path / own, None, manifest.digest))
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
            f"{directory} has no {MANIFEST}: nf4 attests what nf4 quantize wrote, and a finished "
            "run has one"
        )
    return Manifest.from_file(directory / MANIFEST)


def _listed_sources(manifests: Mapping[str, Manifest], source: Path) -> dict[str, _Listed]:
    return {
        _joined(component, name): _Listed(
            source if source.is_file() else source / component / name, file, manifest.digest
        )
        for component, manifest in manifests.items()
        for name, file in manifest.source_files.items()
    }


def _joined(component: str, name: str) -> str:
    return f"{component}/{name}" if component else name


def _strays(root: Path, known: Mapping[str, object]) -> Iterable[str]:
    """Files that no manifest lists: a statement without them would let them ride along."""
    for place, directories, files in os.walk(root):
        here = Path(place)
        links = [d for d in directories if (here / d).is_symlink()]
        directories[:] = sorted(set(directories) - set(LEFT_DIRECTORIES) - set(links))
        for file in sorted([*files, *links]):
            name = (here / file).relative_to(root).as_posix()
            if name not in known and not file.startswith(".git") and name != CARD:
                yield name


def _read(
    files: Mapping[str, _Listed], workers: int, found: Attestation, progress: Progress
) -> dict[str, str]:
    """Each file's SHA-256, by the key in `files`; what differs from its record is a finding."""
    digests: dict[str, str] = {}
    lock = threading.Lock()

    def check(item: tuple[str, _Listed]) -> None:
        key, listed = item
        name = key.removeprefix("source:")
        message = None
        if not os.path.isfile(listed.path):  # noqa: PTH113 - False also for a name too long
            message = f"{listed.path} is missing: the manifest lists it"
        else:
            size, both = digests_of_file(
                listed.path, {"sha256", listed.algorithm}, lambda count: progress(name, count)
            )
            record = listed.record
            if record is not None and (size, both[listed.algorithm]) != (
                record.size,
                record.digest,
            ):
                if key == name == CARD or key.endswith(f"/{CARD}"):
                    with lock:
                        found.notes.append(f"{name} was edited since and is not in the statement")
                    return
                message = (
                    f"{listed.path} is not what the manifest says: {listed.algorithm} is "
                    f"{both[listed.algorithm]}, expected {record.digest}"
                )
        with lock:
            if message is None:
                digests[key] = both["sha256"]
            else:
                level = "source" if key != name else "manifest"
                found.findings.append(Finding(level, name, message))

    run(files.items(), lambda: check, min(workers, max(1, len(files))), lambda: None)
    found.findings.sort(key=lambda finding: (finding.level, finding.where))
    found.notes.sort()
    return digests


def _statement(
    subjects: Mapping[str, str],
    sources: Mapping[str, str],
    manifests: Mapping[str, Manifest],
    builder: str,
) -> dict[str, Any]:
    """Subjects have SHA-256 only: sigstore's reader refuses digests that it does not know."""
    recipes = {
        name: {"recipe": manifest.to_dict()["recipe"], "source": manifest.source_name}
        for name, manifest in sorted(manifests.items())
    }
    dependencies = []
    for component, manifest in sorted(manifests.items()):
        for file, record in sorted(manifest.source_files.items()):
            name = _joined(component, file)
            digest = {manifest.digest: record.digest}
            if name in sources:
                digest["sha256"] = sources[name]
            dependencies.append({"name": name, "digest": digest})
    versions = sorted({manifest.tool_version for manifest in manifests.values()})
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": n, "digest": {"sha256": d}} for n, d in sorted(subjects.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": recipes.get("", {"components": recipes}),
                "resolvedDependencies": dependencies,
            },
            "runDetails": {"builder": {"id": builder, "version": {"nf4cli": ", ".join(versions)}}},
        },
    }
    try:
        json.dumps(statement, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the name of a file is not Unicode ({error.object[error.start :][:40]!r}), which a "
            "statement cannot hold: rename it in the source and quantize again"
        ) from error
    return statement
