"""A tiny model learns to ask a SQLite database what it is asked: reward before and after, in a few minutes.

    python benchmarks/learning_sql.py [--seed 0] [--steps 60]

The rollout function, the database and the questions are those of examples/text_to_sql.py; the held-out questions have
words in a combination that is never trained on. The model first imitates a careless analyst, who mostly gets a word
wrong; reinforcement learning has to find out which word goes where.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.config import (
    ConcurrencyConfig,
    DataConfig,
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
from text_to_sql import BOUGHT, CITIES, NAMES, PRODUCTS, TASK, Database, make_shop, questions, rollout

WARM_STEPS, WARM_BATCH = 240, 64
CLEAN_SHARE = 0.6
"""Of the warm start: the part without mistakes, for the model to see what a statement has to do with its question."""
MISTAKES, TRIES = 0.75, 0.5
"""How often the careless analyst errs, and how often it tries a statement out before it answers."""
HELD_OUT = 48

KINDS = (
    CITIES,
    PRODUCTS,
    NAMES,
    ("SUM", "AVG", "MAX", "MIN", "COUNT"),
    ("quantity", "price", "age", "id"),
    ("name", "city", "product"),
    ("customers", "orders"),
)
"""What the analyst takes one for another."""

CALL_BEGIN, CALL_END = '<tool_call>\n{"name": "query", "arguments": {"sql": "', '"}}\n</tool_call>'
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def words(rows: list[dict[str, str]]) -> list[str]:
    """As single tokens: markup, the task, and every word of questions and statements."""
    roles = [f"<|im_start|>{role}\n" for role in ("system", "user", "assistant", "tool")]
    found = {word for row in rows for text in (row["question"], row["sql"]) for word in re.findall(r" ?\w+", text)}
    return [TASK, BOUGHT, CALL_BEGIN, CALL_END, "```sql\n", "\n```", " = '", *roles, *sorted(found)]


def mistaken(sql: str, rng: random.Random) -> str:
    """The statement with one word in the place of another."""
    taken = [(word, kind) for kind in KINDS for word in kind if re.search(rf"\b{word}\b", sql)]
    word, kind = rng.choice(taken)
    return re.sub(rf"\b{word}\b", rng.choice([other for other in kind if other != word]), sql, count=1)


def demonstration(row: dict[str, str], rng: random.Random, mistakes: float) -> dict[str, Any]:
    """One conversation of the analyst, as a row for supervised training."""
    sql = mistaken(row["sql"], rng) if rng.random() < mistakes else row["sql"]
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": TASK},
        {"role": "user", "content": row["question"]},
    ]
    if rng.random() < TRIES:
        call = {"type": "function", "function": {"name": "query", "arguments": {"sql": sql}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "query", "content": seen(row["database"], sql)})
    messages.append({"role": "assistant", "content": f"```sql\n{sql}\n```"})
    return {"messages": messages}


def seen(database: str, sql: str) -> str:
    """What the tool shows the model."""
    try:
        return Database(database).query(sql)
    except ValueError as error:
        return f"Error: {type(error).__name__}: {error}"


def make_model(folder: Path, rows: list[dict[str, str]], seed: int) -> Path:
    """A model that answers as the careless analyst does."""
    rng = random.Random(seed)
    blank = tiny_model(
        folder / "blank",
        kind="qwen3",
        hidden=96,
        layers=3,
        max_seq_len=512,
        seed=seed,
        tokenizer=tiny_tokenizer(words=words(rows), chat_template=CHAT_TEMPLATE),
    )
    shown = rng.choices(rows[HELD_OUT:], k=WARM_STEPS * WARM_BATCH)
    clean = int(CLEAN_SHARE * len(shown))
    lessons = [demonstration(row, rng, MISTAKES if index >= clean else 0.0) for index, row in enumerate(shown)]
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
        return sft_loop.main(config, lessons, view="bar", title="making a careless analyst").model_dir


def learn(folder: Path, seed: int, steps: int) -> asyncrl.TrainResult:
    rows = questions(make_shop(folder / "shop.db"))
    config = asyncrl.Config(
        model=str(make_model(folder, rows, seed)),
        run_dir=folder / "run",
        seed=seed,
        max_steps=steps,
        data=DataConfig(epochs=steps),
        prompt_groups_per_step=16,
        completions_per_prompt=8,
        on_filtered="drop",
        max_seq_len=512,
        sampling=SamplingConfig(max_tokens=48),
        staleness=StalenessConfig(max_staleness=2),
        concurrency=ConcurrencyConfig(initial_window=64),
        loss=LossConfig(kl_beta=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="linear", warmup_steps=3),
        sampler=SamplerConfig(kind="transformers"),
    )
    return asyncrl.train(
        rollout, dataset=rows[HELD_OUT:], config=config, evaluation=rows[:HELD_OUT], evaluation_samples=4
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = learn(Path(folder), options.seed, options.steps)
    assert result.before is not None
    assert result.after is not None
    print("| seed | reward before | reward after | steps | training, s | with warm start, s |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.seed} | {result.before.mean:.3f} | {result.after.mean:.3f} | {result.steps} "
        f"| {result.wall_s:.0f} | {time.monotonic() - began:.0f} |"
    )


if __name__ == "__main__":
    main()
