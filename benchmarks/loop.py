"""The loop that `speed.py` and `latency_hidden.py` measure: 24 prompt and 6 answer tokens, or more, 1.7 M parameters.

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


def prompt_tokens(row: int, length: int = PROMPT_TOKENS) -> list[int]:
    return random.Random(row).choices(range(200), k=length)


def make_rollout(delay_s: Callable[[random.Random], float] | None, sizes: tuple[int, int]) -> Callable[[Prompt], Any]:
    async def rollout(prompt: Prompt) -> RolloutSample:
        tokens = prompt_tokens(prompt.index, sizes[0])
        completion = await prompt.policy.generate(tokens, max_tokens=sizes[1], stop_token_ids=[])
        if delay_s is not None:
            await asyncio.sleep(delay_s(prompt.rng))
        # Noise keeps the advantage alive for as long as the benchmark runs.
        return RolloutSample.from_completion(tokens, completion, reward=prompt.rng.random())

    return rollout


def run_loop(
    steps: int,
    delay_s: Callable[[random.Random], float] | None = None,
    sizes: tuple[int, int] = (PROMPT_TOKENS, ANSWER_TOKENS),
    **settings: Any,
) -> list[dict[str, Any]]:
    """The step records of one run. `sizes` are the prompt's and the answer's tokens."""
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
        result = train(make_rollout(delay_s, sizes), dataset=rows, config=config, view="quiet")
        return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def samples_per_s(records: list[dict[str, Any]], warm_up: int, drain: int = 6) -> float:
    """In steady state: without the first `warm_up` steps, and the last `drain`, when no new rollouts begin."""
    first, last = records[warm_up - 1], records[-1 - drain]
    samples = sum(record["samples"] for record in records[warm_up : len(records) - drain])
    return float(samples) / (last["time_s"] - first["time_s"])
