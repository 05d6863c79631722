"""Add up the inputs of a linear layer: their squares, and products of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ...engines.protocol import F32

_PANEL = 192  # columns whose products with those from them on are computed at a time


@dataclass(eq=False)
class Moments:
    """The sums of one input, which several linear layers may share.

    Attributes:
        full: add up the products of columns as well.
        tokens: rows seen, or the sum of their weights.
        squares: float64 tensor [columns], the sum of squares; None before the first rows.
        products: float32 tensor [columns, columns], the sum of x^T x on and above the diagonal;
            None where it is not asked for.
        drifts: float32 tensor [columns, columns], the sum of (r - x)^T x, where r are the rows
            that the unrounded model has in place of x; None without such rows.
    """

    full: bool
    tokens: float = 0.0
    squares: Any = None
    products: Any = None
    drifts: Any = None

    def add(self, rows: Any, weights: Any = None, unrounded: Any = None) -> None:
        """Add rows to the sums.

        Args:
            rows: float32 tensor [tokens, columns].
            weights: float32 tensor [tokens], how often each row counts; None for once.
            unrounded: float32 tensor [tokens, columns], what the unrounded model has in their
                place; None where that is not known.
        """
        weighted = rows if weights is None else rows * weights[:, None]
        self.tokens += len(rows) if weights is None else float(weights.sum())
        squares = (weighted * rows).sum(0).double()
        self.squares = squares if self.squares is None else self.squares + squares
        if not self.full:
            return
        columns = rows.shape[1]
        if self.products is None:
            self.products = rows.new_zeros(columns, columns)
        for start in range(0, columns, _PANEL):  # the rest is its mirror image
            panel = weighted[:, start : start + _PANEL].T
            self.products[start : start + _PANEL, start:].addmm_(panel, rows[:, start:])
        if unrounded is not None:
            if self.drifts is None:
                self.drifts = rows.new_zeros(columns, columns)
            self.drifts.addmm_((unrounded - rows).T, weighted)

    @property
    def importance(self) -> F32:
        """float32 array [columns], the mean square."""
        mean: F32 = (self.squares / max(1, self.tokens)).float().cpu().numpy()
        return np.ascontiguousarray(mean)

    @property
    def second(self) -> Any:
        """float32 tensor [columns, columns], the mean of x^T x.

        Where only squares were added up: [columns], its diagonal.
        """
        if self.products is None:
            return (self.squares / max(1, self.tokens)).float()
        upper = self.products.triu()
        return (upper + upper.triu(1).T) / max(1, self.tokens)

    @property
    def drift(self) -> Any:
        """float32 tensor [columns, columns], the mean of (r - x)^T x; None without such rows."""
        return None if self.drifts is None else self.drifts / max(1, self.tokens)
