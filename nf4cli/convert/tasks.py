"""Define work that any machine can do which sees its files, and who has it done.

Proofs, conversions and the way back are cut into such tasks.  cluster/ray_tasks.py has them done by
a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..callbacks import Progress
from .conversion import Tools
from .transfers import Transfers


class Task(Protocol):
    """Work on files; an object of some kB that is pickled, sent and done, maybe more than once."""

    @property
    def name(self) -> str:
        """The file that it makes or reads, for messages."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of its work, as progress counts them."""
        ...

    @property
    def tensors(self) -> int:
        """Tensors whose plan is held in memory."""
        ...

    @property
    def granule(self) -> int:
        """Elements that are encoded together."""
        ...

    def do(self, tools: Tools, moved: Transfers) -> Any:
        """Do it, and return some kB that can be pickled.

        Args:
            tools: of the machine that does it.
            moved: counts what it fetches and uploads.

        Raises:
            InputError, UsageError, MachineError, OSError: it cannot be done.
        """
        ...


AnyTask = TypeVar("AnyTask", bound=Task)


class Check(Protocol):
    """What a machine is asked before anything is written; pickled and sent."""

    def fault(self) -> str | None:
        """Return why this machine cannot take part ("it does not see ..."), None if it can."""
        ...


@dataclass(slots=True)
class Crowd:
    """Who works on a run, and how many of its files are finished; may be read at any time.

    Attributes:
        nodes: machines that take part.
        done, total: output files, or files that are checked.
    """

    nodes: int = 0
    done: int = 0
    total: int = 0


class Cluster(Protocol):
    """Has tasks done by other processes, maybe on other machines."""

    @property
    def crowd(self) -> Crowd:
        """Return how the run goes on."""
        ...

    def do(
        self, tasks: Sequence[AnyTask], check: Check, take: Callable[[AnyTask, Any], None],
        progress: Progress, moved: Transfers | None = None,
    ) -> None:  # fmt: skip
        """Do all tasks, and hand over each one's result when it is there, in this thread.

        Args:
            tasks: in any order.
            check: every machine has to pass it.
            take: gets a task and what it returned.
            progress: told of the tasks' bytes while they are done.
            moved: counts what the tasks fetch and upload.

        Raises:
            InputError, UsageError, MachineError, OSError: one could not be done.
            InterruptedRunError: a stop was asked for.
        """
        ...


SHARED = "source and output must lie in directories that all nodes share"


@dataclass(frozen=True, slots=True)
class SeesFiles:
    """Check that a machine sees files in their size, and a directory.

    Attributes:
        files: bytes of each.
        directory: None for none.
    """

    files: Mapping[Path, int]
    directory: Path | None = None

    def fault(self) -> str | None:
        if self.directory is not None and not self.directory.is_dir():
            return f"it does not see {self.directory}: {SHARED}"
        for path, size in self.files.items():
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                what = "does not see" if found is None else f"sees {found:,} bytes of"
                return f"it {what} {path}, {size:,} bytes: {SHARED}"
        return None
