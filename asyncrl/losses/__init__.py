"""Policy objectives: pure functions of tensors, per token; the caller reduces. docs/objectives.md has the formulas."""

from __future__ import annotations

from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.metrics import MetricSums, metric_sums
from asyncrl.losses.policy import (
    cispo,
    cross_entropy,
    dapo,
    dro,
    grpo,
    gspo,
    gspo_token,
    importance_sampling,
    reinforce,
)
from asyncrl.losses.preference import dpo, orpo
from asyncrl.losses.ratios import TIS, importance_ratio, k3, sequence_ratio, tis_weights
from asyncrl.losses.reduce import Counts, Normalization, count, denominator, loss_sum, reduce
from asyncrl.losses.registry import POLICY_LOSSES, Clip, accepted_settings, clip_of, find_policy_loss, policy_loss

__all__ = [
    "POLICY_LOSSES",
    "TIS",
    "Clip",
    "Counts",
    "LossInputs",
    "MetricSums",
    "Normalization",
    "accepted_settings",
    "cispo",
    "clip_of",
    "count",
    "cross_entropy",
    "dapo",
    "denominator",
    "dpo",
    "dro",
    "find_policy_loss",
    "grpo",
    "gspo",
    "gspo_token",
    "importance_ratio",
    "importance_sampling",
    "k3",
    "loss_sum",
    "metric_sums",
    "orpo",
    "policy_loss",
    "reduce",
    "reinforce",
    "sequence_ratio",
    "tis_weights",
]
