"""What was done, as a section of GitHub-flavoured Markdown for a job's summary page.

Names come from files that anybody may have made: every character that Markdown or HTML could take
for its own is written as a character reference.
"""

from __future__ import annotations

import os
import re
import stat
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .errors import MachineError
from .manifest import Manifest
from .planned import Plan
from .report import Report

LIMIT = 1 << 20
"""Bytes that GitHub takes of one step; more is not shown at all."""

_ROWS = 20
_LONGEST = 400  # characters of a name or message
# What Markdown could take for more than text: an underscore within a word and a colon before a
# space are none of it, and cards full of &#95; are nothing to edit.
_SPECIAL = re.compile(r"[^\w\s./,;=()'\"+?%:-]|(?<![^\W_])_|_(?![^\W_])|:(?! )")
ACTIONS = {"quantize": "4-bit", "cast": "kept, cast", "copy": "kept", "drop": "left out"}


def conversion_section(output: str, parts: Mapping[str, tuple[Plan, Manifest]]) -> str:
    """Sizes, bits, what was kept and why, and the errors, of each component.

    Args:
        parts: by component; "" is a checkpoint that is not part of a pipeline.
    """
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
    kinds = [
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
    lines += table(("", "what", "why", "tensors", "bytes"), kinds, "lllrr")
    return "\n".join(lines)


def verification_section(path: str, reports: Mapping[str, Report]) -> str:
    """Checks, the first findings, and what was not checked.

    Args:
        reports: by the name of the component, or of the checkpoint.
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


def append(section: str, place: Path) -> None:
    """Add a section to a summary file.

    Raises:
        MachineError: it cannot be written, is no ordinary file, or would exceed LIMIT.
    """
    data = f"\n{section}\n".encode("utf-8", "replace")
    try:
        # Without O_NONBLOCK a named pipe that nobody reads would hold us for ever.
        fd = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with os.fdopen(fd, "ab") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise MachineError(f"{place} is no ordinary file")
            if found.st_size + len(data) > LIMIT:
                raise MachineError(f"{place} would be larger than {LIMIT:,} bytes")
            file.write(data)
    except OSError as error:
        raise MachineError(f"{place}: {error.strerror or error}") from error


def escape(text: object) -> str:
    """Any text as one line of plain text in a cell of a table."""
    line = " ".join(str(text).split())
    if len(line) > _LONGEST:
        line = line[: _LONGEST - 1] + "…"
    seen = "".join(c if c.isprintable() else "\ufffd" for c in line)  # nor turned right to left
    return _SPECIAL.sub(lambda match: f"&#{ord(match[0])};", seen)


def table(headings: Iterable[str], rows: Sequence[tuple[str, ...]], align: str) -> list[str]:
    """The lines of a table, and an empty one behind it; [] for one without rows.

    Args:
        align: a letter a column, "l" or "r".
    """
    if not rows:
        return []
    marks = {"l": ":--", "r": "--:"}
    lines = [_row(headings), _row(marks[letter] for letter in align)]
    lines += [_row(row) for row in rows[:_ROWS]]
    hidden = len(rows) - _ROWS
    return [*lines, "", *((f"... and {hidden:,} more", "") if hidden > 0 else ())]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
