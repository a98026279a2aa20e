"""From losses per token to one number, in two halves, so that the cut of a batch does not matter.

`loss_sum` is what a (micro)batch calls backward on; `denominator` belongs to the whole optimizer batch,
and divides the accumulated gradient once. A sequence must lie whole in one microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asyncrl.losses.inputs import LossInputs, sequence_sums, sequence_token_counts

Normalization = Literal["num_loss_tokens", "num_sequences", "sequence_mean", "none"] | float


@dataclass(frozen=True, slots=True)
class Counts:
    """What a batch holds. Counts of the parts of a batch add up to those of the whole."""

    loss_tokens: int = 0
    sequences: int = 0
    """Sequences with at least one loss token."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.loss_tokens + other.loss_tokens, self.sequences + other.sequences)


def count(inputs: LossInputs) -> Counts:
    """The loss tokens, and the sequences that have some."""
    mask = inputs.loss_mask.bool()
    return Counts(int(mask.sum()), int((torch.bincount(inputs.sequence_ids[mask]) > 0).sum()))


def loss_sum(per_token: Tensor, inputs: LossInputs, normalization: Normalization) -> Tensor:
    """The part of a sum that this (micro)batch brings, a scalar with gradient."""
    if normalization == "sequence_mean":
        return (sequence_sums(per_token, inputs) / sequence_token_counts(inputs)).sum()
    return torch.where(inputs.loss_mask.bool(), per_token, 0.0).sum()


def denominator(counts: Counts, normalization: Normalization) -> float:
    """What the sums over a whole optimizer batch are divided by. Never 0."""
    if normalization == "num_loss_tokens":
        return float(max(counts.loss_tokens, 1))
    if normalization in ("num_sequences", "sequence_mean"):
        return float(max(counts.sequences, 1))
    if normalization == "none":
        return 1.0
    return float(normalization)


def reduce(per_token: Tensor, inputs: LossInputs, normalization: Normalization) -> Tensor:
    """Both halves at once, for a batch that is not cut. A scalar with gradient."""
    return loss_sum(per_token, inputs, normalization) / denominator(count(inputs), normalization)
