"""Whoever wants to hear how a run goes on: its stages, its progress, and what it finishes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..callbacks import Progress

if TYPE_CHECKING:
    from ..output.manifest import Result
    from ..planning.plan import TensorPlan
    from .transfers import Transfers


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run that takes its time.

    Attributes:
        label: what is being done ("quantizing").
        total: bytes of work, 0 where nobody knows.
        what: from what, to what.
        weights: parameters in the work, 0 where they do not matter.
        transfers: what is moved besides.
        place: whose disk is worth looking at.
    """

    label: str
    total: int = 0
    what: str = ""
    weights: int = 0
    transfers: Transfers | None = None
    place: Path | None = None


class Listener:
    """Does nothing; subclasses say what they want to hear. Called from any thread.

    Everywhere `part` is a pipeline's component, "" for a checkpoint alone.
    """

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Progress]:
        """Hear that a stage begins and ends; what is yielded is told of its progress."""
        yield self.progress

    def progress(self, name: str, nbytes: int) -> None:
        """Hear that `nbytes` more bytes of the tensor or file `name` are dealt with."""

    def note(self, sentence: str) -> None:
        """Hear what a user should know."""

    def resumed(self, part: str, plans: Iterable[TensorPlan]) -> None:
        """Hear which weights an earlier run finished."""

    def tensor(self, part: str, plan: TensorPlan, result: Result) -> None:
        """Hear that a weight is written."""

    def file(self, part: str, name: str, size: int) -> None:
        """Hear that an output file of `size` bytes is complete."""


NOBODY = Listener()
