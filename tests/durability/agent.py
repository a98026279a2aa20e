"""The run that is killed: two chats with a tool in each rollout, which takes as long as chance will have it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.testing.models import tiny_model, tiny_tokenizer

CALLS = tuple(f'<tool_call>\n{{"name": "roll", "arguments": {{"sides": {n}}}}}\n</tool_call>' for n in range(2, 120))
"""Each is one token, and every third token of a random model is one of them: so it does call tools."""

ROWS = [{"question": f"what do {n} dice say?"} for n in range(18)]
HELD_OUT = ROWS[:3]

SETTINGS: dict[str, Any] = {
    "max_seq_len": 768,
    "completions_per_prompt": 3,
    "prompt_groups_per_step": 3,
    "pipeline_chunks_per_step": 2,
    "seed": 7,
    "deterministic": True,
    "data": {"epochs": 2},
    "sampling": {"max_tokens": 6},
    "staleness": {"max_staleness": 0},
    "sampler": {"kind": "transformers"},
    "trainer": {"device": "cpu"},
    "loss": {"kl_beta": 0.0},
    "optimizer": {"learning_rate": 3e-3},
    "evaluation": {"interval": 2},
    "checkpoint": {"interval": 1},
}


def make_model(folder: Path) -> Path:
    """A tiny model, random but for one habit: it calls `roll`, and then ends its turn."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer(CALLS)
    tiny_model(folder, hidden=32, layers=1, max_seq_len=1024, tokenizer=tokenizer)
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():  # one direction that calls alone have, and that the end of a turn looks for
        network.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(CALLS)), 0] = 1.0
        network.get_output_embeddings().weight[tokenizer.eos_token_id, 0] = 2.0
    network.save_pretrained(folder)
    return folder


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutRun:
    """The reward is as good as random, and 0 or 1: many groups agree, and are filtered."""

    @asyncrl.tool
    async def roll(sides: int) -> str:
        """Roll a die."""
        await _some_time()
        return str(random.Random(f"{prompt.group_seed}/{sides}").randrange(sides))

    async def ask(name: str) -> asyncrl.RolloutSample:
        chat = prompt.policy.chat(f"{name}: {prompt['question']}", tools=[roll], max_turns=2)
        await _some_time()
        await chat.run()
        found = chat.sample(reward=0.0)
        assert isinstance(found, asyncrl.RolloutSample)
        return found

    samples = await asyncio.gather(ask("one"), ask("another"))
    reward = float(sum(map(sum, (sample.tokens for sample in samples))) % 4 == 0)
    return asyncrl.RolloutRun([replace(sample, reward=reward) for sample in samples])


async def _some_time() -> None:
    """Some 10 ms, now and then ten times that: groups overtake each other."""
    await asyncio.sleep(0.1 * random.random() ** 8)
