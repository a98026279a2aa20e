"""Metrics of an objective: by hand, on policy, and over microbatches."""

from __future__ import annotations

import math

import pytest
import torch

from asyncrl.losses import TIS, Clip, metric_sums
from tests.losses.cases import make_inputs, random_inputs
from tests.losses.test_reduce import part

CLIP = Clip(0.8, 1.2)


def test_by_hand() -> None:
    """r = 1.5, 0.5 and 1; weights 2 and 0.5 and 1 (behaviour), capped at 1.5; a fourth token is masked."""
    inputs = make_inputs(
        logprobs=[math.log(0.6), math.log(0.1), math.log(0.5), 0.0],
        old=[math.log(0.4), math.log(0.2), math.log(0.5), 7.0],
        behavior=[math.log(0.2), math.log(0.4), math.log(0.5), math.nan],
        advantages=[1.0, -1.0, 1.0, 1.0],
        mask=[1, 1, 1, 0],
    )
    entropy = torch.tensor([1.0, 2.0, 3.0, math.inf])
    found = metric_sums(inputs, clip=CLIP, tis=TIS(cap=1.5), entropy=entropy).means()
    assert found == pytest.approx(
        {
            "ppo_kl": ((1.5 - math.log(1.5) - 1) + (0.5 - math.log(0.5) - 1)) / 3,
            "behavior_kl": ((2 - math.log(2) - 1) + (0.5 - math.log(0.5) - 1)) / 3,
            "clip_frac_low": 1 / 3,
            "clip_frac_high": 1 / 3,
            "ratio_mean": 1.0,
            "tis_weight_mean": (1.5 + 0.5 + 1) / 3,
            "tis_clip_frac": 1 / 3,
            "entropy": 2.0,
            "ess": 9.0 / (3 * (2.25 + 0.25 + 1)),
        },
        rel=1e-6,
    )


def test_on_policy_is_exact() -> None:
    inputs = make_inputs(logprobs=[-1.0, -2.0, -0.1], advantages=[1.0, -1.0, 3.0], ref=[-1.0, -2.0, -0.1])
    found = metric_sums(inputs, clip=CLIP, tis=TIS()).means()
    assert {name: found[name] for name in ("ppo_kl", "ref_kld", "behavior_kl", "ratio_mean", "ess")} == {
        "ppo_kl": 0.0,
        "ref_kld": 0.0,
        "behavior_kl": 0.0,
        "ratio_mean": 1.0,
        "ess": 1.0,
    }


@pytest.mark.parametrize("tis", [None, TIS(), TIS(cap=1.05, level="sequence")])
def test_microbatches_add_up(tis: TIS | None) -> None:
    inputs = random_inputs(seed=4, lengths=(5, 1, 9, 4))
    whole = metric_sums(inputs, clip=Clip(0.9, 1.2), tis=tis).means()
    first, second = (
        metric_sums(part(inputs, sequences), clip=Clip(0.9, 1.2), tis=tis) for sequences in ([0, 3], [1, 2])
    )
    assert (first + second).means() == pytest.approx(whole, rel=1e-5)


def test_no_loss_token_gives_no_metrics() -> None:
    inputs = make_inputs(logprobs=[-1.0], mask=[0])
    assert metric_sums(inputs, clip=CLIP).means() == {}
