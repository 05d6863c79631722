"""Choose 4-bit codes by error feedback (GPTQ, Frantar et al., 2022), under scales that are fixed.

The columns of a matrix are rounded one after another. The columns still to come make up for the
error of each, as far as the inputs' second moments allow. Where the second moments of the outputs'
gradients are known as well, so do the rows below it in the same column: the loss is then that of a
Kronecker product of both, as in YAQA (Tseng et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ...callbacks import Notify, no_notice
from ...engines.cpu import FEEDBACK_ROWS, CpuEngine
from .defaults import DAMPING

if TYPE_CHECKING:
    from ...engines.protocol import F32, U8

_LAZY = 128  # columns whose error is passed on together
_ATTEMPTS = 6  # each with ten times the damping of the one before


def feed_back(
    weight: Any,
    hessian: Any,
    scale: Any,
    quant_type: str,
    damping: float = DAMPING,
    notify: Notify = no_notice,
    outputs: Sequence[Any] | None = None,
) -> Any:
    """Choose the codes of a matrix, the columns with the largest inputs first.

    Args:
        weight: float32 tensor [rows, columns].
        hessian: float32 tensor [columns, columns], the inputs' second moments. Columns whose
            diagonal is 0 had no input and are rounded to the nearest value.
        scale: float32 tensor [rows, columns], what each element's value is multiplied by: any sign.
        quant_type: of the table.
        damping: added to the diagonal, in units of its mean.
        notify: told where the damping did not suffice.
        outputs: for each FEEDBACK_ROWS rows their gradients' second moments, float32 tensors
            [rows, rows]; None to round rows by themselves.

    Returns:
        uint8 tensor [rows, columns], on the weight's device: the rank of each element's value in
        the ascending table.
    """
    import torch

    inverse, order = _inverse(hessian, damping, notify)
    rows, shares = _row_feedback(outputs, damping, len(weight))
    rows = rows.to(weight.device)
    work = weight[rows][:, order].T.contiguous()
    units = scale[rows][:, order].T.contiguous()
    ranks, engine = np.empty(work.shape, np.uint8), CpuEngine()
    for start in range(0, len(work), _LAZY):
        stop = min(start + _LAZY, len(work))
        factor = inverse[start:stop, start:stop].contiguous().cpu().numpy()
        errors = _round_columns(
            engine, work[start:stop].cpu().numpy(), units[start:stop].cpu().numpy(), factor, shares,
            quant_type, ranks[start:stop],
        )  # fmt: skip
        work[stop:] -= inverse[start:stop, stop:].T @ torch.from_numpy(errors).to(work.device)
    chosen = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    chosen[rows[:, None], order] = torch.from_numpy(ranks).to(weight.device).T
    return chosen


def _round_columns(
    engine: CpuEngine, values: F32, scale: F32, factor: F32, shares: Sequence[F32] | None,
    quant_type: str, ranks: U8,
) -> F32:  # fmt: skip
    """Round some columns, in as many threads as torch computes in.

    Args:
        values: float32 [columns, rows], a matrix transposed.
        shares: see `_row_feedback`.
        ranks: output, uint8 [columns, rows].

    Returns:
        float32 [columns, rows]: the errors, over their places on the diagonal of `factor`.
    """
    import torch

    errors, rows = np.empty_like(values), values.shape[1]
    tiles = -(-rows // FEEDBACK_ROWS)
    threads = min(tiles, torch.get_num_threads())

    def part(first: int, last: int) -> None:
        own = (
            None if shares is None else np.concatenate([s.reshape(-1) for s in shares[first:last]])
        )
        engine.round_columns(
            values, scale, factor, own, quant_type, ranks, errors,
            range(first * FEEDBACK_ROWS, min(rows, last * FEEDBACK_ROWS)),
        )  # fmt: skip

    edges = [tiles * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, edges[:-1], edges[1:]))
    return errors


def _row_feedback(
    outputs: Sequence[Any] | None, damping: float, count: int
) -> tuple[Any, list[F32] | None]:
    """Return the order of the rows, and what each hands on of its error to those after it.

    Returns:
        int64 tensor [rows], those of a tile together, the largest gradients first; for each tile
        float32 [rows, rows], or None without `outputs`.
    """
    import torch

    if outputs is None:
        return torch.arange(count), None
    orders, shares = [], []
    for number, moments in enumerate(outputs):
        upper, order = _inverse(moments, damping, no_notice)
        orders.append(order.cpu() + number * FEEDBACK_ROWS)
        shares.append((upper / upper.diagonal()[:, None]).contiguous().cpu().numpy())
    return torch.cat(orders), shares


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


def corrected(weight: Any, hessian: Any, drift: Any, damping: float, share: float) -> Any:
    """Return the matrix that does with the rounded model's inputs what `weight` did before.

    That is the least-squares solution for the outputs that the unrounded model has (GPTAQ, Li et
    al., 2025), `share` of the way there: all of it fits the calibration text too closely.

    Args:
        weight: float32 tensor [rows, columns].
        hessian: float32 tensor [columns, columns], the inputs' second moments.
        drift: float32 tensor [columns, columns], see `Moments.drift`.
        damping: added to the diagonal, in units of its mean.
        share: from 0 to 1.
    """
    import torch

    inverse, order = _inverse(hessian, damping, no_notice)  # upper; its square is the inverse
    solved = torch.empty_like(drift)
    solved[:, order] = drift[:, order] @ (inverse.T @ inverse)
    return weight + share * (weight @ solved)


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
