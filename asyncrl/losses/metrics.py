"""What is reported of an objective: means over the loss tokens of a whole optimizer batch.

A microbatch gives sums (still on the device: nothing waits for it); sums add up; means come last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.ratios import TIS, importance_ratio, k3, sequence_ratio, tis_cut, tis_weights
from asyncrl.losses.registry import Clip


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
def metric_sums(inputs: LossInputs, *, clip: Clip, tis: TIS | None = None, entropy: Tensor | None = None) -> MetricSums:
    """Sums of one microbatch; `entropy` is [N] where it is known.

    ppo_kl, ref_kld, behavior_kl: k3 between policy and anchor, policy and reference, anchor and sampler.
    clip_frac_low, clip_frac_high: share of tokens whose clipped branch is the one that counts.
    ess: effective sample size of the weights, (sum w)^2 / (n sum w^2), 1 where all are equal.
    """
    inputs = inputs.cleaned()
    mask, advantages = inputs.loss_mask, inputs.advantages
    ratio = importance_ratio(inputs)  # [N]
    clipped = sequence_ratio(inputs) if clip.ratio == "sequence" else ratio
    weights = tis_weights(inputs, tis)  # [N]
    values = {
        "ppo_kl": k3(inputs.old_logprobs, inputs.logprobs, mask),
        "behavior_kl": k3(inputs.behavior_logprobs, inputs.old_logprobs, mask),
        "clip_frac_low": (clipped < clip.low) & ((advantages < 0) | (not clip.pessimistic)),
        "clip_frac_high": (clipped > clip.high) & ((advantages > 0) | (not clip.pessimistic)),
        "ratio_mean": ratio,
        "tis_weight_mean": weights,
        "tis_weight_square": weights.square(),
        "tis_clip_frac": torch.zeros_like(mask) if tis is None else tis_cut(inputs, tis, weights),
    }
    if inputs.ref_logprobs is not None:
        values["ref_kld"] = k3(inputs.logprobs, inputs.ref_logprobs, mask)
    if entropy is not None:
        values["entropy"] = entropy
    stacked = torch.stack([value.float() for value in values.values()])  # [metrics, N]
    sums = torch.where(mask, stacked, 0.0).sum(dim=1)  # [metrics]
    return MetricSums(mask.sum().float(), dict(zip(values, sums.unbind(), strict=True)))
