"""`orpo_loop`: odds ratio preference optimization (arXiv:2403.07691): supervised training and preference in one.

    from asyncrl.recipes import orpo_loop

    config = orpo_loop.Config(base_model="Qwen/Qwen3-0.6B", dataset="pairs.jsonl", odds_weight=0.1)
    result = orpo_loop.main(config)

There is no reference model. docs/supervised.md has the shapes of rows.
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

    learning_rate: PositiveFloat = 8e-6
    """Suits full fine-tuning; adapters take about ten times as much."""
    odds_weight: PositiveFloat = 0.1
    """Weight of the odds ratio beside the negative log-likelihood of the chosen answer: lambda in the paper."""
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
    """Minimise nll(chosen) - odds_weight x log sigmoid(log odds ratio), the mean over the pairs of each batch.

    Args and errors: as `sft_loop.main`.
    """

    def objective() -> Objective:
        from asyncrl.recipes.learner import orpo_objective

        return orpo_objective(config.odds_weight)

    recipe = Recipe("orpo", preference_encoder(config.pairing), objective, pairs=True)
    return run(recipe, config, rows, evaluation_rows, view=view, title=title, resume=resume)
