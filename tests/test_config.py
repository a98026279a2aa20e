"""Settings that cannot work together are refused at birth, by name, with what to do instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.losses import LossInputs
from asyncrl.training.trainer import loss_settings


def without_kl(inputs: LossInputs) -> torch.Tensor:
    return -inputs.logprobs * inputs.advantages


def with_kl(inputs: LossInputs, *, kl_beta: float) -> torch.Tensor:
    return -inputs.logprobs * inputs.advantages + kl_beta


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy_loss": "grop"}, "policy_loss is 'grop'. Expected one of grpo, importance_sampling"),
        ({"policy_loss": "dapo", "loss": {"kl_beta": 0.1}}, "kl_beta must be 0/unset when method is DAPO"),
        ({"policy_loss": "gspo_token", "loss": {"kl_beta": 0.1}}, "kl_beta must be 0/unset when method is GSPO_TOKEN"),
        ({"policy_loss": "cispo", "loss": {"kl_beta": 0.1}}, "reference model would be loaded for nothing"),
        ({"policy_loss": without_kl, "loss": {"kl_beta": 0.1}}, "your policy_loss takes no `kl_beta`"),
        ({"loss": {"dual_clip": 3.0}}, "loss.dual_clip is 3, but policy_loss='grpo' has no such setting.*dapo"),
        ({"policy_loss": "reinforce", "loss": {"eps_low": 0.2}}, "loss.eps_low is 0.2, but policy_loss='reinforce'"),
        ({"policy_loss": "dapo", "loss": {"dro_beta": 0.1}}, "loss.dro_beta is 0.1.*belongs to dro"),
        ({"policy_loss": "dapo", "loss": {"dual_clip": 1.0}}, "loss.dual_clip: found 1.0"),
        (
            {"loss": {"normalization": "mean"}},
            "^loss.normalization: found 'mean'. Input should be 'auto'.*; or input should be a valid number.*[.]$",
        ),
        ({"loss": {"tis_cap": 0}}, "loss.tis_cap is 0: every weight would be 0"),
        ({"loss": {"tis_icepop": 2, "tis_level": "sequence"}}, "leaves out single tokens"),
        ({"loss": {"tis_icepop": 0.5}}, "loss.tis_icepop: found 0.5"),
        ({"loss": {"tis_mis": (2, 1)}}, "low < high"),
        ({"loss": {"tis_mis": (0.5, 2), "anchor": "rollout"}}, "they would filter nothing"),
        ({"policy_loss": "reinforce", "loss": {"tis_icepop": 2}}, "policy_loss='reinforce' corrects by its own ratio"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature is 0: all rollouts of a prompt would be the same"),
        ({"completions_per_prompt": 1}, "completions_per_prompt is 1"),
        ({"lora": {"rank": 8}, "trainer": {"reference_device": "cpu"}}, "with lora.rank the reference is the base"),
        ({"sampler": {"port": 65536}}, "sampler.port: found 65536"),
        ({"sampler": {"port": 65535, "replicas": 2}}, "the last replica would need a port above 65535"),
        ({"sampler": {"urls": ["gpu-1:8000"]}}, "holds 'gpu-1:8000'. Expected where a server listens"),
        ({"sampler": {"urls": ["http://gpu-1:8000/v1/"]}}, "without the path of an API"),
        ({"sampler": {"urls": ["http://gpu-1:8000", "http://gpu-1:8000/"]}}, "names a server twice"),
    ],
)
def test_refusals(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(model="m", **settings)


@pytest.mark.parametrize(
    ("settings", "kl_beta", "normalization"),
    [
        ({}, 0.001, "num_loss_tokens"),
        ({"loss": {"kl_beta": 0.0}}, 0.0, "num_loss_tokens"),
        ({"policy_loss": "dapo"}, 0.0, "num_loss_tokens"),
        ({"policy_loss": "dapo", "loss": {"kl_beta": 0.0}}, 0.0, "num_loss_tokens"),
        ({"policy_loss": "gspo"}, 0.0, "sequence_mean"),
        ({"policy_loss": "gspo_token", "loss": {"normalization": 512}}, 0.0, 512),
        ({"policy_loss": with_kl, "loss": {"kl_beta": 0.2}}, 0.2, "num_loss_tokens"),
        ({"policy_loss": without_kl}, 0.0, "num_loss_tokens"),
    ],
)
def test_what_is_left_to_the_objective(settings: dict[str, Any], kl_beta: float, normalization: str | float) -> None:
    config = Config(model="m", **settings)
    assert (config.kl_beta, config.normalization) == (kl_beta, normalization)


def test_settings_reach_the_objective_under_the_names_of_the_library() -> None:
    config = Config(
        model="m",
        policy_loss="dapo",
        loss={"eps_high": 0.3, "dual_clip": 3.0, "tis_cap": 2.0, "tis_icepop": 4.0, "tis_mis": (0.5, 2.0)},
    )
    found = loss_settings(config)
    tis = found.pop("tis")
    assert found == {"eps_high": 0.3, "dual_clip": 3.0, "kl_beta": 0.0}
    assert (tis.cap, tis.level, tis.icepop, tis.mis) == (2.0, "token", 4.0, (0.5, 2.0))


def test_filters_work_without_weights() -> None:
    tis = loss_settings(Config(model="m", loss={"tis_cap": None, "tis_mis": (0.5, 2.0)}))["tis"]
    assert (tis.cap, tis.mis) == (None, (0.5, 2.0))
    assert loss_settings(Config(model="m", loss={"tis_cap": None}))["tis"] is None
