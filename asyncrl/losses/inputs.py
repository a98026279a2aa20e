"""What an objective reads, flat over tokens. N tokens of S sequences; no padding, no batch dimension."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The tensors of one (micro)batch, all [N], log-probs natural log, after temperature."""

    logprobs: Tensor
    """Of the policy that is trained. The only field with a gradient."""
    old_logprobs: Tensor
    """The anchor of the ratio: the trainer's own before this step, or the sampler's."""
    behavior_logprobs: Tensor
    """Of the weights that drew the token."""
    ref_logprobs: Tensor | None
    """Of the frozen reference model; None where no KL is asked for."""
    advantages: Tensor
    loss_mask: Tensor
    """True (or 1) on tokens to train. What the other fields hold elsewhere does not matter, NaN included."""
    sequence_ids: Tensor
    """int64: which sequence the token belongs to, 0 to S - 1."""
    group_ids: Tensor | None = None
    """int64: which group the token's sequence belongs to (one prompt, one preference pair), from 0."""

    def cleaned(self) -> LossInputs:
        """The same with zeros behind the mask, so that nothing there reaches a value or a gradient."""
        mask = self.loss_mask.bool()  # [N]
        hidden = ~mask

        def clean(values: Tensor) -> Tensor:
            return values.masked_fill(hidden, 0.0)

        return replace(
            self,
            logprobs=clean(self.logprobs),
            old_logprobs=clean(self.old_logprobs),
            behavior_logprobs=clean(self.behavior_logprobs),
            ref_logprobs=None if self.ref_logprobs is None else clean(self.ref_logprobs),
            advantages=clean(self.advantages),
            loss_mask=mask,
        )


def sequence_sums(values: Tensor, inputs: LossInputs) -> Tensor:
    """Sum of `values` [N] over the loss tokens of each sequence, [S]."""
    size = int(inputs.sequence_ids.max()) + 1 if inputs.sequence_ids.numel() else 0
    sums = torch.zeros(size, dtype=values.dtype, device=values.device)  # [S]
    return sums.index_add(0, inputs.sequence_ids, torch.where(inputs.loss_mask.bool(), values, 0.0))


def sequence_token_counts(inputs: LossInputs) -> Tensor:
    """Loss tokens of each sequence, at least 1 so that it can be divided by, [S]."""
    ones = torch.ones_like(inputs.logprobs, requires_grad=False)  # [N]
    return sequence_sums(ones, inputs).clamp(min=1.0)


def sequence_means(values: Tensor, inputs: LossInputs) -> Tensor:
    """Mean of `values` [N] over the loss tokens of each sequence, given back to each of its tokens, [N]."""
    means = sequence_sums(values, inputs) / sequence_token_counts(inputs)  # [S]
    return means[inputs.sequence_ids]
