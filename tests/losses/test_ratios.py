"""Weights of the train/sampler correction: what is refused, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from asyncrl.errors import ConfigError
from asyncrl.losses import TIS, importance_ratio, k3, tis_weights
from tests.losses.cases import make_inputs, random_inputs

LOGS = [math.log(2), math.log(8), math.log(0.5), math.log(0.5)]
"""old - behaviour of four tokens: two sequences with the geometric means 4 and 0.5."""


@pytest.mark.parametrize(
    ("tis", "expected"),
    [
        (None, [1, 1, 1, 1]),
        (TIS(), [2, 5, 0.5, 0.5]),
        (TIS(cap=3.0), [2, 3, 0.5, 0.5]),
        (TIS(cap=None), [1, 1, 1, 1]),
        (TIS(level="sequence"), [4, 4, 0.5, 0.5]),
        (TIS(cap=3.0, level="sequence"), [3, 3, 0.5, 0.5]),
        (TIS(icepop=2.0), [2, 0, 0.5, 0.5]),
        (TIS(cap=None, icepop=2.0), [1, 0, 1, 1]),
        (TIS(mis=(0.4, 3.0)), [0, 0, 0.5, 0.5]),
        (TIS(cap=None, mis=(1.0, 5.0)), [1, 1, 0, 0]),
    ],
)
def test_weights_by_hand(tis: TIS | None, expected: list[float]) -> None:
    inputs = make_inputs(logprobs=[0.0] * 4, old=LOGS, behavior=[0.0] * 4, sequence_ids=[0, 0, 1, 1])
    assert tis_weights(inputs, tis).tolist() == pytest.approx(expected)


def test_anchor_rollout_makes_every_weight_one() -> None:
    """Its old log-probs are those of the sampler."""
    inputs = random_inputs(seed=0, lengths=(4, 5))
    inputs = replace(inputs, old_logprobs=inputs.behavior_logprobs)
    assert torch.equal(tis_weights(inputs, TIS()), torch.ones(9, dtype=torch.float64))


def test_ratios_hide_what_is_masked() -> None:
    """On their own, outside `policy_loss`, too."""
    inputs = make_inputs(logprobs=[-1.0, math.nan], old=[-2.0, math.inf], mask=[1, 0])
    values = importance_ratio(inputs) + k3(inputs.logprobs, inputs.old_logprobs, inputs.loss_mask)
    values.sum().backward()
    assert values.tolist() == pytest.approx([math.e + math.exp(-1) + 1 - 1, 1.0])
    assert inputs.logprobs.grad is not None
    assert inputs.logprobs.grad.tolist() == pytest.approx([math.e - math.exp(-1) + 1, 0.0])


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"cap": 0.0}, "silence"),
        ({"icepop": 0.5}, "at least 1"),
        ({"icepop": 2.0, "level": "sequence"}, "level 'token'"),
        ({"mis": (2.0, 1.0)}, "low < high"),
        ({"level": "group"}, "'token' or 'sequence'"),
    ],
)
def test_tis_refuses(settings_: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TIS(**settings_)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_are_constants(level: Literal["token", "sequence"]) -> None:
    """Even where the anchor has a gradient, because a caller forgot to detach it."""
    inputs = random_inputs(0, (3, 5))
    inputs = replace(inputs, old_logprobs=inputs.old_logprobs.requires_grad_())
    assert not tis_weights(inputs, TIS(level=level)).requires_grad
