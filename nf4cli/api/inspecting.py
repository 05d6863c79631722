"""Look into a checkpoint, a pipeline or one tensor: the work of `nf4cli.inspect`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import engines
from ..checkpoint.discovery import open_checkpoint
from ..convert.listener import NOBODY, Listener, Stage
from ..errors import InputError, UsageError
from . import sources
from .machine import processors

if TYPE_CHECKING:
    from ..output.inspection import Overview, TensorView
    from ..output.weight_figures import WeightFigures


@dataclass(frozen=True)
class Inspected:
    """The contents of a model.

    Attributes:
        called: what messages call the model.
        name: of its directory; of a model on the Hub, its repository and commit.
        parts: overviews by component; "" is a checkpoint without a pipeline.
    """

    called: str
    name: str
    parts: dict[str, Overview]


def look(path: Path, listener: Listener = NOBODY) -> Inspected:
    """Return an overview of a checkpoint, or of each component of a pipeline.

    Raises:
        InputError, MachineError: the model cannot be fetched or read.
    """
    sources.require_there(path)
    from ..output import inspection  # it needs numpy, a refusal does not
    from ..planning.pipeline_plan import components_of, is_pipeline

    place = sources.local(path, listener)
    called = sources.shown(path, place)
    if not is_pipeline(place):
        seen = inspection.overview(open_checkpoint(place))
        if place != path:  # a directory of the cache is named after the commit alone
            seen = replace(seen, name=called)
        return Inspected(called, seen.name, {"": seen})
    parts = {}
    for name, component in components_of(place).items():
        try:
            parts[name] = inspection.overview(open_checkpoint(place / name))
        except InputError:
            if component.converts:
                raise
    return Inspected(called, place.resolve().name, parts)


def figures_of(
    path: Path, seen: Inspected, listener: Listener = NOBODY
) -> dict[str, WeightFigures]:
    """Return codes and scales of all weights by component, having read every packed byte.

    Args:
        seen: what `look` found at the path.
    """
    from ..output.weight_figures import weight_figures

    place = sources.local(path, listener)
    engine, workers = engines.load("cpu"), processors()
    found = {}
    for name, part in seen.parts.items():
        nbytes = sum(group.nbytes for group in part.groups if group.packed)
        with listener.stage(Stage("reading", nbytes, seen.called)) as progress:
            checkpoint = open_checkpoint(place / name)
            found[name] = weight_figures(checkpoint, engine, workers, progress)
    return found


def look_at_tensor(path: Path, tensor: str, listener: Listener = NOBODY) -> TensorView:
    """Return a tensor's state and histograms.

    Args:
        tensor: its name; in a pipeline COMPONENT.NAME.

    Raises:
        UsageError: in a pipeline, the name does not begin with a component's.
        InputError: there is no such tensor, or the checkpoint cannot be read.
    """
    sources.require_there(path)
    from ..output import inspection  # see look
    from ..planning.pipeline_plan import components_of, is_pipeline

    place = sources.local(path, listener)
    if is_pipeline(place):
        components = components_of(place)
        name, _, rest = tensor.replace("/", ".", 1).partition(".")
        if name not in components or not rest:
            raise UsageError(
                f"{tensor!r} names no component of {place}: write COMPONENT.TENSOR, where "
                f"COMPONENT is one of {', '.join(components)}"
            )
        place, tensor = place / name, rest
    return inspection.tensor_view(open_checkpoint(place), tensor, engines.load("cpu"))
