"""The schedule by hand, and normalisation with clipping."""

from __future__ import annotations

import math

import pytest
import torch

from asyncrl.config import OptimizerConfig
from asyncrl.errors import ConfigError
from asyncrl.training.optimizer import check_schedule, learning_rate, make_optimizer, normalize_and_clip


def rates(steps: int, **settings: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_schedules_by_hand() -> None:
    assert rates(4) == [1.0, 1.0, 1.0, 1.0]
    assert rates(4, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]
    assert rates(4, schedule="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(6, schedule="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5)
    assert rates(4, schedule="cosine") == pytest.approx([1.0, (1 + half) / 2, 0.5, (1 - half) / 2])


def test_steps_beyond_the_last_have_no_rate() -> None:
    assert learning_rate(OptimizerConfig(schedule="linear"), 99, 10) == 0.0


def test_a_schedule_without_an_end_is_refused() -> None:
    check_schedule(OptimizerConfig(), None)
    with pytest.raises(ConfigError, match=r"'cosine'.*Set max_steps"):
        check_schedule(OptimizerConfig(schedule="cosine"), None)


def vector(values: list[float]) -> torch.Tensor:
    parameter = torch.zeros(len(values), requires_grad=True)
    parameter.grad = torch.tensor(values)
    return parameter


def test_clip_by_hand() -> None:
    """Sums (6, 8) over 2 tokens are (3, 4): norm 5, clipped to 1."""
    parameter = vector([6.0, 8.0])
    assert normalize_and_clip([parameter], 2.0, 1.0) == pytest.approx(5.0)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)


@pytest.mark.parametrize("max_norm", [None, 100.0])
def test_no_clip_by_hand(max_norm: float | None) -> None:
    parameter = vector([6.0, 8.0])
    assert normalize_and_clip([parameter], 2.0, max_norm) == pytest.approx(5.0)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [3.0, 4.0]


def test_a_gradient_that_is_not_finite_is_left_alone() -> None:
    parameter = vector([math.inf, 8.0])
    assert math.isinf(normalize_and_clip([parameter], 2.0, 1.0))
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [math.inf, 8.0]


def test_weight_decay_spares_vectors() -> None:
    optimizer = make_optimizer([torch.ones(2, 2), torch.ones(2)], OptimizerConfig(weight_decay=0.1))
    assert [(group["params"][0].ndim, group["weight_decay"]) for group in optimizer.param_groups] == [
        (2, 0.1),
        (1, 0.0),
    ]
