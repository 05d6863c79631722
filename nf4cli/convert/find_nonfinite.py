"""Find the weights that hold a NaN or an infinity, by a conversion that writes nothing.

`--on-nonfinite keep` needs it: a plan is complete before the first byte is written, and headers do
not say what the bytes hold, so the source is read once more.  The engine that converts decides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..callbacks import Progress, no_progress
from ..checkpoint.types import FileDigests, Shard
from ..engines.protocol import Engine
from ..errors import NonFiniteError
from ..output.manifest import Result
from ..planning.make_plan import Scan
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import Resources
from .conversion import Conversion, Tools
from .items import Item, Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.protocol import U8


class Nowhere:
    """The sink that drops all bytes."""

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None: ...

    def finish(self, plan: TensorPlan, result: Result) -> None: ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None: ...

    def abort(self) -> None: ...


class _Scan(Conversion):
    """A conversion that notes weights which are not finite, and goes on.

    Attributes:
        nonfinite: their names.
    """

    def __init__(self, plan: Plan, tools: Tools) -> None:
        super().__init__(plan, tools, Nowhere())
        self.nonfinite: set[str] = set()

    def not_finite(self, item: Item, error: NonFiniteError, data: U8) -> None:
        self.nonfinite.add(item.job.plan.name)

    def finish_state(self, job: Job) -> None: ...


def nonfinite_weights(
    plan: Plan, engine: Engine, resources: Resources, progress: Progress = no_progress
) -> frozenset[str]:
    """Return the names of the weights to quantize that hold a NaN or an infinity.

    Raises:
        InputError: a weight that is stored as codes does not decode to finite values, so that
            nothing can keep it; or a file changed.
        OSError: a disk fails.
    """
    weights = tuple(
        replace(t, state=replace(t.state, nested=False))
        for t in plan.tensors
        if t.state is not None
    )
    quickest = replace(plan.config, scale="absmax")
    tools = Tools(engine, resources, progress)
    scan = _Scan(replace(plan, tensors=weights, config=quickest), tools)
    scan.run()
    return frozenset(scan.nonfinite)


def scanner(engine: Engine, resources: Resources, progress: Progress = no_progress) -> Scan:
    """Return `nonfinite_weights` as the function of a plan that `make_plan` takes."""
    return lambda plan: nonfinite_weights(plan, engine, resources, progress)


def scan_bytes(plan: Plan) -> int:
    """Return the bytes that a scan reads."""
    return sum(t.source_bytes for t in plan.tensors if t.state)
