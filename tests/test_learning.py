"""Every objective raises the reward through the whole asynchronous engine. `benchmarks/objectives.py` does the demo."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import asyncrl
from asyncrl.losses import POLICY_LOSSES, LossInputs, importance_ratio
from tests.conftest import MakeConfig
from tests.test_run import HELD_OUT, ROWS, rollout

OFF_POLICY = {"kl_beta": 0.0, "anchor": "rollout"}
"""The ratio is that to the sampler, so that every clip has something to do."""


def soft_clip(inputs: LossInputs, *, eps_low: float) -> torch.Tensor:
    """A user's own: the example of docs/objectives.md."""
    return -inputs.advantages * eps_low * torch.tanh((importance_ratio(inputs) - 1) / eps_low)


def run(make_config: MakeConfig, **settings: Any) -> asyncrl.TrainResult:
    config = make_config(
        data={"epochs": 2}, optimizer={"learning_rate": 5e-3}, staleness={"max_staleness": 2}, **settings
    )
    return asyncrl.train(rollout, dataset=ROWS, config=config, evaluation=HELD_OUT, evaluation_samples=4, view="quiet")


@pytest.mark.parametrize("loss", [*sorted(POLICY_LOSSES), soft_clip])
def test_it_learns(loss: Any, make_config: MakeConfig) -> None:
    own = {"eps_low": 0.3} if callable(loss) else {}
    result = run(make_config, policy_loss=loss, loss={**OFF_POLICY, **own})
    assert result.before is not None
    assert result.after is not None
    assert result.before.mean < 0.5 < 0.8 < result.after.mean


def test_a_reference_holds_the_policy_back(make_config: MakeConfig) -> None:
    """A KL that outweighs the reward keeps the policy near where it was, and `ref_kld` says so."""
    free = run(make_config, run_dir=make_config().run_dir / "free", loss={"kl_beta": 1e-6})
    held = run(make_config, run_dir=make_config().run_dir / "held", loss={"kl_beta": 3.0})
    assert free.after is not None
    assert held.after is not None
    assert held.after.mean < free.after.mean - 0.3
    assert last_metric(held, "ref_kld") < 0.7 * last_metric(free, "ref_kld")


def last_metric(result: asyncrl.TrainResult, name: str) -> float:
    record = json.loads((result.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert math.isfinite(record[name])
    return float(record[name])
