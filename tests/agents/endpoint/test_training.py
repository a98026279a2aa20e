"""Every client in one real run: a model is sampled through the endpoint and trained on what was captured."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import agents
import openai

import asyncrl
from tests.agents.endpoint.clients import AGENTS, openai_client
from tests.conftest import MakeConfig

ASKED: Any = [{"role": "user", "content": "?"}]
BOMBS = 4
"""Bombs fail at once, before anything else has ended: five of them in a row would be taken for an outage."""


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    agent = list(AGENTS.values())[prompt.rollout_index % len(AGENTS)]
    try:
        said = await agent(prompt.policy, prompt.index % 2 == 0)
    except agents.AgentsException:  # newer versions of the framework give up on a turn that was cut
        said = ""
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


async def bomb(client: openai.AsyncOpenAI) -> None:
    """Branches, and each branch branches."""
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(client.completions.create(model="m", prompt="branch", n=3))


async def drop(client: openai.AsyncOpenAI) -> None:
    """Asks for a stream and hangs up, at whatever moment."""
    call = asyncio.create_task(client.chat.completions.create(model="m", messages=ASKED, stream=True))
    await asyncio.sleep(0.02 * random.random())
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def hostile_rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    async with openai_client(prompt.policy) as client:
        if prompt.rollout_index == 0 and prompt.index < BOMBS:
            await bomb(client)
        if prompt.rollout_index == 1:
            await drop(client)
        said = (await client.chat.completions.create(model="m", messages=ASKED)).choices[0].message.content or ""
    return prompt.policy.captured_run(reward=float(len(said) % 2))


def test_hostile_agents_harm_their_own_rollouts_alone(make_config: MakeConfig) -> None:
    config = make_config(max_steps=2, endpoint={"max_calls": 9}, rollout={"retries": 0}, on_filtered="drop")
    result = asyncrl.train(hostile_rollout, dataset=[{"row": row} for row in range(8)], config=config, view="quiet")
    assert result.steps == 2
    assert result.ledger["trained"] + result.ledger["filtered"] == 8
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sum(record["members_failed"] for record in records) == BOMBS
