"""The demo's model: a tiny one with its own tokenizer, taught to imitate a clumsy agent.

Made anew on each machine in about a minute, because many machines have no hub, and nothing has to be downloaded.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.config import Config, LossConfig, OptimizerConfig
from asyncrl.demo.demonstrations import demonstration
from asyncrl.demo.task import calculator, problems
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.types import TrainSequence

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


def make_model(folder: Path, *, seed: int, steps: int = WARM_STEPS) -> Path:
    """Write the model that the demo starts from to `folder` / "start-model", and return that folder.

    First it learns the task well, then from the clumsy agent. Learning to copy numbers takes a transformer of this
    size most of the time, and does not succeed where half of what it sees is copied from the wrong place.
    """
    from rich.progress import track
    from transformers.utils import logging as transformers_logging

    from asyncrl.losses import cross_entropy
    from asyncrl.training.trainer import TorchTrainer

    transformers_logging.disable_progress_bar()
    rng = random.Random(seed)
    shown = problems(seed, held_out=False)
    tokenizer = demo_tokenizer()
    blank = tiny_model(
        folder / "blank-model", kind="qwen3", hidden=128, layers=3, max_seq_len=256, seed=seed, tokenizer=tokenizer
    )
    config = Config(
        model=str(blank),
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01),
        loss=LossConfig(kl_beta=0.0),
    )
    trainer = TorchTrainer(config, total_steps=steps, weights_format="tensors")
    with torch_threads(1):  # so small a model gains little from a second one, and loses much on a busy machine
        for step in track(range(steps), "making a clumsy agent"):
            clumsiness = float(step >= CLEAN_SHARE * steps)
            talks = [demonstration(problem, rng, clumsiness) for problem in islice(shown, WARM_BATCH)]
            trainer.forward_backward_custom([supervised(tokenizer, talk) for talk in talks], cross_entropy)
            trainer.optim_step()
    trainer.save_model(folder / "start-model")
    shutil.rmtree(blank)
    return folder / "start-model"


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


def supervised(tokenizer: Any, messages: list[dict[str, Any]]) -> TrainSequence:
    """A conversation whose assistant turns are trained, each with the token that ends it."""
    ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=False)
    speaker, end = tokenizer.convert_tokens_to_ids(["<|im_start|>assistant\n", "<|im_end|>"])
    mask: list[int] = []
    speaking = 0
    for token in ids:
        mask.append(speaking)
        speaking = 1 if token == speaker else 0 if token == end else speaking
    return TrainSequence(ids, [0.0] * len(ids), mask, advantage=1.0, group=0)
