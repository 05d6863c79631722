"""Compare two models: the work of `nf4cli.diff`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..convert.listener import Stage
from ..errors import InputError
from . import sources
from .machine import Machine

if TYPE_CHECKING:
    from ..proof.difference import Difference


@dataclass(frozen=True)
class Compared:
    """How two models differ.

    Attributes:
        a, b: how messages call them.
        parts: by component of a pipeline; "" is a checkpoint without one.
        only_a, only_b: components that the other pipeline does not have.
    """

    a: str
    b: str
    parts: Mapping[str, Difference]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Return whether nothing differs."""
        alike = all(part.equal for part in self.parts.values())
        return alike and not self.only_a and not self.only_b


def compare(a: Path, b: Path, machine: Machine) -> Compared:
    """Compare two checkpoints or pipelines.

    Raises:
        InputError: one cannot be read, or is a pipeline where the other is none.
        MachineError: one cannot be fetched.
    """
    for path in (a, b):
        sources.require_there(path)
    from ..planning.pipeline_plan import part_shards  # it needs numpy, a refusal does not
    from ..proof.difference import compare as of_checkpoints

    places = [sources.local(path, machine.listener) for path in (a, b)]
    called = [sources.shown(*pair) for pair in zip((a, b), places, strict=True)]
    first, second = map(_parts, places)
    if ("" in first) != ("" in second):
        raise InputError(
            f"{called[0]} and {called[1]}: one is a pipeline and the other is a checkpoint. Give a "
            "component's directory, like its transformer or unet"
        )
    both = sorted(first.keys() & second.keys())
    total = sum(
        file.stat().st_size
        for name in both
        for part in (first[name], second[name])
        for file in part_shards(part)
    )
    engine, workers = machine.engine, machine.resources().workers
    with machine.listener.stage(Stage("comparing", total, " with ".join(called))) as progress:
        parts = {
            name: of_checkpoints(first[name], second[name], engine, workers, progress)
            for name in both
        }
    return Compared(
        called[0], called[1], parts, tuple(sorted(first.keys() - second.keys())),
        tuple(sorted(second.keys() - first.keys())),
    )  # fmt: skip


def _parts(place: Path) -> dict[str, Path]:
    """Return the checkpoints of a model, by component; "" is one that is no pipeline.

    Components without weights, such as a tokenizer, are left out.
    """
    from ..planning.pipeline_plan import components_of, is_pipeline

    if not is_pipeline(place):
        return {"": place}
    return {
        name: place / name
        for name in components_of(place)
        if any((place / name).glob("*.safetensors"))
    }
