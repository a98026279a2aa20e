"""A tiny model learns to cross frozen lakes that it has never seen: success before and after, in a few minutes.

    python benchmarks/learning_frozen_lake.py [--seed 0] [--steps 60]

The rollout function is the one of examples/frozen_lake.py. The model first imitates a careless player, who knows the
way and strays from it every other move; reinforcement learning has to find out that straying does not pay.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.config import (
    ConcurrencyConfig,
    LossConfig,
    OptimizerConfig,
    SamplerConfig,
    SamplingConfig,
    StalenessConfig,
)
from asyncrl.demo.model import torch_threads
from asyncrl.recipes import sft_loop
from asyncrl.testing.models import tiny_model, tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from frozen_lake import MOVES, RULES, lakes, rollout

WARM_STEPS, WARM_BATCH = 240, 64
CLEAN_SHARE = 0.7
"""Of the warm start: the part in which nobody strays, for the model to see what a way is."""
STRAYS = 0.5
"""How often the careless player moves anywhere."""
HELD_OUT = 256
TURNS = 10

ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = """\
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
WORDS = (RULES, *MOVES, *"SFHGP", *(f"{tile} " for tile in "SFHGP"), *(f"<|im_start|>{role}\n" for role in ROLES))
"""As single tokens: a tile or a turn is one, so that the model can be small and the benchmark quick."""


def way(lake: list[str]) -> dict[int, list[int]]:
    """For each place that the goal can be reached from: the moves that lead along a shortest way."""
    size = len(lake)
    distance, waiting = {size * size - 1: 0}, deque([size * size - 1])
    while waiting:
        place = waiting.popleft()
        for _, there in neighbours(place, size):
            if lake[there // size][there % size] in "SF" and there not in distance:
                distance[there] = distance[place] + 1
                waiting.append(there)
    return {
        place: [move for move, there in neighbours(place, size) if distance.get(there, place * size) == far - 1]
        for place, far in distance.items()
    }


def neighbours(place: int, size: int) -> Iterator[tuple[int, int]]:
    """(move, place) for the moves that do not end at the border."""
    row, column = divmod(place, size)
    for move, (down, right) in enumerate(((0, -1), (1, 0), (0, 1), (-1, 0))):
        if 0 <= row + down < size and 0 <= column + right < size:
            yield move, place + down * size + right


def game(lake: list[str], strays: float, rng: random.Random) -> dict[str, Any]:
    """One game of a player who knows the way, as a row for supervised training."""
    size, ways, place = len(lake), way(lake), 0
    messages = [{"role": "system", "content": RULES}]
    for _ in range(TURNS):
        shown = [list(row) for row in lake]
        shown[place // size][place % size] = "P"
        move = rng.randrange(4) if rng.random() < strays else rng.choice(ways[place])
        messages += [
            {"role": "user", "content": "\n".join(" ".join(row) for row in shown)},
            {"role": "assistant", "content": MOVES[move]},
        ]
        place = dict(neighbours(place, size)).get(move, place)
        if lake[place // size][place % size] in "GH":
            break
    return {"messages": messages}


def make_model(folder: Path, seed: int) -> Path:
    """A model that plays as the careless player does."""
    rng = random.Random(seed)
    blank = tiny_model(
        folder / "blank",
        kind="qwen3",
        hidden=96,
        layers=3,
        max_seq_len=512,
        seed=seed,
        tokenizer=tiny_tokenizer(words=WORDS, chat_template=CHAT_TEMPLATE),
    )
    shown = lakes(WARM_STEPS * WARM_BATCH, first_seed=10_000_000 * (seed + 1))
    clean = int(CLEAN_SHARE * len(shown))
    games = [game(row["lake"], STRAYS if index >= clean else 0.0, rng) for index, row in enumerate(shown)]
    config = sft_loop.Config(
        log_path=folder / "warm-start",
        base_model=str(blank),
        learning_rate=2e-3,
        lr_scheduler="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        batch_size=WARM_BATCH,
        shuffle=False,
        seed=seed,
    )
    with torch_threads(1):
        return sft_loop.main(config, games, view="bar", title="making a careless player").model_dir


def learn(folder: Path, seed: int, steps: int) -> asyncrl.TrainResult:
    config = asyncrl.Config(
        model=str(make_model(folder, seed)),
        run_dir=folder / "run",
        seed=seed,
        max_steps=steps,
        prompt_groups_per_step=16,
        completions_per_prompt=8,
        on_filtered="drop",
        max_seq_len=512,
        sampling=SamplingConfig(max_tokens=4),
        staleness=StalenessConfig(max_staleness=2),
        concurrency=ConcurrencyConfig(initial_window=64),
        loss=LossConfig(kl_beta=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_steps=3),
        sampler=SamplerConfig(kind="transformers"),
    )
    return asyncrl.train(
        rollout,
        dataset=lakes(4 * 16 * steps, first_seed=1_000_000 * (seed + 1)),
        config=config,
        evaluation=lakes(HELD_OUT, first_seed=0),
    )


def interval(crossed: asyncrl.EvalResult | None) -> str:
    assert crossed is not None
    return f"{crossed.mean:.3f} [{crossed.ci_low:.3f}, {crossed.ci_high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = learn(Path(folder), options.seed, options.steps)
    print("| seed | crossed before | crossed after | steps | training, s | with warm start, s |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.seed} | {interval(result.before)} | {interval(result.after)} | {result.steps} "
        f"| {result.wall_s:.0f} | {time.monotonic() - began:.0f} |"
    )


if __name__ == "__main__":
    main()
