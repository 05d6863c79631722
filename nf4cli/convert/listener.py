"""Report how a run goes on: its stages, its progress, and the weights and files it finishes."""

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
    from .tasks import Crowd
    from .transfers import Transfers


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run that takes a while.

    Attributes:
        label: what is being done ("quantizing").
        total: bytes of work; 0 where it is unknown.
        what: the models that are read and written, for the terminal.
        weights: number of parameters; 0 where it does not matter.
        transfers: counts the bytes that are moved meanwhile; None where none are.
        place: a path on the disk whose free space is shown; None for none.
        crowd: the machines that work on it, and its files; None where this machine does it all.
    """

    label: str
    total: int = 0
    what: str = ""
    weights: int = 0
    transfers: Transfers | None = None
    place: Path | None = None
    crowd: Crowd | None = None


class Listener:
    """Hears of a run, from any thread, and does nothing; subclasses override what they need.

    Everywhere `part` is a pipeline's component, "" for a checkpoint alone.
    """

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[Progress]:
        """Hear that a stage begins, yield what its progress is told to, and hear that it ends."""
        yield self.progress

    def progress(self, name: str, nbytes: int) -> None:
        """Hear that `nbytes` more bytes of the tensor or file `name` are done."""

    def note(self, sentence: str) -> None:
        """Hear a sentence that the user should read."""

    def detail(self, sentence: str) -> None:
        """Hear a sentence for those who want to know everything."""

    def resumed(self, part: str, plans: Iterable[TensorPlan]) -> None:
        """Hear which weights an earlier run finished."""

    def tensor(self, part: str, plan: TensorPlan, result: Result) -> None:
        """Hear that a weight is written."""

    def file(self, part: str, name: str, size: int) -> None:
        """Hear that an output file of `size` bytes is complete."""


NOBODY = Listener()
