"""Say where in a window two language models differ, and at which tokens most."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from . import statistics
from .statistics import Figure, figures

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RANGES, _WORST = 16, 20


@dataclass(frozen=True, slots=True)
class Range:
    """The mean KL divergence of some positions of all windows.

    Attributes:
        first, last: tokens that the model has seen, from and to.
        kl: in nats; its interval draws windows.
    """

    first: int
    last: int
    kl: Figure


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A position with one of the largest KL divergences.

    Attributes:
        window: from 0.
        position: tokens of the window that the model has seen.
        kl: in nats.
        before, token: the text before, and the token that follows in the text.
    """

    window: int
    position: int
    kl: float
    before: str = ""
    token: str = ""


def by_position(kl: NDArray[np.float64]) -> tuple[Range, ...]:
    """Return the mean of each of at most 16 ranges of positions.

    Args:
        kl: float64 [windows, positions].
    """
    windows, length = kl.shape
    edges = np.unique(np.linspace(0, length, _RANGES + 1).astype(int))
    ranges = []
    for start, stop in pairwise(edges.tolist()):
        blocks = list(np.arange(windows * (stop - start)).reshape(windows, -1))
        column = {"kl": kl[:, start:stop].reshape(-1)}
        kept = figures(column, blocks, {"kl": statistics.mean("kl")})
        ranges.append(Range(start + 1, stop, kept["kl"]))
    return tuple(ranges)


def worst(kl: NDArray[np.float64]) -> tuple[WorstToken, ...]:
    """Return the 20 positions with the largest KL divergence, the largest first.

    Args:
        kl: float64 [windows, positions].
    """
    order = np.argsort(-kl, axis=None, kind="stable")[:_WORST]
    places = zip(*np.unravel_index(order, kl.shape), strict=True)
    return tuple(WorstToken(int(w), int(p) + 1, float(kl[w, p])) for w, p in places)
