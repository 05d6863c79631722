"""Which weights hold a NaN or an infinity: a conversion that writes nothing, before the real one.

The plan has to be complete before the first byte is written, and headers do not say what bytes
hold: `--on-nonfinite keep` takes one more read of the source.  The judge is the engine that
converts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..callbacks import Progress, no_progress
from ..checkpoint.types import FileDigests, Shard
from ..engines.protocol import Engine
from ..errors import NonFiniteError
from ..format.dtypes import ITEMSIZE
from ..output.manifest import Result
from ..planning.make_plan import Scan
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import Resources
from .conversion import Conversion
from .items import Item, Job

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..engines.protocol import U8


class _Nowhere:
    """The sink that drops everything."""

    def write(self, key: str, offset: int, data: NDArray[np.uint8]) -> None: ...

    def finish(self, plan: TensorPlan, result: Result) -> None: ...

    def source_read(self, shard: Shard, digests: FileDigests) -> None: ...

    def abort(self) -> None: ...


class _Scan(Conversion):
    """A conversion that notes what is not finite and goes on."""

    def __init__(
        self, plan: Plan, engine: Engine, resources: Resources, progress: Progress
    ) -> None:
        super().__init__(plan, engine, resources, _Nowhere(), None, progress=progress)
        self.found: set[str] = set()

    def not_finite(self, item: Item, error: NonFiniteError, data: U8) -> None:
        self.found.add(item.job.plan.name)

    def finish_state(self, job: Job) -> None: ...


def nonfinite_weights(
    plan: Plan, engine: Engine, resources: Resources, progress: Progress = no_progress
) -> frozenset[str]:
    """The weights that `plan` would quantize and that hold a NaN or an infinity.

    Raises:
        InputError: a float8 weight does not decode to finite values (it cannot be kept as it is
            stored, and what it would decode to is not what the source holds), or a file changed.
        OSError: a disk fails.
    """
    weights = tuple(
        replace(t, state=replace(t.state, nested=False))
        for t in plan.tensors
        if t.state is not None
    )
    quickest = replace(plan.config, scale="absmax")
    scan = _Scan(replace(plan, tensors=weights, config=quickest), engine, resources, progress)
    scan.run()
    return frozenset(scan.found)


def scanner(engine: Engine, resources: Resources, progress: Progress = no_progress) -> Scan:
    """For `make_plan`."""
    return lambda plan: nonfinite_weights(plan, engine, resources, progress)


def scan_bytes(plan: Plan) -> int:
    """Bytes that a scan reads."""
    return sum(t.numel * ITEMSIZE[t.weight.stored.dtype] for t in plan.tensors if t.state)
