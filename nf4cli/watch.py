"""Whoever wants to know what a run finishes, weight by weight and file by file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .planned import TensorPlan
    from .records import Result


class Watch:
    """Does nothing; subclasses say what they want to hear.  Called from any thread.

    Everywhere `part` is a pipeline's component, "" for a checkpoint alone.
    """

    def resumed(self, part: str, plans: Iterable[TensorPlan]) -> None:
        """An earlier run finished these weights."""

    def tensor(self, part: str, plan: TensorPlan, result: Result) -> None:
        """A weight is written."""

    def file(self, part: str, name: str, size: int) -> None:
        """An output file of `size` bytes is complete."""


NOBODY = Watch()
