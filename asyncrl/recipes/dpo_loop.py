"""`dpo_loop`: direct preference optimization (arXiv:2305.18290) on pairs of answers.

    from asyncrl.recipes import dpo_loop

    config = dpo_loop.Config(base_model="Qwen/Qwen3-0.6B", dataset="pairs.jsonl", beta=0.1)
    result = dpo_loop.main(config)

The reference is the model that the run starts from: a frozen copy of it, or with LoRA the model as the adapter found
it, which costs no memory. docs/supervised.md has the shapes of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from asyncrl.data import Rows
from asyncrl.lives import Resume
from asyncrl.recipes.preference_rows import Pairing, preference_encoder
from asyncrl.recipes.settings import SupervisedConfig
from asyncrl.recipes.supervised import Recipe, Result, run
from asyncrl.recipes.view import Mode

if TYPE_CHECKING:
    from asyncrl.recipes.learner import Objective

__all__ = ["Config", "Result", "main"]


class Config(SupervisedConfig):
    """All settings of the recipe. Frozen, and checked when it is made."""

    learning_rate: PositiveFloat = 1e-6
    """Suits full fine-tuning; adapters take about ten times as much. Far below that of supervised training: the
    objective goes on pushing pairs apart that are told apart already."""
    beta: PositiveFloat = 0.1
    """How strongly the policy is held to the reference: a reward is beta times the log-ratio of the two."""
    pairing: Pairing = "best_worst"
    """Rows of samples with scores: the best against the worst, or `all` pairs of unequal scores."""


def main(
    config: Config,
    rows: Rows | None = None,
    evaluation_rows: Rows | None = None,
    *,
    view: Mode = "auto",
    title: str | None = None,
    resume: Resume | None = None,
) -> Result:
    """Minimise -log sigmoid(beta x difference of log-ratios), the mean over the pairs of each batch.

    Args and errors: as `sft_loop.main`.
    """

    def objective() -> Objective:
        from asyncrl.recipes.learner import dpo_objective

        return dpo_objective(config.beta)

    recipe = Recipe("dpo", preference_encoder(config.pairing), objective, pairs=True)
    return run(recipe, config, rows, evaluation_rows, view=view, title=title, resume=resume)
