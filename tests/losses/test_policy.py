"""The door: objectives by name or by function, their settings, and GRPO in numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from asyncrl.errors import ConfigError
from asyncrl.losses import (
    TIS,
    LossInputs,
    accepted_settings,
    cross_entropy,
    policy_loss,
)
from tests.losses.cases import make_inputs


def test_grpo_by_hand() -> None:
    """r = 1.5, 0.5, 1.1 with A = 2, -1, 1: clipped above at 1.2, clipped below at 0.8, not clipped."""
    inputs = make_inputs(
        logprobs=[math.log(0.6), math.log(0.1), math.log(0.55)],
        old=[math.log(0.4), math.log(0.2), math.log(0.5)],
        advantages=[2.0, -1.0, 1.0],
    )
    loss = policy_loss("grpo", inputs, kl_beta=0.0, tis=None)
    assert loss.tolist() == pytest.approx([-2.4, 0.8, -1.1])
    loss.sum().backward()
    # Only the third token is inside the clip: d(-r A)/d pi = -r A.
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == pytest.approx([0.0, 0.0, -1.1])


def test_pessimistic_branch_by_hand() -> None:
    """A ratio outside the clip on the side that makes the loss worse is not clipped: r = 1.5 with A = -1."""
    inputs = make_inputs(logprobs=[math.log(0.6)], old=[math.log(0.4)], advantages=[-1.0])
    loss = policy_loss("grpo", inputs, kl_beta=0.0, tis=None)
    assert loss.item() == pytest.approx(1.5)


def test_asymmetric_clip_by_hand() -> None:
    inputs = make_inputs(logprobs=[math.log(0.6)], old=[math.log(0.4)], advantages=[1.0])
    assert policy_loss("grpo", inputs, kl_beta=0.0, tis=None, eps_high=0.28).item() == pytest.approx(-1.28)


def test_kl_by_hand() -> None:
    """pi = 0.5, ref = 0.25: k3 = 0.5 - ln 0.5 - 1 = 0.193147."""
    inputs = make_inputs(logprobs=[math.log(0.5)], advantages=[0.0], ref=[math.log(0.25)])
    assert policy_loss("grpo", inputs, kl_beta=2.0).item() == pytest.approx(2 * 0.19314718)


def test_tis_multiplies_the_policy_term_only() -> None:
    """old / behaviour = 10, capped at 5; the KL is not weighted."""
    inputs = make_inputs(logprobs=[math.log(0.5)], behavior=[math.log(0.05)], advantages=[1.0], ref=[math.log(0.25)])
    loss = policy_loss("grpo", inputs, kl_beta=1.0, tis=TIS(cap=5.0))
    assert loss.item() == pytest.approx(-5.0 + 0.19314718)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_own_functions_are_shielded_too(garbage: float) -> None:
    inputs = make_inputs(logprobs=[-1.0, garbage], advantages=[2.0, garbage], mask=[1, 0])
    loss = policy_loss(lambda inputs: -inputs.logprobs.exp() * inputs.advantages, inputs)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-2 * math.exp(-1), 0.0])
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == pytest.approx([-2 * math.exp(-1), 0.0])


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'grop'.*grpo"):
        policy_loss("grop", make_inputs(logprobs=[0.0]))


def test_unknown_setting_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no setting epsilon.*eps_low, eps_high, kl_beta, tis"):
        policy_loss("grpo", make_inputs(logprobs=[0.0]), epsilon=0.1)


def test_kl_without_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match="no reference log-probs"):
        policy_loss("grpo", make_inputs(logprobs=[0.0]), kl_beta=0.1)


def test_own_function_gets_clean_inputs_and_only_its_settings() -> None:
    seen = []

    def mine(inputs: LossInputs, *, eps_low: float) -> torch.Tensor:
        seen.append(eps_low)
        return -inputs.logprobs * inputs.advantages

    inputs = make_inputs(logprobs=[-1.0, math.nan], advantages=[2.0, 1.0], mask=[1, 0])
    given_settings = accepted_settings(mine, {"eps_low": 0.3, "kl_beta": 0.1})
    assert policy_loss(mine, inputs, **given_settings).tolist() == [2.0, 0.0]
    assert seen == [0.3]


def test_own_function_that_needs_more_is_refused() -> None:
    def mine(inputs: LossInputs, *, eps_low: float, strength: float) -> torch.Tensor:
        return -inputs.logprobs * eps_low * strength

    with pytest.raises(ConfigError, match=r"mine needs strength, which is not set"):
        accepted_settings(mine, {"eps_low": 0.3})


def test_own_function_by_reference(tmp_path: Path) -> None:
    (tmp_path / "my_losses.py").write_text("def mine(inputs):\n    return -inputs.logprobs * 3\n")
    inputs = make_inputs(logprobs=[-1.0, -2.0])
    assert policy_loss(f"{tmp_path}/my_losses.py:mine", inputs).tolist() == [3.0, 6.0]
    with pytest.raises(ConfigError, match=r"policy_loss: .*has no function 'mime'. Did you mean 'mine'"):
        policy_loss(f"{tmp_path}/my_losses.py:mime", inputs)


def test_own_function_that_reduces_is_refused() -> None:
    with pytest.raises(ConfigError, match="one number per token"):
        policy_loss(lambda inputs: inputs.logprobs.sum(), make_inputs(logprobs=[0.0, 0.0]))


def test_cross_entropy_by_hand() -> None:
    assert policy_loss(cross_entropy, make_inputs(logprobs=[-0.5, -2.0])).tolist() == [0.5, 2.0]
