"""What a verification found: a value that travels, not a print-out."""

from __future__ import annotations

from dataclasses import dataclass, field

LEVELS = ("structure", "config", "state", "manifest", "source", "calibration")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        level: one of LEVELS.
        where: the file or tensor.
        message: what was found and what was expected.
    """

    level: str
    where: str
    message: str


@dataclass(frozen=True, slots=True)
class Check:
    """One check that was made.

    Attributes:
        level: as of its findings.
        what: what holds when it is ok.
        ok: whether it had no finding.
    """

    level: str
    what: str
    ok: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """What a quick look was taken at.

    Attributes:
        seed: of the random choice; the same seed and size choose the same tensors.
        tensors, nbytes: looked at, companions included.
        of_tensors, of_nbytes: there are.
    """

    seed: int
    tensors: int
    nbytes: int
    of_tensors: int
    of_nbytes: int

    @property
    def share(self) -> float:
        """Of the bytes, from 0 to 1."""
        return self.nbytes / max(1, self.of_nbytes)


@dataclass(slots=True)
class Report:
    """What was checked, what was not, and what is wrong.

    Attributes:
        findings: empty when all is well.
        checks: in the order they were made.
        unchecked: what could not be checked, and what it would take.
        notes: what is unusual and no defect.
        sample: what was looked at, None for everything.
    """

    findings: list[Finding] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sample: Sample | None = None

    def check(self, level: str, what: str) -> None:
        """All findings of this level are in."""
        self.checks.append(Check(level, what, all(f.level != level for f in self.findings)))

    def add(self, level: str, where: str, message: str) -> None:
        self.findings.append(Finding(level, where, message))

    @property
    def ok(self) -> bool:
        return not self.findings
