"""An in-toto statement of a finished output, for others to sign: docs/attest.md describes it.

The statement says that these files (SHA-256, which signing tools look for) are the ones that the
manifests list, made from those sources with this recipe.  It is made from the files as they are
read now, and only when every one of them is what its manifest says.  No clock, no path, no host is
in it: the same output gives the same bytes.
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
    manifests, output = listed_output(path)
    found = Attestation()
    for name in strays(path, output):
        message = f"{name} is in no manifest: remove it, or keep it beside {path.name}"
        found.findings.append(Finding("manifest", name, message))
    sources = _listed_sources(manifests, source) if source else {}
    digests, findings, edited = read_listed(
        {**output, **{f"source:{n}": f for n, f in sources.items()}}, workers, progress
    )
    found.findings += sorted(findings, key=lambda finding: (finding.level, finding.where))
    found.notes += [f"{name} was edited since and is not in the statement" for name in edited]
    if not found.findings:
        found.statement = _statement(
            {name: digests[name] for name in output if name in digests},
            {name: digests[f"source:{name}"] for name in sources},
            manifests,
            builder,
        )
    return found


def _listed_sources(manifests: Mapping[str, Manifest], source: Path) -> dict[str, Listed]:
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
    """Subjects have SHA-256 only: sigstore's reader refuses digests that it does not know."""
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
