"""Objectives that compare two answers to one prompt: DPO and ORPO.

A pair is a group of two sequences: the chosen one has a positive advantage on its loss tokens, the rejected one a
negative advantage; only the sign is read. N tokens, P pairs. A pair has one loss; it is given to the pair's loss
tokens in equal parts, so that the objectives are [N] like all others and the parts of a pair add up to its loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from asyncrl.errors import ConfigError
from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.metrics import MetricSums


def dpo(inputs: LossInputs, *, beta: float = 0.1) -> Tensor:
    """Direct preference optimization, arXiv:2305.18290, equation 7. [N]

        -log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r)))

    with the sums of log-probs over the loss tokens of the chosen (c) and the rejected answer (r).
    """
    return _spread(-logsigmoid(_dpo_rewards(inputs, beta).margin), inputs)


def orpo(inputs: LossInputs, *, odds_weight: float = 0.1) -> Tensor:
    """Odds ratio preference optimization, arXiv:2403.07691, equations 4, 6 and 7. [N]

        -pi_c - odds_weight log sigmoid(log odds(pi_c) - log odds(pi_r)),   odds(p) = p / (1 - p)

    with the means of log-probs over the loss tokens of the chosen (c) and the rejected answer (r). No reference.
    """
    _check_weight("odds_weight", odds_weight)
    means = _means(inputs)
    odds = _Sides(_log_odds(means.chosen), _log_odds(means.rejected))
    return _spread(-means.chosen - odds_weight * logsigmoid(odds.margin), inputs)


@torch.no_grad()
def dpo_metrics(inputs: LossInputs, *, beta: float = 0.1) -> MetricSums:
    """Sums over pairs. A reward is beta (pi - ref), summed over the answer; accuracy is how often the chosen one
    has the higher reward (half where they are equal, as they all are before the first step)."""
    return _sums(inputs, _reward_metrics(_dpo_rewards(inputs, beta)))


@torch.no_grad()
def orpo_metrics(inputs: LossInputs, *, odds_weight: float = 0.1) -> MetricSums:
    """Sums over pairs. A reward is odds_weight times the mean log-prob of the answer; `log_odds_ratio` is what the
    objective raises, `nll_chosen` the mean negative log-prob of the chosen answer."""
    means = _means(inputs)
    metrics = _reward_metrics(_Sides(odds_weight * means.chosen, odds_weight * means.rejected))
    ratio = _log_odds(means.chosen) - _log_odds(means.rejected)
    return _sums(inputs, {**metrics, "log_odds_ratio": ratio, "nll_chosen": -means.chosen})


@dataclass(frozen=True, slots=True)
class _Sides:
    """A number for each answer of each pair, both [P]."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


def _dpo_rewards(inputs: LossInputs, beta: float) -> _Sides:
    _check_weight("beta", beta)
    if inputs.ref_logprobs is None:
        raise ConfigError(
            "dpo compares the policy with a reference model, but there are no reference log-probs. Make the trainer "
            "with reference=True and pass reference=True to forward_backward_custom, or use orpo, which needs none."
        )
    _check_pairs(inputs)
    sums = _side_sums(inputs.logprobs - inputs.ref_logprobs, inputs)
    return _Sides(beta * sums.chosen, beta * sums.rejected)


def _means(inputs: LossInputs) -> _Sides:
    """Mean log-prob of each answer."""
    _check_pairs(inputs)
    sums = _side_sums(inputs.logprobs, inputs)
    counts = _side_sums(torch.ones_like(inputs.logprobs, requires_grad=False), inputs)
    # A group without loss tokens has no place in the result; 1 keeps NaN out of its gradient.
    return _Sides(sums.chosen / counts.chosen.clamp(min=1), sums.rejected / counts.rejected.clamp(min=1))


def _log_odds(logprob: Tensor) -> Tensor:
    """log p - log(1 - p) from log p <= 0.

    1 - p is -expm1(log p): exact near p = 1, where 1 - exp(log p) would be 0. For tiny p it rounds to 1, and what
    is lost is p itself beside log p. At p = 1 within rounding the odds are those of 1 - eps, and have no gradient.
    """
    safe = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return safe - torch.log(-torch.expm1(safe))


def _reward_metrics(rewards: _Sides) -> dict[str, Tensor]:
    margin = rewards.margin
    return {
        "reward_chosen": rewards.chosen,
        "reward_rejected": rewards.rejected,
        "reward_margin": margin,
        "reward_accuracy": (margin.sign() + 1) / 2,
    }


def _sums(inputs: LossInputs, values: dict[str, Tensor]) -> MetricSums:
    """Sums of [P] over the pairs that have loss tokens."""
    there = _side_sums(torch.ones_like(inputs.logprobs, requires_grad=False), inputs).chosen > 0  # [P]
    stacked = torch.stack([value.float() for value in values.values()])  # [metrics, P]
    sums = torch.where(there, stacked, 0.0).sum(dim=1)  # [metrics]
    return MetricSums(there.sum().float(), dict(zip(values, sums.unbind(), strict=True)))


def _side_sums(values: Tensor, inputs: LossInputs) -> _Sides:
    """Sums of [N] over the loss tokens of each answer."""
    groups = _groups(inputs)
    size = int(groups.max()) + 1 if groups.numel() else 0  # P
    places = 2 * groups + (inputs.advantages < 0).long()  # [N]
    sums = torch.zeros(2 * size, dtype=values.dtype, device=values.device)  # [2 P]
    sums = sums.index_add(0, places, torch.where(inputs.loss_mask.bool(), values, 0.0))
    chosen, rejected = sums.view(size, 2).unbind(dim=1)
    return _Sides(chosen, rejected)


def _spread(pair_losses: Tensor, inputs: LossInputs) -> Tensor:
    """The loss [P] of each pair in equal parts on its loss tokens, [N]."""
    counts = _side_sums(torch.ones_like(inputs.logprobs, requires_grad=False), inputs)
    shares = pair_losses / (counts.chosen + counts.rejected).clamp(min=1)  # [P]
    return torch.where(inputs.loss_mask.bool(), shares[_groups(inputs)], 0.0)


def _groups(inputs: LossInputs) -> Tensor:
    if inputs.group_ids is None:
        raise ConfigError(
            "preference objectives read which sequences form a pair from group_ids, and these inputs have none. "
            "Give both sequences of a pair the same `group`."
        )
    return inputs.group_ids


def _check_weight(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {value:g}. Expected a number above 0: otherwise nothing is preferred.")


def _check_pairs(inputs: LossInputs) -> None:
    """Raises `ConfigError` unless each group with loss tokens is one chosen and one rejected sequence."""
    groups, mask = _groups(inputs), inputs.loss_mask.bool()
    # One column per sequence that has loss tokens: (group, sign of the advantage, sequence).
    keys = torch.stack([groups, torch.sign(inputs.advantages).long(), inputs.sequence_ids])[:, mask]  # [3, N]
    rows: list[list[int]] = torch.unique(keys, dim=1).T.tolist()
    signs: dict[int, list[int]] = {}
    for group, sign, _ in rows:
        signs.setdefault(group, []).append(sign)
    for group, found in signs.items():
        if found != [-1, 1]:
            chosen, rejected, neither = (found.count(sign) for sign in (1, -1, 0))
            raise ConfigError(
                f"group {group} of the microbatch has {chosen} chosen and {rejected} rejected sequences with loss "
                f"tokens{f', and {neither} with an advantage of 0' if neither else ''}. Expected one of each: "
                "advantage 1 on the chosen, -1 on the rejected, the same `group` for both, and whole_groups=True."
            )
