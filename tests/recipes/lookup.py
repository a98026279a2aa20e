"""A job of two turns: ask for the value of a letter, or do not ask; then say the value.

    a | L | =q.| q      turn 1 looks it up, and the value is there to be copied
    a | N | =?.| ...    turn 1 does not, and turn 2 can only guess

Values are drawn anew for each row, so nothing but a look-up tells them.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.types import RolloutSample

LETTERS = "abcdefghijklmnop"
LOOK, SKIP = "LN"


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"letter": rng.choice(LETTERS), "answer": rng.choice(LETTERS)} for _ in range(count)]


def shown(said: str, answer: str) -> str:
    """What the world says to turn 1."""
    return f"={answer if said == LOOK else '?'}."


def make_rollout(judge: Any, looked_up: list[bool] | None = None) -> Any:
    """A rollout function. `judge(said, answer)`: the outcome; who looked it up is kept in `looked_up`."""

    async def rollout(prompt: asyncrl.Prompt) -> RolloutSample:
        policy = prompt.policy
        encode, decode = policy.tokenizer.encode, policy.tokenizer.decode
        first = encode(prompt["letter"])
        query = await policy.generate(first, max_tokens=1)
        said = decode(query.tokens)
        if looked_up is not None:
            looked_up.append(said == LOOK)
        context = encode(shown(said, prompt["answer"]))
        reply = await policy.generate([*first, *query.tokens, *context], max_tokens=1)
        return RolloutSample(
            tokens=[*first, *query.tokens, *context, *reply.tokens],
            logprobs=[0.0, *query.logprobs, *[0.0] * len(context), *reply.logprobs],
            loss_mask=[0, 1, *[0] * len(context), 1],
            versions=[0, *query.versions, *[0] * len(context), *reply.versions],
            reward=float(judge(decode(reply.tokens), prompt["answer"])),
        )

    return rollout


def trained_model(folder: Path, steps: int = 250) -> Path:
    """A model that looks up half of the time, and says what is shown where something is: supervised, in seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    tiny_model(folder, layers=2, max_seq_len=32, seed=1)
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = []
        for row in rows(64, rng.randrange(1 << 30)):
            said = rng.choice((LOOK, SKIP))
            told = row["answer"] if said == LOOK else rng.choice(LETTERS)
            texts.append(row["letter"] + said + shown(said, row["answer"]) + told)
        ids = torch.tensor([tokenizer.encode(text) for text in texts])  # [64, 6]
        logits = model(ids).logits[:, [0, 4]]  # [64, 2, V]: of the two turns
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, [1, 5]].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
