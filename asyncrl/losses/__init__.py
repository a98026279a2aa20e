"""Policy objectives: pure functions of tensors, per token; the caller reduces. docs/objectives.md has the formulas."""

from __future__ import annotations

from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.metrics import MetricSums, metric_sums
from asyncrl.losses.policy import accepted_settings, cross_entropy, grpo, policy_loss
from asyncrl.losses.ratios import TIS, importance_ratio, k3, tis_weights
from asyncrl.losses.reduce import Counts, Normalization, count, denominator, loss_sum, reduce

__all__ = [
    "TIS",
    "Counts",
    "LossInputs",
    "MetricSums",
    "Normalization",
    "accepted_settings",
    "count",
    "cross_entropy",
    "denominator",
    "grpo",
    "importance_ratio",
    "k3",
    "loss_sum",
    "metric_sums",
    "policy_loss",
    "reduce",
    "tis_weights",
]
