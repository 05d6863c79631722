"""What weights are expected to lose in the common format, and in others."""

from __future__ import annotations

import numpy as np
import pytest

from nf4cli.convert.measure_errors import WeightError
from nf4cli.quality.expected_losses import ExpectedLosses
from nf4cli.quality.sensitivity import Sensitivity

SHARES = {32: {"lucky": 0.0, "steady": 4.0}, 64: {"lucky": 3.0, "steady": 5.0},
          128: {"lucky": 3.0, "steady": 7.0}}  # fmt: skip
SQUARES = {32: 0.8, 64: 1.0, 128: 1.2}


ERRORS = {
    (b, nested): {name: WeightError(100 * SQUARES[b] + nested, 1e4) for name in SHARES[32]}
    for b in SQUARES
    for nested in (True, False)
}


@pytest.fixture
def losses():
    """Of two weights; with blocksize 32, the errors of `lucky` happen to undo those of `steady`."""
    spread = np.array([0.9, 1.1])  # of two windows of text
    sensitivity = Sensitivity(
        {name: np.ones(2) for name in SHARES[32]},
        {b: {name: share * spread for name, share in by.items()} for b, by in SHARES.items()},
        {b: 0.9 * sum(by.values()) * spread for b, by in SHARES.items()},
        64,
    )
    return ExpectedLosses(sensitivity, ERRORS, nested=False)


@pytest.mark.parametrize("most", [32, 64, 128])
def test_a_share_holds_where_most_weights_have_its_format(losses, most):
    for name, share in SHARES[most].items():
        assert losses.of(name, (most, False), most) == pytest.approx(0.9 * share)


@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_all_weights_in_one_format_lose_what_was_measured(losses, blocksize):
    for most in (32, 64, 128):
        whole = sum(losses.of(name, (blocksize, False), most) for name in SHARES[blocksize])
        assert whole == pytest.approx(0.9 * sum(SHARES[blocksize].values()))


def test_luck_does_not_pass_to_another_format(losses):
    """Of three blocksizes, `lucky` loses 0, 3/8 and 3/10 of the whole: in any other, 0.225."""
    part = np.mean([0, 3 / 8 / 1.0, 3 / 10 / 1.2])
    other = np.mean([1 / 0.8, 5 / 8, 7 / 10 / 1.2])
    expected = 0.9 * 8 * part / (part + other)
    assert losses.of("lucky", (64, False), 32) == pytest.approx(expected)
    assert losses.of("lucky", (32, False), 32) == 0


def test_nested_scales_add_their_error(losses):
    assert losses.of("steady", (32, True), 32) == pytest.approx(0.9 * 4 * 81 / 80)
    assert losses.of("steady", (64, True), 32) == pytest.approx(
        losses.of("steady", (64, False), 32) * 1.01
    )


def test_a_window_where_shares_do_not_add_up_says_nothing_of_weights():
    """In the last window the model breaks with blocksize 128: a divergence that no sum explains."""
    spread = np.array([0.9, 1.1, 0.9, 1.1])
    shares = {b: {name: share * spread for name, share in by.items()} for b, by in SHARES.items()}
    whole = {b: sum(by.values()) * spread for b, by in SHARES.items()}
    usual = ExpectedLosses(Sensitivity(shares[64], shares, whole, 64), ERRORS, nested=False)
    shares[128] = {"lucky": np.array([2.7, 3.3, 2.7, -40]), "steady": np.array([6.3, 7.7, 6.3, 90])}
    whole[128] = np.array([9, 11, 9, 300.0])
    broken = ExpectedLosses(Sensitivity(shares[64], shares, whole, 64), ERRORS, nested=False)
    for name in SHARES[32]:
        for blocksize in (32, 64):
            assert broken.of(name, (blocksize, False), 32) == pytest.approx(
                usual.of(name, (blocksize, False), 32)
            )
    # What the model loses there is lost all the same.
    assert sum(broken.of(name, (128, False), 128) for name in SHARES[32]) == pytest.approx(
        whole[128].mean()
    )


def test_what_windows_say_has_the_expected_mean(losses):
    for most in (32, 64):
        samples = losses.samples("steady", (32, True), most)
        assert samples.shape == (losses.windows,)
        assert samples.mean() == pytest.approx(losses.of("steady", (32, True), most))
        assert samples[1] / samples[0] == pytest.approx(1.1 / 0.9)
