"""The loop that `speed.py` and `latency_hidden.py` measure: 24 prompt and 6 answer tokens, 1.7 M parameters.

Full fine-tuning on the embedded sampler, 8 prompts x 8 rollouts a step. The reward is whether a token comes up, so
nearly every group has a signal.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl import Config, Prompt, RolloutSample, train

PROMPT_TOKENS = 24
ANSWER_TOKENS = 6
GROUPS = 8
MEMBERS = 8


def make_model(folder: Path) -> Path:
    """1.7 M parameters: 5 layers of width 160, vocabulary 265."""
    from asyncrl.testing.models import tiny_model

    return tiny_model(folder / "model", hidden=160, layers=5, max_seq_len=128)


def prompt_tokens(row: int) -> list[int]:
    return random.Random(row).choices(range(200), k=PROMPT_TOKENS)


def make_rollout(delay_s: Callable[[random.Random], float] | None = None) -> Callable[[Prompt], Any]:
    async def rollout(prompt: Prompt) -> RolloutSample:
        tokens = prompt_tokens(prompt.index)
        completion = await prompt.policy.generate(tokens, max_tokens=ANSWER_TOKENS, stop_token_ids=[])
        if delay_s is not None:
            await asyncio.sleep(delay_s(prompt.rng))
        # Noise keeps the advantage alive for as long as the benchmark runs.
        return RolloutSample.from_completion(tokens, completion, reward=prompt.rng.random())

    return rollout


def run_loop(
    steps: int, delay_s: Callable[[random.Random], float] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """The step records of one run."""
    import json

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        config = Config(
            model=str(model),
            run_dir=Path(folder) / "run",
            completions_per_prompt=MEMBERS,
            prompt_groups_per_step=GROUPS,
            max_steps=steps,
            loss={"kl_beta": 0.0},
            optimizer={"learning_rate": 1e-6},
            log_rollouts=0,
            **({"staleness": {"max_staleness": 4}} | settings),
        )
        rows = [{"row": row} for row in range(GROUPS * steps)]
        result = train(make_rollout(delay_s), dataset=rows, config=config, view="quiet")
        return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def samples_per_s(records: list[dict[str, Any]], warm_up: int) -> float:
    """Of the steps after the first `warm_up`."""
    seconds = records[-1]["time_s"] - records[warm_up - 1]["time_s"]
    return float(sum(record["samples"] for record in records[warm_up:])) / seconds
