"""What is made of the rewards of an evaluation, by hand."""

from __future__ import annotations

import math

import pytest

from asyncrl.rollout.evaluation import Estimate, EvalResult


def test_the_mean_is_over_rows() -> None:
    """A row with many rollouts counts as much as one with few; one with none does not count."""
    result = EvalResult(per_row={0: [1.0, 1.0, 1.0, 0.0], 1: [0.25], 2: []}, failed=3)
    assert (result.n, result.mean) == (5, 0.5)
    half_width = 1.96 * math.sqrt((2 * 0.25**2) / 1 / 2)
    assert (result.ci_low, result.ci_high) == pytest.approx((0.5 - half_width, 0.5 + half_width))


def test_too_few_rows_have_no_interval() -> None:
    assert math.isnan(EvalResult(per_row={0: []}).mean)
    one = Estimate.over([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_pass_at_k_by_hand() -> None:
    """4 rollouts, 1 right: two of them miss it in C(3, 2) of C(4, 2) cases. 4 of which 3 are right: never."""
    result = EvalResult(per_row={0: [1.0, 0.0, 0.0, 0.0], 1: [1.0, 1.0, 0.0, 1.0], 2: [1.0]})
    assert result.pass_at(1).mean == pytest.approx((0.25 + 0.75 + 1) / 3)
    two = result.pass_at(2)
    assert (two.mean, two.rows) == (0.75, 2)
    assert result.pass_at(4).mean == 1.0
    assert math.isnan(result.pass_at(5).mean)


def test_what_counts_as_solved() -> None:
    result = EvalResult(per_row={0: [0.6, 0.4], 1: [0.9, 0.2]})
    assert result.pass_at(1).mean == 0.0
    assert result.pass_at(1, solved=0.5).mean == 0.5
    assert result.pass_at(2, solved=0.5).mean == 1.0
