"""The result of a verification, as data: what was checked, what was not, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

LEVELS = ("structure", "config", "state", "manifest", "source", "calibration")
"""Kinds of checks."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        level: one of LEVELS.
        where: file or tensor.
        message: what was found, and what was expected.
    """

    level: str
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Check:
    """One check that was made.

    Attributes:
        level: one of LEVELS.
        what: what holds if the check is ok.
        ok: whether its level has no finding.
    """

    level: str
    what: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """The tensors that a quick look was taken at.

    Attributes:
        seed: of the random choice.  The same seed and size choose the same tensors.
        tensors, nbytes: how many were looked at, and their bytes, companions included.
        of_tensors, of_nbytes: the same of the whole output.
    """

    seed: int
    tensors: int
    nbytes: int
    of_tensors: int
    of_nbytes: int

    @property
    def share(self) -> float:
        """Share of the bytes that was looked at, from 0 to 1."""
        return self.nbytes / max(1, self.of_nbytes)


@dataclass(slots=True)
class Report:
    """The findings of a verification.

    Attributes:
        findings: everything that is wrong; empty if all is well.
        checks: in the order in which they were made.
        unchecked: what could not be checked, and what it would take, one sentence each.
        notes: what is unusual, but no defect.
        sample: what was looked at, None for everything.
    """

    findings: list[Finding] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sample: Sample | None = None

    def check(self, level: str, what: str) -> None:
        """Add a check, after all findings of its level were added."""
        self.checks.append(Check(level, what, all(f.level != level for f in self.findings)))

    def add(self, level: str, where: str, message: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(level, where, message))

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings
