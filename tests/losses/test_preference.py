"""DPO and ORPO: numbers worked by hand, a slow twin that goes pair by pair, identities, and extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.losses import LossInputs, policy_loss
from asyncrl.losses.preference import dpo, dpo_metrics, orpo, orpo_metrics

Loss = Callable[[LossInputs], Tensor]


def pairs(
    chosen: Sequence[Sequence[float]],
    rejected: Sequence[Sequence[float]],
    ref_chosen: Sequence[Sequence[float]] | None = None,
    ref_rejected: Sequence[Sequence[float]] | None = None,
) -> LossInputs:
    """Pairs from the log-probs of their answers; without references the policy is its own."""

    def flat(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Tensor:
        answers = [answer for pair in zip(first, second, strict=True) for answer in pair]
        return torch.tensor([x for answer in answers for x in answer], dtype=torch.float64)

    lengths = torch.tensor([len(answer) for pair in zip(chosen, rejected, strict=True) for answer in pair])
    ids = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    logprobs = flat(chosen, rejected)
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=logprobs,
        behavior_logprobs=logprobs,
        ref_logprobs=flat(ref_chosen or chosen, ref_rejected or rejected),
        advantages=(1.0 - 2.0 * (ids % 2)).double(),
        loss_mask=torch.ones_like(ids).bool(),
        sequence_ids=ids,
        group_ids=ids // 2,
    )


def random_pairs(seed: int, lengths: Sequence[tuple[int, int]], scale: float = 1.0) -> LossInputs:
    """Pairs of answers of these lengths in shuffled order, about a third of the tokens masked."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([size for pair in lengths for size in pair])
    order = torch.randperm(len(sizes), generator=generator)
    answers = torch.repeat_interleave(order, sizes[order])
    mask = torch.rand(len(answers), generator=generator) > 0.3
    mask[torch.cat([torch.zeros(1).long(), sizes[order].cumsum(0)[:-1]])] = True  # one token at least
    logprobs = -scale * torch.rand(len(answers), generator=generator, dtype=torch.float64) - 1e-3
    size = 0.5 + torch.rand(len(answers), generator=generator, dtype=torch.float64)
    return LossInputs(
        logprobs=logprobs.requires_grad_(),
        old_logprobs=logprobs.detach(),
        behavior_logprobs=logprobs.detach(),
        ref_logprobs=-scale * torch.rand(len(answers), generator=generator, dtype=torch.float64),
        advantages=torch.where(answers % 2 == 0, size, -size),
        loss_mask=mask,
        sequence_ids=answers,
        group_ids=answers // 2,
    )


def answers_of(inputs: LossInputs, values: Tensor, group: int) -> tuple[list[float], list[float]]:
    """`values` at the loss tokens of the chosen and of the rejected answer of a pair, one token at a time."""
    sides: tuple[list[float], list[float]] = ([], [])
    assert inputs.group_ids is not None
    for t in range(len(inputs.loss_mask)):
        if inputs.loss_mask[t] and inputs.group_ids[t] == group:
            sides[int(inputs.advantages[t] < 0)].append(float(values[t]))
    return sides


def slow_dpo(inputs: LossInputs, beta: float, group: int) -> float:
    assert inputs.ref_logprobs is not None
    chosen, rejected = answers_of(inputs, inputs.logprobs.detach(), group)
    ref_chosen, ref_rejected = answers_of(inputs, inputs.ref_logprobs, group)
    margin = beta * ((sum(chosen) - sum(ref_chosen)) - (sum(rejected) - sum(ref_rejected)))
    return math.log1p(math.exp(-margin)) if margin > 0 else -margin + math.log1p(math.exp(margin))


def slow_orpo(inputs: LossInputs, odds_weight: float, group: int) -> float:
    chosen, rejected = answers_of(inputs, inputs.logprobs.detach(), group)
    p, q = (math.exp(sum(side) / len(side)) for side in (chosen, rejected))
    ratio = (p / (1 - p)) / (q / (1 - q))
    return -math.log(p) - odds_weight * math.log(1 / (1 + 1 / ratio))


def test_dpo_by_hand() -> None:
    """pi_c - ref_c = -3 + 5 = 2, pi_r - ref_r = -4 + 3 = -1: -log sigmoid(0.5 x 3) = 0.2014133, over 3 tokens."""
    inputs = pairs([[-1.0, -2.0]], [[-4.0]], [[-2.0, -3.0]], [[-3.0]])
    loss = policy_loss(dpo, inputs, beta=0.5)
    assert loss.tolist() == pytest.approx([0.2014133 / 3] * 3, abs=1e-7)
    loss.sum().backward()
    assert inputs.logprobs.grad is not None
    # d/d pi = -beta sigmoid(-1.5) = -0.5 x 0.1824255 on each chosen token, its negative on the rejected.
    assert inputs.logprobs.grad.tolist() == pytest.approx([-0.0912128, -0.0912128, 0.0912128], abs=1e-7)


def test_orpo_by_hand() -> None:
    """p = 0.5 and q = 0.2, so odds are 1 and 1/4: ln 2 - 0.1 ln(1 / (1 + 1/4)) = 0.6931472 + 0.1 x 0.2231436."""
    inputs = pairs([[math.log(0.25), 0.0]], [[math.log(0.2)]])
    loss = policy_loss(orpo, inputs)
    assert loss.sum().item() == pytest.approx(0.6931472 + 0.02231436, abs=1e-7)
    assert loss.tolist() == pytest.approx([loss.sum().item() / 3] * 3)


@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    weight=st.sampled_from([0.05, 0.1, 1.0, 3.0]),
)
@settings(max_examples=40, deadline=None)
def test_flat_equals_pair_by_pair(seed: int, lengths: list[tuple[int, int]], weight: float) -> None:
    inputs = random_pairs(seed, lengths)
    assert inputs.group_ids is not None
    for fast, slow in (
        (policy_loss(dpo, inputs, beta=weight), lambda group: slow_dpo(inputs, weight, group)),
        (policy_loss(orpo, inputs, odds_weight=weight), lambda group: slow_orpo(inputs, weight, group)),
    ):
        for group in range(len(lengths)):
            mine = inputs.loss_mask & (inputs.group_ids == group)
            assert fast[mine].sum().item() == pytest.approx(slow(group), rel=1e-9)
            assert (fast[mine].max() - fast[mine].min()).item() == pytest.approx(0, abs=1e-12)
        assert not fast[~inputs.loss_mask].any()


@pytest.mark.parametrize("loss", [dpo, orpo])
def test_gradcheck(loss: Loss) -> None:
    inputs = random_pairs(5, [(3, 2), (1, 4)])

    def of(logprobs: Tensor) -> Tensor:
        return policy_loss(loss, replace(inputs, logprobs=logprobs))

    assert torch.autograd.gradcheck(of, (inputs.logprobs.detach().requires_grad_(),))


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("door", [True, False], ids=["policy_loss", "alone"])
@pytest.mark.parametrize("loss", [dpo, orpo])
def test_nothing_leaks_from_behind_the_mask(loss: Loss, door: bool, garbage: float) -> None:
    clean = random_pairs(1, [(4, 5), (6, 3)])
    hidden = ~clean.loss_mask
    assert hidden.any()
    assert clean.ref_logprobs is not None
    dirty = replace(
        clean,
        logprobs=clean.logprobs.detach().masked_fill(hidden, garbage).requires_grad_(),
        ref_logprobs=clean.ref_logprobs.masked_fill(hidden, garbage),
        advantages=clean.advantages.masked_fill(hidden, garbage),
    )
    losses = [policy_loss(loss, inputs) if door else loss(inputs) for inputs in (clean, dirty)]
    for found in losses:
        found.sum().backward()
    assert torch.equal(losses[0], losses[1])
    assert clean.logprobs.grad is not None
    assert dirty.logprobs.grad is not None
    assert torch.equal(clean.logprobs.grad, dirty.logprobs.grad)


@pytest.mark.parametrize("gap", [-100.0, 100.0])
@pytest.mark.parametrize("loss", [dpo, orpo])
def test_gaps_of_100_nats_stay_finite_and_right_in_float32(loss: Loss, gap: float) -> None:
    """Answers of one token, e^-100 apart: -log sigmoid of a margin of +-beta 100, or of odds e^100 apart."""
    chosen, rejected = (-101.0, -1.0) if gap < 0 else (-1.0, -101.0)
    inputs = pairs([[chosen]], [[rejected]], [[-1.0]], [[-1.0]])
    inputs = replace(
        inputs,
        logprobs=inputs.logprobs.detach().float().requires_grad_(),
        ref_logprobs=torch.tensor([-1.0, -1.0]),
        advantages=inputs.advantages.float(),
    )
    value = loss(inputs).sum()
    value.backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.isfinite().all()
    odds = math.log(math.exp(-1) / (1 - math.exp(-1)))
    expected = {dpo: 0.0 if gap > 0 else 10.0, orpo: 1.0 if gap > 0 else 101 + 0.1 * (odds + 101)}[loss]  # type: ignore[index]
    assert value.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("logprob", [0.0, -1e-9, -1e-7, -1e-6, -1e-3, -0.69, -5.0, -50.0, -300.0])
def test_odds_in_float32_near_certain_and_near_impossible(logprob: float) -> None:
    """Against Python's float64, down to what float32 can tell from 1; finite at 1 itself."""
    inputs = pairs([[logprob]], [[-1.0]])
    inputs = replace(inputs, logprobs=inputs.logprobs.detach().float().requires_grad_())
    metrics = orpo_metrics(inputs).means()
    safe = min(logprob, -torch.finfo(torch.float32).eps)
    expected = safe - math.log(-math.expm1(safe)) - (-1 - math.log(-math.expm1(-1)))
    assert metrics["log_odds_ratio"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    policy_loss(orpo, inputs).sum().backward()
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.isfinite().all()


def test_dpo_at_the_reference_is_ln_2_and_its_gradient_that_of_the_margin() -> None:
    inputs = pairs([[-1.0, -0.5], [-2.0]], [[-3.0], [-1.0, -1.0, -1.0]])
    loss = policy_loss(dpo, inputs)
    assert loss.sum().item() == pytest.approx(2 * math.log(2), rel=1e-12)
    loss.sum().backward()
    assert inputs.logprobs.grad is not None
    assert torch.allclose(inputs.logprobs.grad, -0.05 * inputs.advantages, rtol=1e-12)


def test_swapping_chosen_and_rejected_adds_the_margin() -> None:
    """-log sigmoid(-m) = m - log sigmoid(m)."""
    inputs = random_pairs(7, [(3, 5)])
    swapped = replace(inputs, advantages=-inputs.advantages)
    margin = dpo_metrics(inputs).means()["reward_margin"]
    assert dpo(swapped).sum().item() == pytest.approx(dpo(inputs).sum().item() + margin, rel=1e-6)
    assert dpo_metrics(swapped).means()["reward_margin"] == pytest.approx(-margin)


def test_the_size_of_advantages_and_the_order_of_sequences_do_not_matter() -> None:
    inputs = random_pairs(3, [(3, 2), (4, 4), (1, 2)])
    order = torch.randperm(len(inputs.logprobs), generator=torch.Generator().manual_seed(0))
    moved = LossInputs(
        *(
            value[order]
            for value in (inputs.logprobs, inputs.old_logprobs, inputs.behavior_logprobs, inputs.ref_logprobs)
            if value is not None
        ),
        advantages=7 * inputs.advantages[order],
        loss_mask=inputs.loss_mask[order],
        sequence_ids=inputs.sequence_ids[order],
        group_ids=None if inputs.group_ids is None else inputs.group_ids[order],
    )
    for loss in (dpo, orpo):
        assert torch.allclose(loss(moved), loss(inputs)[order], rtol=1e-12)


def test_only_the_reference_moves_dpo_and_it_does_not_move_orpo() -> None:
    inputs = random_pairs(4, [(3, 2)])
    assert inputs.ref_logprobs is not None
    other = replace(inputs, ref_logprobs=2 * inputs.ref_logprobs)
    assert not torch.allclose(dpo(inputs), dpo(other))
    assert torch.equal(orpo(inputs), orpo(replace(inputs, ref_logprobs=None)))


def test_metrics_by_hand() -> None:
    """Margins 0.1 x (1 - -1) = 0.2 and 0.1 x (-1 - 1) = -0.2, and a tie: accuracy (1 + 0 + 0.5) / 3."""
    inputs = pairs(
        [[-1.0], [-3.0], [-2.0]], [[-3.0], [-1.0], [-2.0]], [[-2.0], [-2.0], [-2.0]], [[-2.0], [-2.0], [-2.0]]
    )
    metrics = dpo_metrics(inputs)
    assert metrics.tokens == 3
    assert metrics.means() == pytest.approx(
        {"reward_accuracy": 0.5, "reward_chosen": 0.0, "reward_margin": 0.0, "reward_rejected": 0.0}, abs=1e-7
    )
    first = dpo_metrics(pairs([[-1.0]], [[-3.0]], [[-2.0]], [[-2.0]])).means()
    assert first == pytest.approx(
        {"reward_accuracy": 1.0, "reward_chosen": 0.1, "reward_margin": 0.2, "reward_rejected": -0.1}
    )
    odds = orpo_metrics(pairs([[math.log(0.5)]], [[math.log(0.2)]])).means()
    assert odds["log_odds_ratio"] == pytest.approx(math.log(4))
    assert odds["nll_chosen"] == pytest.approx(math.log(2))
    assert odds["reward_chosen"] == pytest.approx(0.1 * math.log(0.5))


def test_sums_of_parts_add_up_to_the_whole() -> None:
    parts = [random_pairs(seed, [(3, 2), (2, 2)]) for seed in (0, 1)]
    total = dpo_metrics(parts[0]) + dpo_metrics(parts[1])
    means = [dpo_metrics(part).means()["reward_margin"] for part in parts]
    assert total.means()["reward_margin"] == pytest.approx(sum(means) / 2)


def test_what_is_no_pair_is_refused() -> None:
    inputs = random_pairs(0, [(3, 2), (2, 2)])
    only_chosen = replace(inputs, loss_mask=inputs.loss_mask & ((inputs.advantages > 0) | (inputs.group_ids == 0)))
    three = replace(inputs, group_ids=torch.zeros_like(inputs.sequence_ids))
    neither = replace(inputs, advantages=torch.where(inputs.sequence_ids == 2, 0.0, inputs.advantages))
    for loss in (dpo, orpo):
        with pytest.raises(ConfigError, match="group 1 of the microbatch has 1 chosen and 0 rejected"):
            loss(only_chosen)
        with pytest.raises(ConfigError, match="group 0 of the microbatch has 2 chosen and 2 rejected"):
            loss(three)
        with pytest.raises(ConfigError, match=r"group 1 .* 0 chosen and 1 rejected .* 1 with an advantage of 0"):
            loss(neither)
        with pytest.raises(ConfigError, match=r"have none. Give both sequences of a pair the same `group`"):
            loss(replace(inputs, group_ids=None))


def test_dpo_without_a_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no reference log-probs.*or use orpo"):
        dpo(replace(random_pairs(0, [(2, 2)]), ref_logprobs=None))


@pytest.mark.parametrize("value", [0.0, -0.1, math.inf, math.nan])
def test_weights_that_prefer_nothing_are_refused(value: float) -> None:
    inputs = random_pairs(0, [(2, 2)])
    with pytest.raises(ConfigError, match="beta is"):
        dpo(inputs, beta=value)
    with pytest.raises(ConfigError, match="odds_weight is"):
        orpo(inputs, odds_weight=value)
