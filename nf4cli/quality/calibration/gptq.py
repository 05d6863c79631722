"""Error feedback (GPTQ, Frantar et al., 2022) onto a 4-bit table under scales that are fixed.

The columns of a matrix are rounded one after another; what each loses is made up for, as far as the
inputs' second moments allow, by those that are still to come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...callbacks import Notify, no_notice

_LAZY = 128  # columns whose error is passed on together
_RAISES = 6  # times that the damping is raised tenfold before a matrix is given up


@dataclass(frozen=True, slots=True)
class Feedback:
    """How it is done.

    Attributes:
        damping: what is added to the diagonal, in units of its mean.
        act_order: columns of large inputs first.
    """

    damping: float = 0.05
    act_order: bool = True


def feed_back(
    weight: Any,
    hessian: Any,
    scale: Any,
    values: Any,
    midpoints: Any,
    how: Feedback,
    notify: Notify = no_notice,
) -> Any:
    """Choose the codes of a matrix.

    Args:
        weight: float32 tensor [rows, columns].
        hessian: float32 tensor [columns, columns], the inputs' second moments; columns that were
            never active are rounded to the nearest.
        scale: float32 tensor [rows, columns], what each element's value is multiplied by: any sign.
        values, midpoints: float32 tensors [16] and [15], the table in ascending order.

    Returns:
        uint8 tensor [rows, columns]: the rank of each element's value in the table.
    """
    import torch

    inverse, order = _inverse(hessian, how, notify)
    work, units = weight[:, order].clone(), scale[:, order]
    divisors = torch.where(units == 0, torch.ones_like(units), units)
    ranks = torch.empty(work.shape, dtype=torch.uint8, device=work.device)
    columns = work.shape[1]
    for start in range(0, columns, _LAZY):
        stop = min(start + _LAZY, columns)
        part = work[:, start:stop]
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            at = start + i
            rank = torch.bucketize(part[:, i] / divisors[:, at], midpoints)
            ranks[:, at] = rank.to(torch.uint8)
            error = (part[:, i] - values[rank] * units[:, at]) / inverse[at, at]
            part[:, i + 1 :] -= error.unsqueeze(1) * inverse[at, at + 1 : stop].unsqueeze(0)
            errors[:, i] = error
        work[:, stop:] -= errors @ inverse[start:stop, stop:]
    out = torch.empty_like(ranks)
    out[:, order] = ranks
    return out


def _inverse(hessian: Any, how: Feedback, notify: Notify) -> tuple[Any, Any]:
    """(upper Cholesky factor of the inverse, the order of the columns)."""
    import torch

    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    order = torch.arange(len(diagonal), device=hessian.device)
    if how.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    matrix = hessian.clone()
    matrix[dead, :] = matrix[:, dead] = 0
    matrix.diagonal()[dead] = mean
    matrix = matrix[order][:, order]
    damping = how.damping
    for _ in range(_RAISES):
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            if damping != how.damping:
                notify(
                    f"the inputs' second moments were no positive matrix: damping {damping:g} "
                    f"instead of {how.damping:g}"
                )
            return upper, order
        damping = max(10 * damping, 1e-4)
    notify("the inputs' second moments are no positive matrix: rounded to the nearest instead")
    return torch.eye(len(diagonal), device=hessian.device), order


def relative_loss(weight: Any, decoded: Any, second: Any) -> float:
    """The mean square of what a matrix puts out wrongly, in units of what it puts out.

    Args:
        second: float32 tensor [columns, columns], the inputs' second moments; or their diagonal.
    """

    def power(matrix: Any) -> float:
        seen = matrix @ second if second.ndim == 2 else matrix * second
        return float((seen * matrix).sum())

    lost, whole = power(weight - decoded), power(weight)
    return max(0.0, lost) / whole if whole > 0 else 0.0
