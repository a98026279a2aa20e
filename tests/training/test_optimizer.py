"""The schedule by hand, and normalisation with clipping."""

from __future__ import annotations

import math
import sys
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

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


def test_a_floor_by_hand() -> None:
    """A quarter of the rate is kept; the rest falls."""
    assert rates(4, schedule="linear", min_rate_ratio=0.25) == pytest.approx([1.0, 0.8125, 0.625, 0.4375])
    assert rates(4, schedule="linear", min_rate_ratio=1.0) == [1.0] * 4
    assert rates(4, min_rate_ratio=0.5) == [1.0] * 4
    floor = OptimizerConfig(learning_rate=2.0, schedule="cosine", min_rate_ratio=0.25)
    assert learning_rate(floor, 99, 10) == pytest.approx(0.5)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9)])
def test_a_mean_that_never_moves_is_refused(betas: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="betas"):
        OptimizerConfig(betas=betas)


def test_one_step_of_adamw_by_hand() -> None:
    """The first step goes by the rate, whatever the gradient's size; the decay is a share of the weight."""
    weight = torch.nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer = make_optimizer([weight], OptimizerConfig(learning_rate=0.1, weight_decay=0.5))
    weight.grad = torch.tensor([[3.0, -0.001]])
    optimizer.step()
    assert weight.tolist()[0] == pytest.approx([2.0 * 0.95 - 0.1, -1.0 * 0.95 + 0.1], rel=1e-4)


def regression(bits: Literal[32, 8], rate: float = 3e-3, steps: int = 300) -> tuple[list[float], torch.optim.Optimizer]:
    """Losses of learning a random linear map with a hidden layer, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    inputs, target = torch.randn(256, 64, generator=generator), torch.randn(64, 64, generator=generator) / 8
    first, second = (torch.nn.Parameter(torch.randn(64, 64, generator=generator) / 8) for _ in range(2))
    offset = torch.nn.Parameter(torch.zeros(64))
    optimizer = make_optimizer([first, second, offset], OptimizerConfig(learning_rate=rate, state_bits=bits))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = ((inputs @ first @ second + offset - inputs @ target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, optimizer


def state_bytes(optimizer: torch.optim.Optimizer, ndim: int) -> int:
    """Of the means of all parameters of so many dimensions, with what is stored beside them for each block."""
    return sum(
        value.nbytes
        for parameter, state in optimizer.state.items()
        if parameter.ndim == ndim
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and not name.startswith("qmap")  # one for all
    )


def test_states_of_8_bits_learn_the_same() -> None:
    pytest.importorskip("bitsandbytes")
    (exact, plain), (found, small) = regression(32), regression(8)
    assert exact[-1] < exact[0] / 50
    assert found[-1] < exact[0] / 50
    assert found[:50] == pytest.approx(exact[:50], rel=0.05)
    assert state_bytes(small, ndim=2) < 0.27 * state_bytes(plain, ndim=2)
    assert state_bytes(small, ndim=1) == state_bytes(plain, ndim=1)


def test_vectors_keep_32_bits_however_long() -> None:
    pytest.importorskip("bitsandbytes")
    parameters = [torch.nn.Parameter(torch.ones(5000)), torch.nn.Parameter(torch.ones(100, 50))]
    optimizer = make_optimizer(parameters, OptimizerConfig(state_bits=8))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [optimizer.state[parameter]["state1"].dtype for parameter in parameters] == [torch.float32, torch.uint8]


def test_decay_of_8_bits_is_that_of_32() -> None:
    pytest.importorskip("bitsandbytes")
    weights = []
    for bits in (32, 8):
        weight = torch.nn.Parameter(torch.ones(64, 64))
        optimizer = make_optimizer(
            [weight], OptimizerConfig.model_validate({"learning_rate": 0.1, "weight_decay": 0.5, "state_bits": bits})
        )
        weight.grad = torch.linspace(-1, 1, 4096).view(64, 64)
        optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-4)


def test_8_bits_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"needs `bitsandbytes`.*pip install 'asyncrl\[8bit\]'"):
        make_optimizer([torch.ones(2, 2)], OptimizerConfig(state_bits=8))


def test_8_bits_on_a_device_without_them() -> None:
    with pytest.raises(ConfigError, match=r"does not have on meta, only on cuda and cpu\. Use 32"):
        make_optimizer([torch.ones(2, 2, device="meta")], OptimizerConfig(state_bits=8))
