"""GRPO per token: numbers worked by hand, a slow per-sample twin in plain Python, and what must never leak."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.losses import (
    TIS,
    LossInputs,
    accepted_settings,
    cross_entropy,
    importance_ratio,
    k3,
    policy_loss,
    tis_weights,
)
from tests.losses.cases import make_inputs, random_inputs


def slow_grpo(inputs: LossInputs, eps_low: float, eps_high: float, beta: float, tis: TIS | None) -> list[float]:
    """The formulas of docs/objectives.md, one token at a time."""
    losses = []
    for t in range(len(inputs.loss_mask)):
        if not inputs.loss_mask[t]:
            losses.append(0.0)
            continue
        pi, old, mu = (float(x.detach()[t]) for x in (inputs.logprobs, inputs.old_logprobs, inputs.behavior_logprobs))
        advantage = float(inputs.advantages[t])
        ratio = math.exp(max(-20.0, min(20.0, pi - old)))
        clipped = min(max(ratio, 1 - eps_low), 1 + eps_high)
        loss = max(-ratio * advantage, -clipped * advantage) * slow_weight(inputs, t, old - mu, tis)
        if beta:
            assert inputs.ref_logprobs is not None
            gap = max(-20.0, min(20.0, float(inputs.ref_logprobs[t]) - pi))
            loss += beta * (math.exp(gap) - gap - 1)
        losses.append(loss)
    return losses


def slow_weight(inputs: LossInputs, t: int, gap: float, tis: TIS | None) -> float:
    if tis is None:
        return 1.0
    mates = [
        float(inputs.old_logprobs[s] - inputs.behavior_logprobs[s])
        for s in range(len(inputs.loss_mask))
        if inputs.loss_mask[s] and inputs.sequence_ids[s] == inputs.sequence_ids[t]
    ]
    mean = sum(mates) / len(mates)
    raw = math.exp(max(-20.0, min(20.0, mean if tis.level == "sequence" else gap)))
    weight = raw if tis.cap is None else min(raw, tis.cap)
    if tis.icepop is not None and not 1 / tis.icepop <= raw <= tis.icepop:
        return 0.0
    if tis.mis is not None and not tis.mis[0] <= math.exp(max(-20.0, min(20.0, mean))) <= tis.mis[1]:
        return 0.0
    return weight


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


TIS_CASES = [
    None,
    TIS(),
    TIS(cap=1.05),
    TIS(cap=None, icepop=1.2),
    TIS(cap=1.1, level="sequence"),
    TIS(mis=(0.95, 1.04)),
]


@pytest.mark.parametrize("tis", TIS_CASES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_flat_equals_slow(tis: TIS | None, beta: float) -> None:
    inputs = random_inputs(seed=3, lengths=(5, 1, 9, 4, 7))
    fast = policy_loss("grpo", inputs, eps_low=0.1, eps_high=0.15, kl_beta=beta, tis=tis)
    assert fast.tolist() == pytest.approx(slow_grpo(inputs, 0.1, 0.15, beta, tis), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("tis", TIS_CASES[:2])
def test_gradcheck(tis: TIS | None) -> None:
    inputs = random_inputs(seed=5, lengths=(4, 6))

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return policy_loss("grpo", with_logprobs(inputs, logprobs), kl_beta=0.2, tis=tis)

    assert torch.autograd.gradcheck(loss, (inputs.logprobs.detach().requires_grad_(),))


def with_logprobs(inputs: LossInputs, logprobs: torch.Tensor) -> LossInputs:
    return LossInputs(
        logprobs,
        inputs.old_logprobs,
        inputs.behavior_logprobs,
        inputs.ref_logprobs,
        inputs.advantages,
        inputs.loss_mask,
        inputs.sequence_ids,
    )


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tis", TIS_CASES)
def test_nothing_leaks_from_behind_the_mask(garbage: float, tis: TIS | None) -> None:
    clean = random_inputs(seed=1, lengths=(6, 5, 8))
    assert not clean.loss_mask.all()
    hidden = ~clean.loss_mask
    dirty = LossInputs(
        *(
            value.detach().masked_fill(hidden, garbage)
            for value in (clean.logprobs, clean.old_logprobs, clean.behavior_logprobs)
        ),
        None if clean.ref_logprobs is None else clean.ref_logprobs.masked_fill(hidden, garbage),
        clean.advantages.masked_fill(hidden, garbage),
        clean.loss_mask,
        clean.sequence_ids,
    )
    dirty.logprobs.requires_grad_()
    losses = [policy_loss("grpo", inputs, kl_beta=0.1, tis=tis) for inputs in (clean, dirty)]
    for loss in losses:
        loss.sum().backward()
    assert torch.equal(losses[0], losses[1])
    assert clean.logprobs.grad is not None
    assert dirty.logprobs.grad is not None
    assert torch.equal(clean.logprobs.grad, dirty.logprobs.grad)
    assert torch.equal(dirty.logprobs.grad[hidden], torch.zeros(int(hidden.sum()), dtype=torch.float64))


@given(
    gap=st.sampled_from([-100.0, 100.0]),
    behavior=st.sampled_from([-100.0, 0.0, 100.0]),
    advantage=st.sampled_from([-3.0, 3.0]),
    level=st.sampled_from(["token", "sequence"]),
)
@settings(max_examples=24, deadline=None)
def test_enormous_ratios_stay_finite_in_float32(gap: float, behavior: float, advantage: float, level: str) -> None:
    zero = torch.zeros(2)
    inputs = LossInputs(
        torch.full((2,), gap, requires_grad=True),
        zero,
        zero + behavior,
        zero - gap,
        zero + advantage,
        torch.tensor([True, True]),
        torch.tensor([0, 0]),
    )
    loss = policy_loss("grpo", inputs, kl_beta=0.1, tis=TIS(level=level))  # type: ignore[arg-type]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.isfinite().all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_own_functions_are_shielded_too(garbage: float) -> None:
    inputs = make_inputs(logprobs=[-1.0, garbage], advantages=[2.0, garbage], mask=[1, 0])
    loss = policy_loss(lambda inputs: -inputs.logprobs.exp() * inputs.advantages, inputs)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([-2 * math.exp(-1), 0.0])
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == pytest.approx([-2 * math.exp(-1), 0.0])


def test_ratios_hide_what_is_masked() -> None:
    """On their own, outside `policy_loss`, too."""
    inputs = make_inputs(logprobs=[-1.0, math.nan], old=[-2.0, math.inf], mask=[1, 0])
    values = importance_ratio(inputs) + k3(inputs.logprobs, inputs.old_logprobs, inputs.loss_mask)
    values.sum().backward()
    assert values.tolist() == pytest.approx([math.e + math.exp(-1) + 1 - 1, 1.0])
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == pytest.approx([math.e - math.exp(-1) + 1, 0.0])


def test_on_policy_gradient_is_reinforce() -> None:
    """With old = pi = behaviour: the ratio is 1, and d loss / d pi = -A."""
    drawn = random_inputs(seed=2, lengths=(4, 6, 3))
    pi = drawn.logprobs.detach()
    inputs = LossInputs(
        drawn.logprobs, pi, pi, None, drawn.advantages, loss_mask=drawn.loss_mask, sequence_ids=drawn.sequence_ids
    )
    policy_loss("grpo", inputs, kl_beta=0.0).sum().backward()
    assert drawn.logprobs.grad is not None
    assert torch.allclose(drawn.logprobs.grad, -drawn.advantages * drawn.loss_mask, rtol=1e-12)


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


def test_own_function_that_reduces_is_refused() -> None:
    with pytest.raises(ConfigError, match="one number per token"):
        policy_loss(lambda inputs: inputs.logprobs.sum(), make_inputs(logprobs=[0.0, 0.0]))


def test_cross_entropy_by_hand() -> None:
    assert policy_loss(cross_entropy, make_inputs(logprobs=[-0.5, -2.0])).tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"cap": 0.0}, "silence"),
        ({"icepop": 0.5}, "at least 1"),
        ({"icepop": 2.0, "level": "sequence"}, "level 'token'"),
        ({"mis": (2.0, 1.0)}, "low < high"),
        ({"level": "group"}, "'token' or 'sequence'"),
    ],
)
def test_tis_refuses(settings_: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TIS(**settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_constants(level: Literal["token", "sequence"]) -> None:
    """Even where the anchor has a gradient, because a caller forgot to detach it."""
    inputs = random_inputs(0, (3, 5))
    inputs = replace(inputs, old_logprobs=inputs.old_logprobs.requires_grad_())
    assert not tis_weights(inputs, TIS(level=level)).requires_grad
