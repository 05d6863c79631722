"""Add a section to the page of a GitHub Actions job, where GITHUB_STEP_SUMMARY is set."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MachineError
from ..output.markdown import ACTIONS, escape, table
from .show import terminal

if TYPE_CHECKING:
    from ..output.manifest import Manifest
    from ..output.report import Report
    from ..planning.plan import Plan

LIMIT = 1 << 20
"""Most bytes that GitHub takes of one step; it shows nothing of a longer summary."""


def conversion_section(output: str, parts: Mapping[str, tuple[Plan, Manifest]]) -> str:
    """Return the Markdown of a conversion: sizes, bits, errors, and what was kept and why.

    Args:
        output: as messages call it.
        parts: by component; "" is a checkpoint without a pipeline.
    """
    import statistics

    lines = [f"### nf4 quantize: {escape(output)}", ""]
    rows: list[tuple[str, ...]] = []
    for name, (plan, manifest) in parts.items():
        errors = {n: t.error.rel_rmse for n, t in manifest.tensors.items() if t.error is not None}
        worst = max(errors, key=lambda tensor: errors[tensor])
        rows.append((
            escape(name or plan.checkpoint.name),
            f"{plan.source_bytes:,}",
            f"{plan.shard_bytes:,}",
            f"{plan.bits_per_weight:.2f}",
            f"{plan.quantized_parameters / plan.parameters:.1%}",
            f"{statistics.median(errors.values()):.4f}",
            f"{errors[worst]:.4f} in {escape(worst)}",
        ))  # fmt: skip
    lines += table(
        ("", "bytes before", "bytes after", "bits a weight", "in 4 bit",
         "relative RMSE, median", "worst"), rows, "lrrrrrl",
    )  # fmt: skip
    rows_of_kinds = [
        (
            escape(name or plan.checkpoint.name),
            ACTIONS[action],
            escape(reason),
            f"{count:,}",
            f"{nbytes:,}",
        )
        for name, (plan, _) in parts.items()
        for action, reason, count, _, nbytes in plan.groups()
    ]
    lines += table(("", "what", "why", "tensors", "bytes"), rows_of_kinds, "lllrr")
    return "\n".join(lines)


def verification_section(path: str, reports: Mapping[str, Report]) -> str:
    """Return the Markdown of a verification: its checks, findings, and what was not checked.

    Args:
        path: as messages call it.
        reports: by the name of the component or checkpoint.
    """
    findings = [(n, finding) for n, report in reports.items() for finding in report.findings]
    sampled = any(report.sample is not None for report in reports.values())
    good = "good in the sample" if sampled else "good"
    verdict = f"**not good**, findings: {len(findings):,}" if findings else good
    lines = [f"### nf4 verify: {escape(path)}: {verdict}", ""]
    lines += table(
        ("", "check", "result"),
        [
            (escape(name), escape(check.what), "ok" if check.ok else "**failed**")
            for name, report in reports.items()
            for check in report.checks
        ],
        "lll",
    )
    lines += table(
        ("", "level", "where", "finding"),
        [
            (escape(name), escape(f.level), escape(f.where), escape(f.message))
            for name, f in findings
        ],
        "llll",
    )
    unchecked = [
        f"in {escape(name)}: {escape(sentence)}"
        for name, report in reports.items()
        for sentence in report.unchecked
    ]
    if unchecked:
        lines += ["Not checked:", "", *(f"- {sentence}" for sentence in unchecked), ""]
    return "\n".join(lines)


def append_section(section: str, place: Path) -> None:
    """Add a section to a summary file.

    Raises:
        MachineError: the file cannot be written, is no ordinary file, or would exceed LIMIT.
    """
    data = f"\n{section}\n".encode("utf-8", "replace")
    try:
        # Without O_NONBLOCK, opening a named pipe that nobody reads would wait for ever.
        fd = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with os.fdopen(fd, "ab") as file:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise MachineError(f"{place} is no ordinary file")
            if status.st_size + len(data) > LIMIT:
                raise MachineError(f"{place} would be larger than {LIMIT:,} bytes")
            file.write(data)
    except OSError as error:
        raise MachineError(f"{place}: {error.strerror or error}") from error


def append(section: Callable[[], str]) -> None:
    """Add a section to the job's page; only note a failure, since the command has done its work.

    Args:
        section: makes the text; not called outside of GitHub Actions.
    """
    place = os.environ.get("GITHUB_STEP_SUMMARY")
    if not place:
        return
    try:
        append_section(section(), Path(place))
    except MachineError as error:
        terminal.note(f"no summary was written to GITHUB_STEP_SUMMARY: {error}")
