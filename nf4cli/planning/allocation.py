"""Spend bytes where they save the most loss: one option for each unit of a model, within a budget.

This is the multiple-choice knapsack problem. Three steps solve it exactly:

1. Its relaxation, where a unit may be split between two options, is solved by taking the steps
   along each unit's convex hull in the order of loss saved a byte. That gives a price of a byte, a
   bound that no choice can beat, and a first choice.
2. At that price, an option which costs more over its unit's best than the gap between bound and
   choice is in no better choice. Few options are left.
3. Those are searched by dynamic programming over the units, with only the sums (bytes, loss) that
   no other sum beats, and that can still beat the best choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..errors import UsageError

_MOST_SUMS = 200_000
"""Sums that the search holds at a time, 5 MB; where there are more, those of the least bound."""


@dataclass(frozen=True, slots=True)
class Option:
    """A way to store a unit.

    Attributes:
        nbytes: that it takes.
        loss: that is expected of it.
    """

    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice of one option for each unit.

    Attributes:
        chosen: number of each unit's option.
        nbytes, loss: sums over the units.
        bound: no choice within the budget has less loss.
    """

    chosen: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float


@dataclass(frozen=True, slots=True)
class _Relaxed:
    """The relaxation's result: the price of a byte, its bound, and a choice within the budget."""

    price: float
    bound: float
    chosen: list[int]


def allocate(units: Sequence[Sequence[Option]], budget: int) -> Allocation:
    """Return the choice of least loss among those within a budget.

    Args:
        units: the options of each unit.
        budget: bytes.

    Raises:
        UsageError: the smallest options together are above the budget; the message says the bytes.
    """
    least = sum(min(option.nbytes for option in options) for options in units)
    if least > budget:
        raise UsageError(f"{least:,} bytes is the least")
    relaxed = _relax(units, budget)
    best = _improve(units, budget, relaxed)
    picked = [options[number] for options, number in zip(units, best, strict=True)]
    loss = float(sum(option.loss for option in picked))
    nbytes = sum(option.nbytes for option in picked)
    return Allocation(tuple(best), nbytes, loss, min(loss, relaxed.bound))


def _hull(options: Sequence[Option]) -> list[int]:
    """Return the options on the lower convex hull of loss over bytes, the smallest first."""
    order = sorted(range(len(options)), key=lambda i: (options[i].nbytes, options[i].loss))
    hull: list[int] = []
    for i in order:
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue  # larger and no better
        while len(hull) > 1 and _gain(options, hull[-2], hull[-1]) <= _gain(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _gain(options: Sequence[Option], a: int, b: int) -> float:
    """Return the loss that a byte more saves on the way from option a to option b."""
    return (options[a].loss - options[b].loss) / (options[b].nbytes - options[a].nbytes)


def _relax(units: Sequence[Sequence[Option]], budget: int) -> _Relaxed:
    """Solve the relaxation."""
    hulls = [_hull(options) for options in units]
    chosen = [hull[0] for hull in hulls]
    room = budget - sum(options[i].nbytes for options, i in zip(units, chosen, strict=True))
    steps = sorted(
        (-_gain(options, a, b), number, a, b)
        for number, (options, hull) in enumerate(zip(units, hulls, strict=True))
        for a, b in pairwise(hull)
    )
    bound = sum(options[i].loss for options, i in zip(units, chosen, strict=True))
    price, is_full = 0.0, False
    for negative, number, a, b in steps:
        options = units[number]
        need = options[b].nbytes - options[a].nbytes
        if need <= room and chosen[number] == a:
            chosen[number] = b
            room -= need
            if not is_full:
                bound += negative * need
        elif not is_full:  # the first step that does not fit whole sets the price
            price, is_full = -negative, True
            bound += negative * room
    return _Relaxed(price, bound, chosen)


def _improve(units: Sequence[Sequence[Option]], budget: int, relaxed: _Relaxed) -> list[int]:
    """Return the best choice, found among what can be better than the relaxation's."""
    price, best = relaxed.price, list(relaxed.chosen)
    best_loss = sum(options[i].loss for options, i in zip(units, best, strict=True))
    gap = max(0.0, best_loss - relaxed.bound) + 1e-9 * abs(best_loss)
    cheapest = [min(option.loss + price * option.nbytes for option in options) for options in units]
    open_units, fixed_bytes = [], 0
    for number, options in enumerate(units):
        extra = [option.loss + price * option.nbytes - cheapest[number] for option in options]
        left = [i for i, value in enumerate(extra) if value <= gap]
        if len(left) > 1:
            open_units.append((number, left, [extra[i] for i in left]))
        elif left:
            best[number] = left[0]
            fixed_bytes += options[left[0]].nbytes
    found = _search(units, open_units, budget - fixed_bytes, price, gap)
    if found is None:
        return list(relaxed.chosen)
    for (number, left, _), choice in zip(open_units, found, strict=True):
        best[number] = left[choice]
    return best


def _search(
    units: Sequence[Sequence[Option]], open_units: Sequence[tuple[int, list[int], list[float]]],
    room: int, price: float, gap: float,
) -> list[int] | None:  # fmt: skip
    """Return the choice of least loss for some units by dynamic programming, None if none fits.

    Args:
        open_units: (number, options left, what each costs over the cheapest at the price).
        room: bytes for them.
        gap: largest sum of those costs, less the price of bytes left over, that can be better.
    """
    least = [min(units[n][i].nbytes for i in left) for n, left, _ in open_units]
    rest = np.cumsum([0, *least[::-1]])[::-1].tolist()  # bytes that the later units need
    sums = (np.zeros(1, np.int64), np.zeros(1))
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for step, (number, left, extra) in enumerate(open_units):
        nbytes = np.concatenate([sums[0] + units[number][i].nbytes for i in left])
        cost = np.concatenate([sums[1] + value for value in extra])
        parent = np.tile(np.arange(sums[0].size), len(left))
        choice = np.repeat(np.arange(len(left)), sums[0].size)
        fits = (nbytes + rest[step + 1] <= room) & (cost <= gap)
        nbytes, cost, parent, choice = nbytes[fits], cost[fits], parent[fits], choice[fits]
        if not nbytes.size:
            return None
        # The loss of a sum is its cost less the price of its bytes: a sum that has more bytes and
        # no less loss than another is in no best choice.
        loss = cost - price * nbytes
        order = np.lexsort((loss, nbytes))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order][:-1]]))
        kept = order[loss[order] < best_before]
        if kept.size > _MOST_SUMS:
            kept = kept[np.argsort(cost[kept], kind="stable")[:_MOST_SUMS]]
        sums = (nbytes[kept], cost[kept])
        trail.append((parent[kept], choice[kept]))
    at = int(np.argmin(sums[1] - price * sums[0]))
    chosen = []
    for parent, choice in reversed(trail):
        chosen.append(int(choice[at]))
        at = int(parent[at])
    return chosen[::-1]
