"""Make an in-toto statement of a finished output, for others to sign (docs/attest.md).

The statement says that these files, by their SHA-256, are the ones that the manifests list, made
from those sources with this recipe.  The files are read for it, and it is made only when each is
what its manifest says.  It holds no time, no path and no host: the same output gives the same
bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..callbacks import Progress, no_progress
from ..errors import InputError, UsageError
from ..output.listed_files import Listed, listed_output, read_listed, strays
from ..output.manifest import Manifest
from ..output.report import Finding
from ..planning.model_plan import path_in_model

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:nf4cli:quantize:v1"
SELF_ATTESTED = "urn:nf4cli:self-attested"
"""The builder where the user names none: no build platform vouches for the statement."""


@dataclass(slots=True)
class Attestation:
    """What was found, and the statement where nothing is wrong.

    Attributes:
        statement: as JSON; None where there are findings.
        findings: files that are not what their manifest says.
        notes: which files the statement leaves out, and why.
    """

    statement: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """Return the statement as it is signed."""
        return (json.dumps(self.statement, indent=1, allow_nan=False) + "\n").encode()


def attest(
    path: Path,
    source: Path | None = None,
    builder: str = SELF_ATTESTED,
    workers: int = 1,
    progress: Progress = no_progress,
) -> Attestation:
    """Read every file of an output, and of its source if there is one, and make the statement.

    Args:
        path: a directory that nf4 quantize wrote: a checkpoint or a pipeline.
        source: what it was made from; its files' SHA-256 are then in the statement.
        builder: URI of who ran the conversion (SLSA's builder.id).
        workers: files read at a time.
        progress: told the bytes of each file that are read.

    Raises:
        UsageError: `builder` is no URI.
        InputError: `path` has no manifest, one is damaged, or a name is not Unicode.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s\x00-\x20]+", builder):
        raise UsageError(f"--builder-id {builder!r} is no URI: write one like https://ci.example/1")
    manifests, output = listed_output(path)
    attestation = Attestation()
    for name in strays(path, output):
        message = f"{name} is in no manifest: remove it, or keep it beside {path.name}"
        attestation.findings.append(Finding("manifest", name, message))
    sources = _listed_sources(manifests, source) if source else {}
    digests, findings, edited = read_listed(
        {**output, **{f"source:{n}": f for n, f in sources.items()}}, workers, progress
    )
    attestation.findings += sorted(findings, key=lambda finding: (finding.level, finding.where))
    attestation.notes += [f"{name} was edited since and is not in the statement" for name in edited]
    if not attestation.findings:
        attestation.statement = _statement(
            {name: digests[name] for name in output if name in digests},
            {name: digests[f"source:{name}"] for name in sources},
            manifests,
            builder,
        )
    return attestation


def _listed_sources(manifests: Mapping[str, Manifest], source: Path) -> dict[str, Listed]:
    """Return the source files that the manifests list, by their names in the statement."""
    return {
        path_in_model(component, name): Listed(
            source if source.is_file() else source / component / name, file, manifest.digest
        )
        for component, manifest in manifests.items()
        for name, file in manifest.source_files.items()
    }


def _statement(
    subjects: Mapping[str, str],
    sources: Mapping[str, str],
    manifests: Mapping[str, Manifest],
    builder: str,
) -> dict[str, Any]:
    """Return the statement as JSON.

    Subjects have a SHA-256 only, as sigstore's reader refuses digests that it does not know.

    Args:
        subjects: SHA-256 of each output file, by name.
        sources: SHA-256 of each source file that was read, by name.
        manifests: by component; "" for a checkpoint alone.
        builder: URI.

    Raises:
        InputError: the name of a file is not Unicode.
    """
    recipes = {
        name: {"recipe": manifest.to_dict()["recipe"], "source": manifest.source_name}
        for name, manifest in sorted(manifests.items())
    }
    dependencies = []
    for component, manifest in sorted(manifests.items()):
        for file, record in sorted(manifest.source_files.items()):
            name = path_in_model(component, file)
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
