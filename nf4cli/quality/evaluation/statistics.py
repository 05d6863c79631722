"""Summarise values of many positions as figures with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F64 = NDArray[np.float64]

BLOCK = 128
"""Neighbouring positions, which depend on each other, and are drawn together."""
_DRAWS, _LEVEL = 1000, 0.95


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and its 95% confidence interval (block bootstrap, percentiles).

    Attributes:
        low, high: the interval's ends; the value itself where there is only one block.
    """

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """Return [value, low, high], rounded to six significant digits."""
        return [float(f"{x:.6g}") for x in (self.value, self.low, self.high)]


def blocks_of(windows: int, length: int) -> list[NDArray[np.int64]]:
    """Return the positions of each block, of windows that stand one after another.

    Args:
        windows: their number.
        length: positions of a window.

    Returns:
        int64 [at most BLOCK] each; no block reaches into another window.
    """
    starts = [
        (w * length + i, min(w * length + i + BLOCK, (w + 1) * length))
        for w in range(windows)
        for i in range(0, length, BLOCK)
    ]
    return [np.arange(start, stop) for start, stop in starts]


def figures(
    columns: dict[str, F64],
    blocks: list[NDArray[np.int64]],
    functions: dict[str, Callable[[dict[str, F64]], float]],
) -> dict[str, Figure]:
    """Return each figure, with its interval from columns whose blocks are drawn at random.

    Args:
        columns: float64 [positions] by name.
        blocks: int64 arrays, the positions of each block.
        functions: how each figure is computed from the columns, by name.
    """
    generator = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(_DRAWS if len(blocks) > 1 else 0):
        chosen = generator.integers(0, len(blocks), len(blocks))
        places = np.concatenate([blocks[i] for i in chosen])
        sample = {name: column[places] for name, column in columns.items()}
        for name, function in functions.items():
            drawn[name].append(function(sample))
    summary = {}
    for name, function in functions.items():
        value = function(columns)
        tail = (1 - _LEVEL) / 2
        low, high = (
            (float(np.quantile(drawn[name], q)) for q in (tail, 1 - tail))
            if drawn[name]
            else (value, value)
        )
        summary[name] = Figure(value, low, high)
    return summary


def quantile(column: str, share: float) -> Callable[[dict[str, F64]], float]:
    """Return a function that computes a quantile of a column; `share` is from 0 to 1."""
    return lambda columns: float(np.quantile(columns[column], share))


def mean(column: str) -> Callable[[dict[str, F64]], float]:
    """Return a function that computes the mean of a column."""
    return lambda columns: float(columns[column].mean())


def share(column: str, of: str) -> Callable[[dict[str, F64]], float]:
    """Return a function that computes the mean of a column over another's, at the same positions.

    It raises UsageError where the other's mean is 0.
    """

    def function(columns: dict[str, F64]) -> float:
        whole = float(columns[of].mean())
        if not whole:
            raise UsageError(
                "--other predicts just what the source does: it has no loss to compare with"
            )
        return float(columns[column].mean()) / whole

    return function


def perplexity(column: str) -> Callable[[dict[str, F64]], float]:
    """Return a function that computes the perplexity of a column of negative log-likelihoods."""
    return lambda columns: float(np.exp(columns[column].mean()))


def ratio(above: str, below: str) -> Callable[[dict[str, F64]], float]:
    """Return a function that computes the ratio of two perplexities, at the same positions."""
    return lambda columns: float(np.exp(columns[above].mean() - columns[below].mean()))
