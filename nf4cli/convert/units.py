"""Cut a conversion into units that can be made anywhere, in any order, with the same bytes.

A unit makes one output file, or none, and digests some of the source files.  Each source file is
digested by one unit, which reads all of it for that.  A unit needs no journal and knows of no other
unit: it returns what it made, and the run that asked for it keeps the journal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..checkpoint.file_io import identity_of
from ..checkpoint.reader import LocalShards, ShardSource
from ..checkpoint.types import Checkpoint, FileDigests, Shard
from ..errors import InputError
from ..output.manifest import Result
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import unit_of
from .conversion import Tools, changed
from .journal import Upload
from .resume import Standing
from .transfers import Transfers

_ELSEWHERE = Result(None, None, {})


@dataclass(frozen=True, slots=True)
class Unit:
    """What is made on its own.

    Attributes:
        plan: holds the weights of the output file, its only shard, and the source files that they
            are made of, with every weight in those that the unit digests.
        made: names of the weights that it makes; the others are made by other units.
        digested: names of the source files that it digests.
    """

    plan: Plan
    made: frozenset[str]
    digested: frozenset[str]

    @property
    def name(self) -> str:
        """The output file, or the source files that are digested."""
        return (
            self.plan.shards[0].filename if self.plan.shards else ", ".join(sorted(self.digested))
        )

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights that it makes, as they are stored."""
        return sum(t.source_bytes for t in self.plan.tensors if t.name in self.made)


@dataclass(frozen=True, slots=True)
class UnitTask:
    """What every `Task` about a unit says of itself; subclasses do it.

    Attributes:
        unit: the unit.
    """

    unit: Unit

    @property
    def name(self) -> str:
        return self.unit.name

    @property
    def nbytes(self) -> int:
        return self.unit.source_bytes

    @property
    def tensors(self) -> int:
        return len(self.unit.plan.tensors)

    @property
    def granule(self) -> int:
        return unit_of(self.unit.plan.config)


@dataclass(frozen=True, slots=True)
class Made:
    """What a unit made.

    Attributes:
        results: of its weights, by name.
        tensors: digests of their output tensors, by key.
        digest: of the output file; "" without one.
        sources: digests of the source files that it digested, by name.
        upload: of the output file, where a Hub has it; None where none was asked to take it.
    """

    results: Mapping[str, Result]
    tensors: Mapping[str, str]
    digest: str
    sources: Mapping[str, FileDigests]
    upload: Upload | None = None


class Sources(Protocol):
    """Brings a unit's source files to the machine that makes it; pickled and sent."""

    def opened(
        self, unit: Unit, aside: Path, moved: Transfers
    ) -> AbstractContextManager[ShardSource]:
        """Return what opens the unit's source files, and no others.

        Args:
            aside: a directory for what is fetched.
            moved: counts what is fetched.
        """
        ...


class SharedSources:
    """The `Sources` that lie where the plan found them."""

    def opened(
        self, unit: Unit, aside: Path, moved: Transfers
    ) -> AbstractContextManager[ShardSource]:
        return LocalShards()


def cut(plan: Plan, standing: Standing) -> list[Unit]:
    """Return the units that make what an earlier run has not finished.

    An output file is made again as a whole unless all of it stands.
    """
    # Places of weights in the plan, whose order is kept: by output file, and by source file.
    made: dict[int, list[int]] = {number: [] for number in range(len(plan.shards))}
    made_from: dict[Path, list[int]] = {shard.path: [] for shard in plan.checkpoint.shards}
    for place, tensor in enumerate(plan.tensors):
        if tensor.outputs:
            made[tensor.file].append(place)
        for path in _files_of(tensor):
            made_from[path].append(place)
    shards = {shard.path: shard for shard in plan.checkpoint.shards}
    unread = {path for path, s in shards.items() if s.path.name not in standing.sources}

    def unit(number: int | None, used: Iterable[Path]) -> Unit:
        ours = made[number] if number is not None else []
        files = [shard for path, shard in shards.items() if path in used]
        owned = unread.intersection(used)
        unread.difference_update(owned)
        seen = {*ours, *(place for path in owned for place in made_from[path])}
        return _unit(plan, number, ours, sorted(seen), files, owned)

    units = []
    for number, layout in enumerate(plan.shards):
        if layout.filename not in standing.shards:
            tensors = (plan.tensors[place] for place in made[number])
            units.append(unit(number, {path for t in tensors for path in _files_of(t)}))
    return [*units, *(unit(None, {path}) for path in shards if path in unread)]


def _files_of(tensor: TensorPlan) -> set[Path]:
    """Return the source files that a weight is made of."""
    files = {source.shard.path for source in tensor.weight.sources}
    if tensor.packed is not None:
        files |= {shard.path for shard, _ in tensor.packed.parts()}
    return files


def _unit(
    plan: Plan, number: int | None, ours: Iterable[int], seen: Iterable[int],
    files: Sequence[Shard], owned: Collection[Path],
) -> Unit:  # fmt: skip
    """Return a unit.

    Args:
        number: of its output file, None for none.
        ours: places in the plan of the weights in that.
        seen: places of these, and of all weights in the files that it digests, in order.
        files: the source files that it reads.
        owned: those that it digests.
    """
    members = [plan.tensors[place] for place in ours]
    names, importance = frozenset(t.name for t in members), plan.importance
    if importance is not None:
        used = {source.name for t in members for source in (t.weight, *t.weight.sources)}
        columns = {name: c for name, c in importance.columns.items() if name in used}
        importance = replace(importance, columns=columns)
    codes = plan.codes.only(names) if plan.codes else None
    tensors = (plan.tensors[place] for place in seen)
    return Unit(
        replace(
            plan, checkpoint=_with_files(plan.checkpoint, tuple(files)), importance=importance,
            tensors=tuple(replace(t, file=0) if t.name in names else t for t in tensors),
            shards=() if number is None else (plan.shards[number],),
            index=None, output_config=None, notes=(), codes=codes,
        ),
        names,
        frozenset(path.name for path in owned),
    )  # fmt: skip


def _with_files(checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> Checkpoint:
    """Return a checkpoint with some of its files, and nothing that carrying out a plan needs no
    more: it is sent to other machines."""
    return replace(checkpoint, shards=shards, tensors={}, config={}, params={},
                   extra_files=(), left_files=())  # fmt: skip


def standing_of(unit: Unit) -> Standing:
    """Return what a unit's conversion leaves to other units: weights and digests."""
    elsewhere = {t.name for t in unit.plan.tensors} - unit.made
    return Standing(
        results=dict.fromkeys(elsewhere, _ELSEWHERE),
        sources={
            shard.path.name: FileDigests("", {})
            for shard in unit.plan.checkpoint.shards
            if shard.path.name not in unit.digested
        },
    )


def with_own_progress(unit: Unit, tools: Tools) -> Tools:
    """Return tools whose progress hears of the weights that a unit makes, and of no others."""

    def progress(name: str, nbytes: int) -> None:
        if name in unit.made:
            tools.progress(name, nbytes)

    return replace(tools, progress=progress)


def source_files(units: Iterable[Unit]) -> dict[Path, int]:
    """Return the size in bytes of every file that some units read."""
    files: dict[Path, int] = {}
    for unit in units:
        files |= {shard.path: shard.size for shard in unit.plan.checkpoint.shards}
        for tensor in unit.plan.tensors:
            files |= {s.path: s.size for delta in tensor.deltas for s, _ in delta.files}
    return files


def require_unchanged(shards: Iterable[Shard]) -> None:
    """Raise InputError if a source file was touched since its header was read.

    Units read a file at different times: one may have digested it before, and another read it
    after a change.
    """
    for shard in shards:
        if identity_of(shard.path.stat()) != shard.identity:
            raise InputError(changed(shard.path))


class Collected:
    """What units have made, put together as one run would have found it.

    Args:
        plan: of the whole conversion.
        standing: finished work of an earlier run.

    Attributes:
        results, tensors, shards, sources: see `Standing`; of all that is finished.
    """

    def __init__(self, plan: Plan, standing: Standing) -> None:
        self._plan, self._files = {t.name: t for t in plan.tensors}, plan.shards
        whole = {
            t.name
            for t in plan.tensors
            if t.outputs and plan.shards[t.file].filename in standing.shards
        }
        self.results = {n: r for n, r in standing.results.items() if n in whole}
        self.tensors = {key: standing.outputs[key] for n in whole for key in self._plan[n].outputs}
        self.shards = dict(standing.shards)
        self.sources = dict(standing.sources)
        self._waiting: list[str] = []

    def add(self, unit: Unit, made: Made) -> list[tuple[TensorPlan, Result]]:
        """Add what a unit made, and return the weights that nothing more is to be known of.

        A weight is complete when every source file that it is made of is digested.

        Raises:
            InputError: a source file changed between two reads.
        """
        self.results |= made.results
        self.tensors |= made.tensors
        self.sources |= made.sources
        if unit.plan.shards:
            self.shards[unit.name] = made.digest
        self._waiting += made.results
        complete, waiting = [], []
        for name in self._waiting:
            tensor = self._plan[name]
            files = {source.shard.path.name for source in tensor.weight.sources}
            if files <= self.sources.keys():
                self.results[name] = self._with_sources(tensor, self.results[name])
                complete.append((tensor, self.results[name]))
            else:
                waiting.append(name)
        self._waiting = waiting
        return complete

    def whole(self, names: Iterable[str]) -> list[str]:
        """Return those of some output files of whose weights nothing more is to be known."""
        waiting = {self._files[self._plan[name].file].filename for name in self._waiting}
        return [name for name in names if name not in waiting]

    def _with_sources(self, tensor: TensorPlan, result: Result) -> Result:
        """Return a result with the digests of the stored tensors that the weight is made of.

        Raises:
            InputError: one that was digested as it was read is another in its file's digest.
        """
        digests = dict(result.sources)
        for source in tensor.weight.sources:
            for shard, stored in source.placed:
                file = self.sources.get(shard.path.name)
                if file is None:
                    continue
                if (
                    digests.setdefault(stored.name, file.tensors[stored.name])
                    != (file.tensors[stored.name])
                ):
                    raise InputError(changed(shard.path))
        return replace(result, sources=digests)
