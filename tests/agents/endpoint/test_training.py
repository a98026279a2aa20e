"""Every client in one real run: a model is sampled through the endpoint and trained on what was captured."""

from __future__ import annotations

import json

import asyncrl
from tests.agents.endpoint.clients import AGENTS
from tests.conftest import MakeConfig


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    agent = list(AGENTS.values())[prompt.rollout_index % len(AGENTS)]
    said = await agent(prompt.policy, prompt.index % 2 == 0)
    return prompt.policy.captured_run(reward=float(len(said) % 2))


def test_a_run_of_all_clients_trains_what_they_were_told(make_config: MakeConfig) -> None:
    config = make_config(
        max_seq_len=1024,
        completions_per_prompt=2 * len(AGENTS),
        prompt_groups_per_step=2,
        max_steps=2,
        staleness={"max_staleness": 0},
    )
    result = asyncrl.train(rollout, dataset=[{"row": row} for row in range(40)], config=config, view="quiet")
    assert result.steps == 2
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert abs(record["behavior_kl"]) < 1e-4  # the trainer finds the log-probs that the sampler gave
        assert record["train_tokens"] > 0
        assert record.get("forks", 0) == 0
