"""`sft_loop`: supervised training on conversations or texts.

    from asyncrl.recipes import sft_loop

    config = sft_loop.Config(base_model="Qwen/Qwen3-0.6B", dataset="chats.jsonl", lora_rank=16, learning_rate=2e-4)
    result = sft_loop.main(config)

A row is `{"messages": [...]}`, `{"prompt": ..., "completion": ...}` or `{"text": ...}`: docs/supervised.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyncrl.data import Rows
from asyncrl.lives import Resume
from asyncrl.recipes.chat_rows import TrainOn, supervised_examples
from asyncrl.recipes.dataset import Encode, Unit
from asyncrl.recipes.examples import Encoder
from asyncrl.recipes.settings import SupervisedConfig
from asyncrl.recipes.supervised import Recipe, Result, run
from asyncrl.recipes.view import Mode

if TYPE_CHECKING:
    from asyncrl.recipes.learner import Objective

__all__ = ["Config", "Result", "main"]


class Config(SupervisedConfig):
    """All settings of the recipe. Frozen, and checked when it is made."""

    train_on: TrainOn = "all"
    """Which turns of the assistant: `all`, or the `last` one. A message's own `weight` scales its loss, 0 mutes it."""


def main(
    config: Config,
    rows: Rows | None = None,
    evaluation_rows: Rows | None = None,
    *,
    view: Mode = "auto",
    title: str | None = None,
    resume: Resume | None = None,
) -> Result:
    """Minimise the cross-entropy of the trained tokens, their mean by weight over each batch.

    Args:
        config: The settings.
        rows: Anything with len() and [index], in place of `config.dataset`.
        evaluation_rows: Held-out rows, in place of `config.evaluation_dataset`: measured before and after.
        view: `auto`, `bar` (no notes) or `quiet`.
        title: What the progress bar is called.
        resume: None: go on from the newest checkpoint where `log_path` holds one, else begin. True: the same, and
            begin again where a run was killed before its first. False: refuse a folder that holds a run. Else the
            checkpoint to go on from: its name in `log_path`, a run folder, `RUN:step-000012`, or a path.

    Raises:
        UserError: a setting, a row, a checkpoint, the model or its chat template cannot be used.
        EngineError: the run could not go on.
        KeyboardInterrupt: after a Ctrl-C, once what was trained has been saved.
    """

    def encode(encoder: Encoder) -> Encode:
        def units(row: Mapping[str, Any]) -> Sequence[Unit]:
            return [supervised_examples(row, encoder, config.train_on)]

        return units

    return run(
        Recipe("sft", encode, _objective, pairs=False),
        config,
        rows,
        evaluation_rows,
        view=view,
        title=title,
        resume=resume,
    )


def _objective() -> Objective:
    from asyncrl.recipes.learner import sft_objective

    return sft_objective()
