"""The bound on the disk: never exceeded, and nobody waits for ever under the smallest one."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nf4cli.convert.transfers import Transfers
from nf4cli.hub.budget import Budget, Step, smallest
from nf4cli.threads import run


@st.composite
def runs(draw):
    """(steps, sizes of outputs): outputs in the order of the source, with a few strays."""
    sizes = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    names = [f"o{i}" for i in range(len(sizes))]
    count = draw(st.integers(1, 8))
    steps = []
    for _ in range(count):
        outputs = draw(st.sets(st.sampled_from(names), max_size=3))
        steps.append(Step(draw(st.integers(0, 50)), frozenset(outputs)))
    used = frozenset().union(*(step.outputs for step in steps))
    return steps, {name: size for name, size in zip(names, sizes, strict=True) if name in used}


@given(runs(), st.integers(0, 20), st.integers(0, 30), st.randoms(use_true_random=False))
def test_every_step_is_admitted_and_the_bound_holds(run, base, spare, random):
    steps, sizes = run
    limit = smallest(steps, sizes, base, leaving=True) + spare
    transfers = Transfers()
    budget = Budget(limit, sizes, base, leaving=True, transfers=transfers)
    waiting, active, uploading = list(range(len(steps))), [], []
    last = {name: max(i for i, s in enumerate(steps) if name in s.outputs) for name in sizes}
    done: set[int] = set()
    while waiting or active or uploading:
        choices = ["finish"] * bool(active) + ["upload"] * bool(uploading)
        admitted = bool(waiting) and random.random() < 0.8 and budget.try_admit(steps[waiting[0]])
        if admitted:
            active.append(waiting.pop(0))
        elif choices:
            if random.choice(choices) == "finish":
                number = active.pop(random.randrange(len(active)))
                done.add(number)
                budget.source_gone(steps[number])
                uploading += [
                    name
                    for name in steps[number].outputs
                    if all(i in done for i, s in enumerate(steps) if name in s.outputs)
                ]
            else:
                budget.output_gone(uploading.pop(random.randrange(len(uploading))))
        else:  # nobody is left who could give anything back
            assert budget.try_admit(steps[waiting[0]]), "a step waits for ever"
            active.append(waiting.pop(0))
        assert transfers.disk <= limit
    assert transfers.disk == base
    assert transfers.most_disk <= limit
    assert set(last) == set(sizes)


@given(runs(), st.integers(0, 20))
def test_what_stays_is_reserved_at_once(run, base):
    steps, sizes = run
    limit = smallest(steps, sizes, base, leaving=False)
    transfers = Transfers()
    budget = Budget(limit, sizes, base, leaving=False, transfers=transfers)
    for step in steps:
        assert budget.try_admit(step)
        budget.source_gone(step)
    assert transfers.disk == base + sum(sizes.values())


def test_one_byte_less_than_the_smallest_does_not_do():
    steps = [Step(10, frozenset({"a"})), Step(20, frozenset({"a", "b"}))]
    sizes = {"a": 5, "b": 7}
    need = smallest(steps, sizes, 3, leaving=True)
    assert need == 3 + 20 + 5 + 7
    budget = Budget(need - 1, sizes, 3, leaving=True, transfers=Transfers())
    assert budget.try_admit(steps[0])
    budget.source_gone(steps[0])
    assert not budget.try_admit(steps[1])


def test_an_output_that_was_begun_counts_until_its_last_step():
    steps = [Step(10, frozenset({"a"})), Step(10, frozenset({"b"}))]
    sizes = {"a": 5, "b": 7}
    assert smallest(steps, sizes, 0, leaving=True) == 17
    assert smallest(steps, sizes, 0, leaving=True, begun={"b"}) == 22


@pytest.mark.parametrize("fail", [False, True])
def test_who_waits_is_woken(fail):
    steps = [Step(10, frozenset({"a"})), Step(10, frozenset({"b"}))]
    budget = Budget(12, {"a": 1, "b": 1}, 0, leaving=True, transfers=Transfers())
    assert budget.admit(steps[0])
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(budget.admit(steps[1])))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    if fail:
        budget.fail()
    else:
        budget.source_gone(steps[0])
    thread.join(10)
    assert answers == [not fail]


def test_without_a_bound_nobody_waits():
    transfers = Transfers()
    budget = Budget(None, {"a": 10**15}, 0, leaving=True, transfers=transfers)
    assert budget.admit(Step(10**15, frozenset({"a"})))
    assert transfers.most_disk == 2 * 10**15


def test_a_failure_wakes_the_worker_that_waits_for_the_next_item():
    """As one waits for a file of a Hub, or for room, which another worker would have made."""
    waits, woken, answers = threading.Event(), threading.Event(), []

    def items():
        yield 1
        waits.set()
        answers.append(woken.wait(5))

    def work(item):
        waits.wait(5)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        run(items(), lambda: work, 2, woken.set)
    assert answers == [True]
