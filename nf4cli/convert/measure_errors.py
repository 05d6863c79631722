"""Measure the error that each format costs each weight, by conversions that write nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..callbacks import Progress, no_progress
from ..checkpoint.bnb_format import expected_tensors
from ..engines.protocol import Engine, NestedAbsmax
from ..format.codebook import NESTED_BLOCKSIZE, nested_map
from ..planning.plan import Plan, TensorPlan
from ..planning.resources import Resources
from .conversion import Conversion, Tools
from .find_nonfinite import Nowhere
from .items import Job

if TYPE_CHECKING:
    from ..engines.protocol import F32, U8


@dataclass(frozen=True, slots=True)
class WeightError:
    """The error of a weight in one format.

    Attributes:
        squares: sum of the squared errors of its elements.
        weight_squares: sum of the squares of its elements.
    """

    squares: float
    weight_squares: float

    @property
    def relative(self) -> float:
        """The squared error in units of the squared weight."""
        return self.squares / self.weight_squares if self.weight_squares else 0.0


class _Measuring(Conversion):
    """A conversion that notes each weight's error.

    The engine's error sums are under the scales before double quantization. What that adds is
    reckoned from the scales: a scale that is wrong by a share moves every value by that share.

    Attributes:
        errors: by weight.
    """

    def __init__(self, plan: Plan, tools: Tools) -> None:
        super().__init__(plan, tools, Nowhere())
        self.errors: dict[str, WeightError] = {}
        self._shares: dict[str, tuple[float, int]] = {}

    def finish_state(self, job: Job) -> None:
        name, share = job.plan.name, 0.0
        if job.absmax is not None:
            self._nest(name, job.plan, job.absmax)
            job.absmax.close()
            job.absmax = None
            total, blocks = self._shares.pop(name)
            share = total / blocks
        sums = np.concatenate([job.stats[start] for start in sorted(job.stats)])
        squares, weight_squares = float(sums[:, 0].sum()), float(sums[:, 1].sum())
        self.errors[name] = WeightError(squares + share * weight_squares, weight_squares)

    def write_nested(
        self, name: str, start: int, values: F32, offset: float, codes: U8, nested: F32
    ) -> None:
        decoded = self._engine.nested_dequantize(
            NestedAbsmax(codes, 0, NESTED_BLOCKSIZE, nested_map(), nested, offset)
        )
        used = values > 0
        shares = (decoded[used] / values[used] - 1.0).astype(np.float64)
        total, blocks = self._shares.get(name, (0.0, 0))
        self._shares[name] = total + float(shares @ shares), blocks + values.size


def weight_errors(
    plan: Plan, packing: tuple[int, bool], engine: Engine, resources: Resources,
    progress: Progress = no_progress,
) -> dict[str, WeightError]:  # fmt: skip
    """Return the error of each weight that a plan quantizes, had it another format.

    Args:
        packing: (blocksize, double_quant).
        progress: told the bytes of the source that are read, `measured_bytes` in all.

    Raises:
        InputError: a weight is not finite, or a file changed.
        OSError: a disk fails.
    """
    blocksize, nested = packing
    weights = tuple(_in_format(t, blocksize, nested) for t in plan.tensors if t.state is not None)
    config = replace(plan.config, blocksize=blocksize, double_quant=nested, formats=())
    measuring = _Measuring(
        replace(plan, tensors=weights, config=config), Tools(engine, resources, progress)
    )
    measuring.run()
    return measuring.errors


def _in_format(tensor: TensorPlan, blocksize: int, nested: bool) -> TensorPlan:
    """Return the plan of a packed weight in another format."""
    assert tensor.state is not None
    state = replace(tensor.state, blocksize=blocksize, nested=nested)
    return replace(tensor, state=state, outputs=expected_tensors(tensor.name, state, "uint8"))


def measured_bytes(plan: Plan, packings: Collection[tuple[int, bool]]) -> int:
    """Return the bytes that measuring several formats reads."""
    return len(packings) * sum(t.source_bytes for t in plan.tensors if t.state)
