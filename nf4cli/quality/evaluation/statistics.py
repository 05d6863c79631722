"""Figures of many positions, with confidence intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F64 = NDArray[np.float64]

BLOCK = 128
"""Neighbouring positions that are drawn together: they depend on each other."""
_DRAWS, _LEVEL = 1000, 0.95


@dataclass(frozen=True, slots=True)
class Figure:
    """A value and the interval that its true value lies in with 95%: block bootstrap, percentiles.

    Attributes:
        low, high: the interval's ends; the value itself where there is only one block.
    """

    value: float
    low: float
    high: float

    def as_list(self) -> list[float]:
        """[value, low, high], six significant digits."""
        return [float(f"{x:.6g}") for x in (self.value, self.low, self.high)]


def blocks_of(windows: int, length: int) -> list[NDArray[np.int64]]:
    """The positions of each block, windows of `length` positions one after another."""
    starts = [
        (w * length + i, min(w * length + i + BLOCK, (w + 1) * length))
        for w in range(windows)
        for i in range(0, length, BLOCK)
    ]
    return [np.arange(start, stop) for start, stop in starts]


def figures(
    columns: dict[str, F64],
    blocks: list[NDArray[np.int64]],
    wanted: dict[str, Callable[[dict[str, F64]], float]],
) -> dict[str, Figure]:
    """Each wanted function of the columns, and of as many redrawn ones.

    Args:
        columns: float64 [positions] by name.
        blocks: see `blocks_of`.
        wanted: a figure's name -> what it is of the columns.
    """
    generator = np.random.default_rng(0)
    drawn: dict[str, list[float]] = {name: [] for name in wanted}
    for _ in range(_DRAWS if len(blocks) > 1 else 0):
        chosen = generator.integers(0, len(blocks), len(blocks))
        places = np.concatenate([blocks[i] for i in chosen])
        sample = {name: column[places] for name, column in columns.items()}
        for name, function in wanted.items():
            drawn[name].append(function(sample))
    found = {}
    for name, function in wanted.items():
        value = function(columns)
        tail = (1 - _LEVEL) / 2
        low, high = (
            (float(np.quantile(drawn[name], q)) for q in (tail, 1 - tail))
            if drawn[name]
            else (value, value)
        )
        found[name] = Figure(value, low, high)
    return found


def quantile(column: str, share: float) -> Callable[[dict[str, F64]], float]:
    return lambda columns: float(np.quantile(columns[column], share))


def mean(column: str) -> Callable[[dict[str, F64]], float]:
    return lambda columns: float(columns[column].mean())


def perplexity(column: str) -> Callable[[dict[str, F64]], float]:
    """Of negative log-likelihoods."""
    return lambda columns: float(np.exp(columns[column].mean()))


def ratio(above: str, below: str) -> Callable[[dict[str, F64]], float]:
    """Of two perplexities, at the same positions."""
    return lambda columns: float(np.exp(columns[above].mean() - columns[below].mean()))


def as_document(found: dict[str, Figure]) -> dict[str, Any]:
    return {name: figure.as_list() for name, figure in found.items()}
