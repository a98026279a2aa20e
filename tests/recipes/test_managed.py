from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import asyncrl
from asyncrl import config as engine_config
from asyncrl.errors import ConfigError
from asyncrl.recipes import managed
from asyncrl.recipes.managed import METHODS, RANGES, SETTINGS, parameters_table
from asyncrl.types import RolloutSample

DEFAULTS = {
    "learning_rate": 1e-4,
    "epochs": 1,
    "lora_rank": 8,
    "batch_size": 32768,
    "kl_beta": 0,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 40,
    "n": 8,
    "max_tokens": 2048,
    "max_concurrent_rollouts": None,
    "signal_patience_groups": None,
}
INSIDE: dict[str, list[Any]] = {
    "learning_rate": [1e-5, 5e-4],
    "epochs": [1, 10],
    "lora_rank": [4, 8, 16, 32],
    "kl_beta": [0, 0.5],
    "temperature": [0.1, 2.0],
    "top_p": [1e-3, 1.0],
    "top_k": [0, 2, 100],
    "n": [2, 64],
    "max_tokens": [16, 16384],
}
OUTSIDE: dict[str, list[Any]] = {
    "learning_rate": [0.99e-5, 5.1e-4],
    "epochs": [0, 11],
    "lora_rank": [0, 2, 6, 64],
    "kl_beta": [-0.1],
    "temperature": [0, 0.09, 2.1],
    "top_p": [-0.1, 1.1],
    "top_k": [-1, 101],
    "n": [1, 0],
    "max_tokens": [15, 16385],
}


def config(**given: Any) -> managed.Config:
    return managed.Config(**{"base_model": "none", **given})


def test_defaults() -> None:
    assert {name: getattr(config(), name) for name in DEFAULTS} == DEFAULTS
    assert set(INSIDE) == set(OUTSIDE) == set(RANGES), "every range is tested at its ends"


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in INSIDE for value in INSIDE[name]])
def test_both_ends_of_a_range_are_inside(name: str, value: Any) -> None:
    assert getattr(config(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUTSIDE for value in OUTSIDE[name]])
def test_outside_a_range_is_refused_with_the_value_the_range_and_why(name: str, value: Any) -> None:
    words = f"{name} is {value:g}. Expected {RANGES[name]}: {RANGES[name].why}."
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(**{name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": 1.5}, r"epochs: found 1\.5\. Input should be a valid integer"),
        ({"n": 1}, "n is 1. Expected at least 2: a response is judged against the others"),
        ({"temperature": 0}, "temperature is 0. Expected 0.1 to 2: 0 is greedy, which ends exploration"),
        ({"method": "dapo", "kl_beta": 0.1}, "^loss_config.kl_beta must be 0/unset when method is DAPO$"),
        ({"method": "gspo-token", "kl_beta": 0.1}, "^loss_config.kl_beta must be 0/unset when method is GSPO_TOKEN$"),
        ({"method": "ppo"}, r"method: found 'ppo'\. Input should be 'grpo', 'dapo' or 'gspo-token'"),
        ({"top_k": 1}, "top_k is 1, which leaves one token to draw: greedy"),
        ({"top_p": 0}, "top_p is 0, which leaves one token to draw: greedy"),
        ({"max_tokens": 512, "max_seq_len": 512}, "max_tokens is 512, but a whole sequence has max_seq_len=512 tokens"),
        ({"learning_rates": 1e-4}, "learning_rates: there is no such setting. Did you mean 'learning_rate'"),
        ({"engine": {"policy_loss": "cispo"}}, "engine sets policy_loss, which is method in this recipe"),
        ({"engine": {"sampling": {"top_k": 3}}}, r"engine sets sampling\.top_k, which is top_k in this recipe"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**given)


@pytest.mark.parametrize(
    ("method", "loss", "low", "high", "kl", "normalization"),
    [
        ("grpo", "grpo", 0.2, 0.2, 0.001, "num_loss_tokens"),
        ("dapo", "dapo", 0.2, 0.28, 0.0, "num_loss_tokens"),
        ("gspo-token", "gspo_token", 0.0003, 0.0004, 0.0, "sequence_mean"),
    ],
)
def test_presets(method: str, loss: str, low: float, high: float, kl: float, normalization: str) -> None:
    engine = config(method=method).engine_config()
    assert (engine.policy_loss, engine.loss.eps_low, engine.loss.eps_high) == (loss, low, high)
    assert (engine.kl_beta, engine.normalization) == (kl, normalization)
    assert set(METHODS) == {"grpo", "dapo", "gspo-token"}


def test_parameters_arrive() -> None:
    engine = config(
        kl_beta=0.02, lora_rank=16, top_k=0, max_concurrent_rollouts=7, signal_patience_groups=50, log_path="elsewhere"
    ).engine_config()
    assert (engine.kl_beta, engine.lora.rank, engine.sampling.top_k) == (0.02, 16, 0)
    assert (engine.concurrency.max_window, engine.signal_patience_groups) == (7, 50)
    assert engine.run_dir == Path("elsewhere")
    assert set(SETTINGS.values()) <= set(engine_config._paths(engine_config.Config))
    assert config(wandb={"project": "p"}).engine_config().wandb.project == "p"


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        ({}, 1),  # 32768 / 4096 = 8 sequences, one group of 8
        ({"batch_size": 131072}, 4),
        ({"batch_size": 131072, "n": 4}, 8),
        ({"max_seq_len": 3000, "max_tokens": 100, "n": 4}, 2),  # 10 sequences: two whole groups
        ({"max_seq_len": 32768}, 1),  # not even one whole group: one
    ],
)
def test_a_batch_in_tokens_is_whole_groups_of_sequences(given: dict[str, Any], groups: int) -> None:
    assert config(**given).engine_config().prompt_groups_per_step == groups


def test_the_page_holds_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert parameters_table() in page.read_text(encoding="utf-8")


def test_a_run(model: Path, tmp_path: Path) -> None:
    async def rollout(prompt: asyncrl.Prompt) -> RolloutSample:
        completion = await prompt.policy.generate([65, 66], max_tokens=4)
        return RolloutSample.from_completion([65, 66], completion, sum(t < 64 for t in completion.tokens))

    given = config(
        base_model=str(model),
        log_path=tmp_path / "run",
        method="gspo-token",
        n=4,
        lora_rank=4,
        batch_size=512,
        max_seq_len=64,
        max_tokens=16,
        output_model_id="adapter",
        engine={"sampler": {"kind": "transformers"}, "trainer": {"device": "cpu"}, "max_steps": 2},
    )
    result = managed.main(given, rollout_fn=rollout, rows=[{"row": row} for row in range(8)])
    assert result.steps == 2
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
