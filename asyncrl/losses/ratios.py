"""Ratios of probabilities, and what is made of them: importance weights and the k3 estimate of a KL.

All take and give [N]. Differences of log-probs are clamped to +-20 before they are exponentiated:
e^20 is five hundred million, far beyond every clip, and nothing overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.losses.inputs import LossInputs, sequence_means

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class TIS:
    """Truncated importance sampling: how far the sampler's distribution may be from the trainer's.

    w = min(exp(old - behaviour), cap), a constant factor of a token's policy term.
    """

    cap: float | None = 5.0
    """Largest weight. None: every weight is 1, and only `icepop` and `mis` are at work."""
    level: Literal["token", "sequence"] = "token"
    """`sequence`: the geometric mean over the sequence's loss tokens, for each of its tokens."""
    icepop: float | None = None
    """c >= 1, token level only: a token whose weight lies outside [1/c, c] is left out."""
    mis: tuple[float, float] | None = None
    """(low, high): a sequence whose geometric-mean weight lies outside is left out."""

    def __post_init__(self) -> None:
        if self.cap is not None and not (self.cap > 0 and math.isfinite(self.cap)):
            raise ConfigError(
                f"TIS cap is {self.cap}. Expected a number above 0: 0 would silence the whole loss. "
                "Use tis=None to switch the correction off."
            )
        if self.level not in ("token", "sequence"):
            raise ConfigError(f"TIS level is {self.level!r}. Expected 'token' or 'sequence'.")
        if self.icepop is not None and (self.icepop < 1 or self.level != "token"):
            raise ConfigError(
                f"TIS icepop is {self.icepop} at level {self.level!r}. Expected a number of at least 1, "
                "and level 'token'."
            )
        if self.mis is not None and not 0 <= self.mis[0] < self.mis[1]:
            raise ConfigError(f"TIS mis is {self.mis}. Expected (low, high) with 0 <= low < high.")


def log_ratio(above: Tensor, below: Tensor, mask: Tensor) -> Tensor:
    """`above` - `below`, clamped, and 0 behind the mask: safe to exponentiate, forward and backward. [N]"""
    return torch.where(mask, above - below, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _sequence_log_ratio(above: Tensor, below: Tensor, inputs: LossInputs) -> Tensor:
    """As `log_ratio`, the mean over a sequence's loss tokens, given to each of them. [N]"""
    means = torch.where(inputs.loss_mask, sequence_means(above - below, inputs), 0.0)
    return means.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def importance_ratio(inputs: LossInputs) -> Tensor:
    """r = pi / old, with gradient. 1 behind the mask. [N]"""
    return log_ratio(inputs.logprobs, inputs.old_logprobs, inputs.loss_mask).exp()


def sequence_ratio(inputs: LossInputs) -> Tensor:
    """s, the geometric mean of r over a sequence's loss tokens, given to each of them, with gradient. [N]

    1 behind the mask. arXiv:2507.18071, eq. 7.
    """
    return _sequence_log_ratio(inputs.logprobs, inputs.old_logprobs, inputs).exp()


def k3(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """An estimate of KL(p || q) from tokens drawn from p: exp(q - p) - (q - p) - 1 >= 0. [N]

    Unbiased, and of low variance (J. Schulman, "Approximating KL divergence", 2020).
    """
    difference = log_ratio(log_q, log_p, mask)  # [N]
    return torch.expm1(difference) - difference


def raw_tis_weights(inputs: LossInputs, level: Literal["token", "sequence"]) -> Tensor:
    """old / behaviour before any cap, without gradient. 1 behind the mask. [N]"""
    old, behavior = inputs.old_logprobs.detach(), inputs.behavior_logprobs.detach()
    if level == "sequence":
        return _sequence_log_ratio(old, behavior, inputs).exp()
    return log_ratio(old, behavior, inputs.loss_mask).exp()


def tis_weights(inputs: LossInputs, tis: TIS | None) -> Tensor:
    """The factor of each token's policy term, without gradient. [N]"""
    if tis is None:
        return torch.ones_like(inputs.logprobs, requires_grad=False)
    raw = raw_tis_weights(inputs, tis.level)  # [N]
    weights = torch.ones_like(raw) if tis.cap is None else raw.clamp(max=tis.cap)
    if tis.icepop is not None:
        weights = torch.where((raw >= 1 / tis.icepop) & (raw <= tis.icepop), weights, 0.0)
    if tis.mis is not None:
        low, high = tis.mis
        mean = raw_tis_weights(inputs, "sequence")
        weights = torch.where((mean >= low) & (mean <= high), weights, 0.0)
    return weights


def tis_cut(inputs: LossInputs, tis: TIS, weights: Tensor) -> Tensor:
    """Where the cap or a filter has changed a weight: bool [N]. `weights` are those of `tis_weights`."""
    if tis.cap is None:
        return weights == 0
    return weights != raw_tis_weights(inputs, tis.level)
