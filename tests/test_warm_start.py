"""A run that goes on from a saved adapter: its version 0 is that adapter, in the trainer and in the sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import asyncrl
from asyncrl.cli.config import load_config
from asyncrl.sampling.transformers import TransformersSampler
from asyncrl.types import Weights
from tests.conftest import MakeConfig

ROWS = [{"n": n % 10} for n in range(16)]
FAVOURITE = 7


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It makes one token likely, which the base model is not fond of."""
    network = AutoModelForCausalLM.from_pretrained(model)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = get_peft_model(network, settings)
    optimizer = torch.optim.Adam([weight for weight in adapted.parameters() if weight.requires_grad], lr=3e-2)
    ids = torch.tensor([[65 + n % 10, 65, FAVOURITE, FAVOURITE, FAVOURITE] for n in range(10)])
    for _ in range(40):
        loss = adapted(input_ids=ids, labels=ids.masked_fill(ids >= 65, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapter")
    adapted.save_pretrained(str(folder))
    return folder


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    ids = [65 + prompt["n"], 65]
    completion = await prompt.policy.generate(ids)
    reward = sum(token == FAVOURITE for token in completion.tokens) / len(completion.tokens)
    return asyncrl.RolloutSample.from_completion(ids, completion, reward + 0.1 * prompt.rng.random())


def test_the_first_rollouts_are_drawn_from_the_adapter(
    adapter: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[int] = []
    publish = TransformersSampler.publish

    async def note(sampler: TransformersSampler, weights: Weights) -> None:
        published.append(weights.version)
        await publish(sampler, weights)

    monkeypatch.setattr(TransformersSampler, "publish", note)
    config = make_config(lora={"warm_start": adapter}, loss={"kl_beta": 0.01})
    result = asyncrl.train(rollout, dataset=ROWS, config=config, evaluation=ROWS[:4], view="quiet")
    assert published == list(range(result.steps + 1)), "version 0 before the first rollout, then one after each step"
    assert result.before is not None
    assert result.before.mean > 0.8
    records: list[dict[str, Any]] = [
        json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[0]["reward_mean"] > 0.8
    assert records[0]["behavior_kl"] == pytest.approx(0.0, abs=1e-6)
    assert records[0]["ref_kld"] == pytest.approx(0.0, abs=1e-6)
    assert load_config(result.run_dir / "config.toml") == config
    assert json.loads((result.model_dir / "adapter_config.json").read_text())["r"] == 4


def test_a_sampler_that_keeps_the_adapter_keeps_it_in_the_next_life(adapter: Path, make_config: MakeConfig) -> None:
    """Weights are never synchronised: the sampler draws from those that the run began with, also after a resume."""
    settings = {"publish": {"weight_sync_interval": 0}, "staleness": {"policy": "pace", "max_staleness": 2}}
    for steps, resume in ((1, False), (2, True)):
        config = make_config(lora={"warm_start": adapter}, max_steps=steps, **settings)
        run = asyncrl.train(rollout, dataset=ROWS, config=config, resume=resume, view="quiet").run_dir
    rewards = [json.loads(line)["reward_mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rewards) == 2
    assert min(rewards) > 0.8


def test_without_it_the_base_model_would_do_worse(adapter: Path, make_config: MakeConfig) -> None:
    """An evaluation of a config with a warm start measures that start; the base model alone knows nothing of it."""
    base = asyncrl.evaluate(rollout, dataset=ROWS, config=make_config())
    start = asyncrl.evaluate(rollout, dataset=ROWS, config=make_config(lora={"warm_start": adapter}))
    as_model = asyncrl.evaluate(rollout, dataset=ROWS, config=make_config(model=str(adapter)))
    assert base.mean < 0.3
    assert min(start.mean, as_model.mean) > 0.8
