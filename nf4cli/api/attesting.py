"""State what a finished output is and was made from: the work of `nf4cli.attest`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..callbacks import Progress
from ..convert.listener import Stage
from ..output.report import Finding
from ..planning.pipeline_plan import is_pipeline, part_shards
from ..proof.attest import SELF_ATTESTED, Attestation
from ..proof.attest import attest as make_statement
from ..proof.pipelines import verify_pipeline
from ..proof.verify import verify
from .machine import Machine


def state(
    output: Path, source: Path | None = None, builder_id: str | None = None,
    machine: Machine | None = None,
) -> Attestation:  # fmt: skip
    """Read every file of an output, and make the statement if all are what the manifest says.

    Args:
        source: what the output was made from: prove that first, None for no proof.
        builder_id: URI of who ran the conversion, None for no builder.
        machine: proves and reads.

    Raises:
        UsageError, InputError, MachineError: the output cannot be read or proved at all.
    """
    machine = machine or Machine()
    if source is None:
        machine = replace(machine, name="cpu")  # nothing is encoded
    workers = machine.resources().workers
    read = [output, *([source] if source else [])]
    nbytes = sum(file.stat().st_size for path in read for file in part_shards(path))
    passes = 2 if source else 1  # the proof reads everything once more
    with machine.listener.stage(Stage("attesting", nbytes * passes, str(output))) as progress:
        if source is not None:
            findings = _prove(output, source, machine, progress)
            if findings:
                return Attestation(findings=findings)
        return make_statement(output, source, builder_id or SELF_ATTESTED, workers, progress)


def _prove(output: Path, source: Path, machine: Machine, progress: Progress) -> list[Finding]:
    """Return what differs between an output and the one that its source gives."""
    engine, limits = machine.engine, machine.resources()
    if is_pipeline(output):
        proof = verify_pipeline(output, source, engine, limits, progress)
        reports = (proof.own, *proof.parts.values())
        return [finding for report in reports for finding in report.findings]
    return verify(output, source, engine, limits, progress).findings
