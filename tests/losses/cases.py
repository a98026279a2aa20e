"""Inputs for objectives: written out, or random in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from asyncrl.losses import LossInputs


def make_inputs(
    *,
    logprobs: Sequence[float],
    old: Sequence[float] | None = None,
    behavior: Sequence[float] | None = None,
    ref: Sequence[float] | None = None,
    advantages: Sequence[float] | None = None,
    mask: Sequence[int] | None = None,
    sequence_ids: Sequence[int] | None = None,
) -> LossInputs:
    """What is not given is on-policy, trained, of one sequence, with advantage 1."""

    def tensor(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    size = len(logprobs)
    anchor = logprobs if old is None else old
    return LossInputs(
        logprobs=tensor(logprobs).requires_grad_(),
        old_logprobs=tensor(anchor),
        behavior_logprobs=tensor(anchor if behavior is None else behavior),
        ref_logprobs=None if ref is None else tensor(ref),
        advantages=tensor([1.0] * size if advantages is None else advantages),
        loss_mask=torch.tensor([1] * size if mask is None else mask).bool(),
        sequence_ids=torch.tensor([0] * size if sequence_ids is None else sequence_ids),
    )


def random_inputs(
    seed: int, lengths: Sequence[int], *, stretch: float = 1.0, behind: float | None = None
) -> LossInputs:
    """Sequences of these lengths, about a quarter of the tokens masked, ratios around the clip.

    `stretch` multiplies all log-ratios; `behind` is put in every field behind the mask.
    """
    generator = torch.Generator().manual_seed(seed)
    size = sum(lengths)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    logprobs = -2 + noise(0.5)
    old = logprobs + stretch * noise(0.15)
    fields = [logprobs, old, old + stretch * noise(0.1), logprobs + stretch * noise(0.3), noise(1.0)]
    mask = torch.rand(size, generator=generator) > 0.25
    if behind is not None:
        fields = [values.masked_fill(~mask, behind) for values in fields]
    return LossInputs(
        logprobs=fields[0].requires_grad_(),
        old_logprobs=fields[1],
        behavior_logprobs=fields[2],
        ref_logprobs=fields[3],
        advantages=fields[4],
        loss_mask=mask,
        sequence_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
    )
