"""What is made of the rewards of an evaluation, by hand."""

from __future__ import annotations

import math
import random

import pytest

from asyncrl.rollout.estimate import Estimate, EvalResult


def test_the_mean_is_over_rows() -> None:
    """A row with many rollouts counts as much as one with few; one with none does not count."""
    result = EvalResult(per_row={0: [3.0, 3.0, 3.0, 0.0], 1: [0.25], 2: []}, failed=3)
    assert (result.n, result.mean) == (5, 1.25)
    half_width = 1.96 * math.sqrt((2 * 1.0**2) / 1 / 2)
    assert (result.ci_low, result.ci_high) == pytest.approx((1.25 - half_width, 1.25 + half_width))
    assert str(result) == "1.250 [-0.710, 3.210] (5 rollouts, 3 failed)"


def test_too_few_rows_have_no_interval() -> None:
    assert math.isnan(EvalResult(per_row={0: []}).mean)
    one = Estimate.over([5.0])
    assert one.mean == 5.0
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert str(one) == "5.000"


@pytest.mark.parametrize(
    ("solved", "of", "low", "high"), [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433)]
)
def test_zeros_and_ones_have_wilsons_interval(solved: int, of: int, low: float, high: float) -> None:
    """Numbers as statistics packages give them."""
    found = Estimate.over([1.0] * solved + [0.0] * (of - solved))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("samples", [1, 4])
def test_the_interval_holds_the_truth_as_often_as_it_says(share: float, samples: int) -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(400):
        rows = [sum(rng.random() < share for _ in range(samples)) / samples for _ in range(60)]
        found = Estimate.over(rows)
        held += found.low <= share <= found.high
    assert 0.90 <= held / 400 <= 1.0


def test_pass_at_k_by_hand() -> None:
    """4 rollouts, 1 right: two of them miss it in C(3, 2) of C(4, 2) cases. 4 of which 3 are right: never."""
    result = EvalResult(per_row={0: [1.0, 0.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0, 1.0], 2: [1.0]})
    assert result.pass_at(1).mean == pytest.approx((0.25 + 0.75 + 1) / 3)
    two = result.pass_at(2)
    assert (two.mean, two.rows) == (0.75, 2)
    assert result.pass_at(4).mean == 1.0
    assert math.isnan(result.pass_at(5).mean)
    assert list(result.passes()) == [1, 2, 4]
    assert EvalResult(per_row={0: [1.0], 1: [0.0]}).passes() == {}


def test_what_counts_as_solved() -> None:
    result = EvalResult(per_row={0: [0.6, 0.4], 1: [0.9, 0.2]})
    assert result.pass_at(1).mean == 0.0
    assert result.pass_at(1, solved=0.5).mean == 0.5
    assert result.pass_at(2, solved=0.5).mean == 1.0
