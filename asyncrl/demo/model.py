"""The demo's model: a tiny one with its own tokenizer, taught to imitate a clumsy agent.

Made anew on each machine in about a minute, because many machines have no hub, and nothing has to be downloaded.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.demo.demonstrations import demonstration
from asyncrl.demo.task import calculator, problems
from asyncrl.recipes import sft_loop
from asyncrl.recipes.view import Mode
from asyncrl.testing.models import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CALL_BEGIN = f'<tool_call>\n{{"name": "{calculator.name}", "arguments": {{"expression": "'
CALL_END = '"}}\n</tool_call>'

WORDS = (CALL_BEGIN, CALL_END, *(f"<|im_start|>{role}\n" for role in ("user", "assistant", "tool")))
"""Whole markup as single tokens, so that a call costs about 8 tokens and not 70."""

WARM_STEPS, WARM_BATCH = 360, 64
CLEAN_SHARE = 0.7
"""Of the warm start's steps: the part without slips."""

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
"""ChatML without the schemas of the tools: this model has learned the only one it will ever see."""


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter but for the markup."""
    return tiny_tokenizer(words=WORDS, chat_template=CHAT_TEMPLATE)


def make_model(folder: Path, *, seed: int, steps: int = WARM_STEPS, quiet: bool = False) -> Path:
    """Write the model that the demo starts from to `folder` / "start-model", and return that folder.

    First it learns the task well, then from the clumsy agent. Learning to copy numbers takes a transformer of this
    size most of the time, and does not succeed where half of what it sees is copied from the wrong place.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    blank, warm_start, start = folder / "blank-model", folder / "warm-start", folder / "start-model"
    for leftover in (warm_start, start):  # of a demo that was stopped here
        shutil.rmtree(leftover, ignore_errors=True)
    tiny_model(blank, kind="qwen3", hidden=128, layers=3, max_seq_len=256, seed=seed, tokenizer=demo_tokenizer())
    config = sft_loop.Config(
        log_path=warm_start,
        base_model=str(blank),
        learning_rate=2e-3,
        lr_scheduler="cosine",
        warmup_steps=20,
        weight_decay=0.01,
        batch_size=WARM_BATCH,
        shuffle=False,
        seed=seed,
    )
    with torch_threads(1):  # so small a model gains little from a second one, and loses much on a busy machine
        view: Mode = "quiet" if quiet else "bar"
        result = sft_loop.main(config, lessons(seed, steps), view=view, title="making a clumsy agent")
    result.model_dir.rename(start)
    shutil.rmtree(warm_start)
    shutil.rmtree(blank)
    return start


def lessons(seed: int, steps: int) -> list[dict[str, Any]]:
    """The rows of the warm start, in the order in which they are shown."""
    rng, shown = random.Random(seed), problems(seed, held_out=False)
    clumsiness = [float(step >= CLEAN_SHARE * steps) for step in range(steps) for _ in range(WARM_BATCH)]
    return [
        {"messages": demonstration(problem, rng, clumsy)} for problem, clumsy in zip(shown, clumsiness, strict=False)
    ]


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch's operations on so many threads as long as the block lasts."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
