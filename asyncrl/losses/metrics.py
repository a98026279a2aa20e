"""What is reported of an objective: means over the loss tokens of a whole optimizer batch.

A microbatch gives sums (still on the device: nothing waits for it); sums add up; means come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.ratios import TIS, importance_ratio, k3, raw_tis_weights, tis_weights


@dataclass(frozen=True, slots=True)
class MetricSums:
    """Sums over loss tokens under their names, and how many tokens there were."""

    tokens: Tensor
    sums: dict[str, Tensor]

    def __add__(self, other: MetricSums) -> MetricSums:
        names = self.sums.keys() | other.sums.keys()
        zero = torch.zeros_like(self.tokens)
        return MetricSums(
            self.tokens + other.tokens,
            {name: self.sums.get(name, zero) + other.sums.get(name, zero) for name in names},
        )

    def means(self) -> dict[str, float]:
        """The metrics. Empty where there was no loss token."""
        names = sorted(self.sums)
        tokens, *values = torch.stack([self.tokens, *(self.sums[name] for name in names)]).tolist()
        if tokens == 0:
            return {}
        metrics = {name: value / tokens for name, value in zip(names, values, strict=True)}
        square = metrics.pop("tis_weight_square", 0.0)
        if square > 0:
            metrics["ess"] = metrics["tis_weight_mean"] ** 2 / square
        return metrics


@torch.no_grad()
def metric_sums(
    inputs: LossInputs,
    *,
    eps_low: float,
    eps_high: float | None = None,
    tis: TIS | None = None,
    entropy: Tensor | None = None,
) -> MetricSums:
    """Sums of one microbatch; `entropy` is [N] where it is known.

    ppo_kl, ref_kld, behavior_kl: k3 between policy and anchor, policy and reference, anchor and sampler.
    clip_frac_low, clip_frac_high: share of tokens whose clipped branch is the one that counts.
    ess: effective sample size of the weights, (sum w)^2 / (n sum w^2), 1 where all are equal.
    """
    inputs = inputs.cleaned()
    mask, advantages = inputs.loss_mask, inputs.advantages
    ratio = importance_ratio(inputs)  # [N]
    raw = raw_tis_weights(inputs, "token" if tis is None else tis.level)  # [N]
    weights = tis_weights(inputs, tis)  # [N]
    high = 1 + (eps_low if eps_high is None else eps_high)
    values = {
        "ppo_kl": k3(inputs.old_logprobs, inputs.logprobs, mask),
        "behavior_kl": k3(inputs.behavior_logprobs, inputs.old_logprobs, mask),
        "clip_frac_low": (ratio < 1 - eps_low) & (advantages < 0),
        "clip_frac_high": (ratio > high) & (advantages > 0),
        "ratio_mean": ratio,
        "tis_weight_mean": weights,
        "tis_weight_square": weights.square(),
        "tis_clip_frac": weights != raw if tis is not None else torch.zeros_like(mask),
    }
    if inputs.ref_logprobs is not None:
        values["ref_kld"] = k3(inputs.logprobs, inputs.ref_logprobs, mask)
    if entropy is not None:
        values["entropy"] = entropy
    stacked = torch.stack([value.float() for value in values.values()])  # [metrics, N]
    sums = torch.where(mask, stacked, 0.0).sum(dim=1)  # [metrics]
    return MetricSums(mask.sum().float(), dict(zip(values, sums.unbind(), strict=True)))
