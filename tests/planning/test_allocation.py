"""The knapsack: against every choice there is, and its bound."""

from __future__ import annotations

import itertools
import random

import pytest

from nf4cli.errors import UsageError
from nf4cli.planning.allocation import Option, allocate


def best_of_all(units, budget):
    """The least loss among all choices within the budget, None for none."""
    losses = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*units)
        if sum(option.nbytes for option in choice) <= budget
    ]
    return min(losses, default=None)


def random_units(seed: int, count: int) -> list[list[Option]]:
    """Units of different sizes; some options lie above the hull, or are worse in both."""
    generator = random.Random(seed)
    return [
        [
            Option(generator.randint(1, 100) * size, generator.random() ** 3 * size)
            for _ in range(generator.randint(1, 5))
        ]
        for size in (generator.choice((1, 3, 50)) for _ in range(count))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_is_better(seed):
    units = random_units(seed, 6)
    least = sum(min(o.nbytes for o in unit) for unit in units)
    most = sum(max(o.nbytes for o in unit) for unit in units)
    for share in (0.0, 0.1, 0.33, 0.5, 0.9, 1.0):
        budget = least + int(share * (most - least))
        done = allocate(units, budget)
        picked = [unit[i] for unit, i in zip(units, done.chosen, strict=True)]
        assert sum(o.nbytes for o in picked) == done.nbytes <= budget
        assert sum(o.loss for o in picked) == pytest.approx(done.loss)
        assert done.loss == pytest.approx(best_of_all(units, budget))
        assert done.bound <= done.loss * (1 + 1e-9)


def test_a_greedy_choice_would_lose():
    # By loss saved a byte the small step comes first, and leaves no room for the large one.
    units = [[Option(0, 10.0), Option(6, 3.0)], [Option(0, 10.0), Option(10, 0.0)]]
    assert allocate(units, 10).chosen == (0, 1)


def test_what_cannot_be_is_refused():
    with pytest.raises(UsageError, match="12 bytes is the least"):
        allocate([[Option(12, 1.0), Option(20, 0.0)]], 11)


def test_thousands_of_units_are_near_the_bound():
    units = random_units(7, 4000)
    least = sum(min(o.nbytes for o in unit) for unit in units)
    done = allocate(units, int(1.3 * least))
    assert done.nbytes <= 1.3 * least
    assert done.loss <= done.bound * 1.001
