"""Cut a conversion into units that can be made anywhere, in any order, with the same bytes.

A unit makes one output file, or none, and digests some of the source files.  Each source file is
digested by one unit, which reads all of it for that.  A unit needs no journal and knows of no other
unit: it returns what it made, and the run that asked for it keeps the journal.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..checkpoint.file_io import identity_of, sync
from ..checkpoint.types import Checkpoint, FileDigests, Shard
from ..errors import InputError
from ..output.manifest import Result
from ..planning.plan import Plan, TensorPlan
from .conversion import Conversion, Tools, changed
from .journal import Journal
from .listener import NOBODY
from .resume import Standing
from .shard_files import ShardFiles
from .transport import LocalCarriage

_TRIES = ".tries"
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
class Made:
    """What a unit made.

    Attributes:
        results: of its weights, by name.
        tensors: digests of their output tensors, by key.
        digest: of the output file; "" without one.
        sources: digests of the source files that it digested, by name.
    """

    results: Mapping[str, Result]
    tensors: Mapping[str, str]
    digest: str
    sources: Mapping[str, FileDigests]


@dataclass(frozen=True, slots=True)
class Place:
    """Where units of one run make their files.

    Attributes:
        directory: of the finished output files.
        tries: a directory in it, of this run alone, for files that are not finished.  Once it is
            removed, a try that was left behind can make nothing more: it has no place to rename
            its file from.
        algorithm: of the files' digests.
        fsync: wait for the disk.
    """

    directory: Path
    tries: Path
    algorithm: str
    fsync: bool


@contextmanager
def place_for_units(directory: Path, algorithm: str, fsync: bool) -> Iterator[Place]:
    """Yield a place for the units of one run, after every earlier one in the directory is gone."""
    shutil.rmtree(directory / _TRIES, ignore_errors=True)
    tries = directory / _TRIES / uuid.uuid4().hex
    tries.mkdir(parents=True)
    try:
        yield Place(directory, tries, algorithm, fsync)
    finally:
        shutil.rmtree(directory / _TRIES, ignore_errors=True)


class Units(Protocol):
    """Makes units, somewhere."""

    def carry_out(
        self, units: Sequence[Unit], place: Place, take: Callable[[Unit, Made], None]
    ) -> None:
        """Make all units, and hand each over when it is made, in any order, in this thread.

        Raises:
            InputError, MachineError, UsageError, OSError: one could not be made.
            InterruptedRunError: a stop was asked for.
        """
        ...


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
        for path in {source.shard.path for source in tensor.weight.sources}:
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
            units.append(unit(number, {s.shard.path for t in tensors for s in t.weight.sources}))
    return [*units, *(unit(None, {path}) for path in shards if path in unread)]


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
    tensors = (plan.tensors[place] for place in seen)
    return Unit(
        replace(
            plan, checkpoint=_with_files(plan.checkpoint, tuple(files)), importance=importance,
            tensors=tuple(replace(t, file=0) if t.name in names else t for t in tensors),
            shards=() if number is None else (plan.shards[number],),
            index=None, output_config=None, notes=(),
        ),
        names,
        frozenset(path.name for path in owned),
    )  # fmt: skip


def _with_files(checkpoint: Checkpoint, shards: tuple[Shard, ...]) -> Checkpoint:
    """Return a checkpoint with some of its files, and nothing that carrying out a plan needs no
    more: it is sent to other machines."""
    return replace(checkpoint, shards=shards, tensors={}, config={}, params={},
                   extra_files=(), left_files=())  # fmt: skip


def make(unit: Unit, tools: Tools, place: Place) -> Made:
    """Make a unit's output file, which appears in its directory when it is whole.

    Each try writes a file of its own, so tries of the same unit do not meet.

    Raises:
        InputError, OSError: see `Conversion.run`.
    """
    elsewhere = {t.name for t in unit.plan.tensors} - unit.made
    standing = Standing(
        results=dict.fromkeys(elsewhere, _ELSEWHERE),
        sources={
            shard.path.name: FileDigests("", {})
            for shard in unit.plan.checkpoint.shards
            if shard.path.name not in unit.digested
        },
    )
    own = replace(unit.plan, tensors=tuple(t for t in unit.plan.tensors if t.name in unit.made))
    with _of_a_try(place) as aside:
        carriage = LocalCarriage(unit.plan.checkpoint.root)
        files = ShardFiles(
            own, aside, place.algorithm, _NoJournal(), "", Standing(), carriage, NOBODY
        )
        try:
            files.open()
            conversion = Conversion(
                unit.plan, tools, files, place.algorithm, standing, scratch=aside
            )
            conversion.run()
        finally:
            files.close()
        for name in files.shard_digests:
            if place.fsync:
                sync(aside / name)
            (aside / name).replace(place.directory / name)
        if place.fsync and files.shard_digests:
            sync(place.directory)
    return Made(
        {name: conversion.results[name] for name in unit.made},
        files.tensor_digests,
        next(iter(files.shard_digests.values()), ""),
        {name: conversion.digested[name] for name in unit.digested},
    )


@contextmanager
def _of_a_try(place: Place) -> Iterator[Path]:
    """Make a directory that nobody else writes to, and remove it with what is left in it.

    Raises:
        FileNotFoundError: the run that asked for it has ended, or another one has begun.
    """
    aside = place.tries / uuid.uuid4().hex
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _NoJournal(Journal):
    """The journal of a unit: none."""

    def __init__(self) -> None:
        """Open no file."""

    def weight(self, *_: object) -> None:
        """Record nothing."""

    def source_file(self, *_: object) -> None:
        """Record nothing."""


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
        self._plan = {t.name: t for t in plan.tensors}
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
