"""Keep a run within its bound on the disk: decide which file may take room, and when.

A step is a source file with the output files that are made of it.  Steps are admitted in order, and
all the room that a step needs is reserved at once.  So an admitted step never waits for room: it
runs to its end and frees what it took.  A step that fits alone is admitted sooner or later, and no
two steps can wait for each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.types import Shard
from ..convert.resume import Standing
from ..convert.transfers import Transfers
from ..planning.model_plan import ModelPlan, path_in_model


@dataclass(frozen=True, slots=True)
class Step:
    """A source file, and the output files that are made of it.

    Attributes:
        source: bytes of the run's room that the source file takes until it has been read; 0 where
            it takes none, or becomes an output file itself.
        outputs: paths of the output files.
        name: path of the source file under the source's root.
        shard: what the source file holds; None for a file that is copied as it is.
    """

    source: int
    outputs: frozenset[str]
    name: str = ""
    shard: Shard | None = None


def steps_of(
    model: ModelPlan, fetched: Collection[str], standings: Mapping[str, Standing] | None = None,
    gone: Collection[str] = (),
) -> list[Step]:  # fmt: skip
    """Return a step for each source file that is still needed, in the order of the run.

    Args:
        fetched: paths of the source files that take room of the run.
        standings: finished work of an earlier run, by part; None for none.
        gone: paths of copied files that need not be copied again.
    """
    steps = []
    for part, plan in model.parts.items():
        standing = standings[part] if standings else Standing()
        outputs: dict[Path, set[str]] = {}
        for t in plan.tensors:
            if t.outputs and t.name not in standing.results:
                file = path_in_model(part, plan.shards[t.file].filename)
                for source in t.weight.sources:
                    outputs.setdefault(source.shard.path, set()).add(file)
        for shard in plan.checkpoint.shards:
            if standings and shard.path not in outputs and shard.path.name in standing.sources:
                continue
            name = path_in_model(part, shard.path.name)
            size = shard.size if name in fetched else 0
            steps.append(Step(size, frozenset(outputs.get(shard.path, ())), name, shard))
    for file in model.copies.weight_files:
        if file not in gone:
            steps.append(Step(0, frozenset([file]), model.copies.files[file]))
    return steps


def smallest(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    base: int,
    leaving: bool,
    begun: Collection[str] = (),
) -> int:
    """Return the smallest bound under which every step can be admitted, in bytes.

    Args:
        steps: in order.
        sizes: bytes of each output file, by path.
        base: bytes that lie on the disk all the time.
        leaving: whether output files leave the disk when they are complete.
        begun: paths of the output files on the disk that an earlier run began.
    """
    if not leaving:
        return base + sum(sizes.values()) + max((step.source for step in steps), default=0)
    first = dict.fromkeys(begun, 0)
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        for name in step.outputs:
            first.setdefault(name, number)
            last[name] = number
    needs = [
        step.source + sum(sizes[name] for name in last if first[name] <= number <= last[name])
        for number, step in enumerate(steps)
    ]
    return base + max(needs, default=0)


class Budget:
    """Hands out the bytes of the disk within a bound; every method is thread-safe.

    Args:
        limit: the bound, at least `smallest`; None for none.
        sizes, base, leaving, begun: see `smallest`.
        transfers: counts everything that is held.
    """

    def __init__(
        self,
        limit: int | None,
        sizes: Mapping[str, int],
        base: int,
        leaving: bool,
        transfers: Transfers,
        begun: Collection[str] = (),
    ) -> None:
        self._limit = limit
        self._sizes = sizes
        self._transfers = transfers
        self._changed = threading.Condition()
        self._held: dict[str, int] = {}  # output files, by name
        self._used = 0
        self._failed = False
        transfers.disk_limit = limit
        self._take(base)
        for name in begun if leaving else sizes:
            self._hold(name)

    @property
    def bounded(self) -> bool:
        """Return whether there is a bound."""
        return self._limit is not None

    def _take(self, count: int) -> None:
        self._used += count
        self._transfers.hold(count)

    def _hold(self, name: str) -> None:
        self._held[name] = self._sizes[name]
        self._take(self._sizes[name])

    def try_admit(self, step: Step) -> bool:
        """Reserve all that a step needs, without waiting; return False where it does not fit."""
        with self._changed:
            return self._fits(step) and self._admit(step)

    def admit(self, step: Step) -> bool:
        """Wait until a step fits, and reserve all that it needs.

        Steps are admitted in the order of the calls, so one thread at a time may call this.

        Returns:
            False where the run failed meanwhile.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._fits(step))
            return not self._failed and self._admit(step)

    def _admit(self, step: Step) -> bool:
        self._take(step.source)
        for name in step.outputs - self._held.keys():
            self._hold(name)
        return True

    def _fits(self, step: Step) -> bool:
        new = sum(self._sizes[name] for name in step.outputs if name not in self._held)
        return self._limit is None or self._used + step.source + new <= self._limit

    def source_gone(self, step: Step) -> None:
        """Free the room of a step's source file, which has left the disk."""
        self._give_back(lambda: step.source)

    def output_gone(self, name: str) -> None:
        """Free the room of an output file, which has left the disk."""
        self._give_back(lambda: self._sizes[name])

    def _give_back(self, count: Callable[[], int]) -> None:
        with self._changed:
            self._take(-count())
            self._changed.notify_all()

    def fail(self) -> None:
        """Make every `admit` return False, those that wait as well."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()
