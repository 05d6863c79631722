"""Whoever wants to hear how a run goes on: its progress, and what it finishes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .planned import TensorPlan
    from .records import Result


class Listener:
    """Does nothing; subclasses say what they want to hear. Called from any thread.

    Everywhere `part` is a pipeline's component, "" for a checkpoint alone.
    """

    def progress(self, name: str, nbytes: int) -> None:
        """Hear that `nbytes` more bytes of the source tensor or file `name` are dealt with."""

    def note(self, sentence: str) -> None:
        """Hear what a user should know."""

    def resumed(self, part: str, plans: Iterable[TensorPlan]) -> None:
        """Hear which weights an earlier run finished."""

    def tensor(self, part: str, plan: TensorPlan, result: Result) -> None:
        """Hear that a weight is written."""

    def file(self, part: str, name: str, size: int) -> None:
        """Hear that an output file of `size` bytes is complete."""


NOBODY = Listener()
