"""Choose 4-bit codes by error feedback (GPTQ, Frantar et al., 2022), under scales that are fixed.

The columns of a matrix are rounded one after another. The columns still to come make up for the
error of each, as far as the inputs' second moments allow.
"""

from __future__ import annotations

from typing import Any

from ...callbacks import Notify, no_notice

DAMPING = 0.05
"""Default of what is added to the diagonal of the second moments, in units of its mean."""
_LAZY = 128  # columns whose error is passed on together
_ATTEMPTS = 6  # each with ten times the damping of the one before


def feed_back(
    weight: Any,
    hessian: Any,
    scale: Any,
    values: Any,
    midpoints: Any,
    damping: float = DAMPING,
    notify: Notify = no_notice,
) -> Any:
    """Choose the codes of a matrix, the columns with the largest inputs first.

    Args:
        weight: float32 tensor [rows, columns].
        hessian: float32 tensor [columns, columns], the inputs' second moments. Columns whose
            diagonal is 0 had no input and are rounded to the nearest value.
        scale: float32 tensor [rows, columns], what each element's value is multiplied by: any sign.
        values, midpoints: float32 tensors [16] and [15], the table in ascending order.
        damping: added to the diagonal, in units of its mean.
        notify: told where the damping did not suffice.

    Returns:
        uint8 tensor [rows, columns]: the rank of each element's value in the table.
    """
    import torch

    inverse, order = _inverse(hessian, damping, notify)
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


def _inverse(hessian: Any, asked_damping: float, notify: Notify) -> tuple[Any, Any]:
    """Return the upper Cholesky factor of the inverse, and the order of the columns.

    Returns:
        float32 tensor [columns, columns], the identity where no damping makes the matrix positive;
        int64 tensor [columns].
    """
    import torch

    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    matrix = hessian.clone()
    matrix[dead, :] = matrix[:, dead] = 0
    matrix.diagonal()[dead] = mean
    matrix = matrix[order][:, order]
    damping = asked_damping
    for _ in range(_ATTEMPTS):
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            if damping != asked_damping:
                notify(
                    f"the inputs' second moments were no positive matrix: damping {damping:g} "
                    f"instead of {asked_damping:g}"
                )
            return upper, order
        damping = max(10 * damping, 1e-4)
    notify("the inputs' second moments are no positive matrix: rounded to the nearest instead")
    return torch.eye(len(diagonal), device=hessian.device), order


def relative_loss(weight: Any, decoded: Any, second: Any) -> float:
    """Return the mean square error of a matrix's outputs, in units of their mean square.

    Args:
        weight, decoded: float32 tensors [rows, columns], before and after rounding.
        second: float32 tensor [columns, columns], the inputs' second moments; or [columns], their
            diagonal.
    """

    def power(matrix: Any) -> float:
        weighted = matrix @ second if second.ndim == 2 else matrix * second
        return float((weighted * matrix).sum())

    lost, total = power(weight - decoded), power(weight)
    return max(0.0, lost) / total if total > 0 else 0.0
