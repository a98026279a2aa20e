"""`igpo_loop`: agents of several turns, and a reward for each turn: how much likelier it made the true answer.

    from asyncrl.recipes import igpo_loop

    igpo_loop.main(igpo_loop.Config(base_model="Qwen/Qwen3-0.6B", dataset="train.jsonl"), rollout_fn=rollout)

The rollout function is that of `async_rl_loop`, and each row has its true answer in the field `answer`. When a rollout
has ended, the sampler says how likely the answer was before each of its turns; the differences are the turns' rewards
(`asyncrl.agents.gain`). They and the outcome rewards are compared over the group, each for itself, and discounted
backwards (docs/objectives.md). So a group learns from turns that found something out, also when all of its rollouts
failed. arXiv:2510.14967.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from asyncrl.agents.gain import with_information_gain
from asyncrl.errors import DataError
from asyncrl.recipes import async_rl_loop
from asyncrl.recipes.policy import TISConfig, WandBConfig, chosen_rollout
from asyncrl.rollout.factory import RolloutSetup, open_rollout, require_rollout
from asyncrl.sections import Share
from asyncrl.types import RolloutRun, RolloutSample

if TYPE_CHECKING:
    from asyncrl import TrainResult
    from asyncrl.data import Prompt, Rows
    from asyncrl.lives import Resume
    from asyncrl.types import Rollout

__all__ = ["Config", "TISConfig", "WandBConfig", "main"]


class Config(async_rl_loop.Config):
    """All settings of the recipe: those of `async_rl_loop`, and where the true answer is."""

    gamma: Share = 0.95
    """How much of what comes after a turn counts for the turn."""
    answer_field: str = "answer"
    """The field of a row that holds the true answer, as the policy would write it: a string or a number."""
    answer_prefix: str = ""
    """What the policy writes before its answer (`</think>`, `The answer is `). The answer is scored behind it."""

    def fields(self) -> dict[str, str]:
        return {**super().fields(), "gamma": "turn_discount"}


def main(
    config: Config,
    rollout_fn_factory: Callable[..., Any] | None = None,
    rollout_fn: Callable[..., Any] | None = None,
    dynamic_filter_fn: Callable[[list[float]], bool] | None = None,
    evaluation_fn: Callable[..., Any] | None = None,
    evaluation_interval: int | None = None,
    rows: Rows | None = None,
    rollout_extras: Mapping[str, Any] | None = None,
    resume: Resume | None = None,
) -> TrainResult:
    """Train, and return how the run ended. Arguments as of `async_rl_loop.main`.

    `dynamic_filter_fn` sees outcome rewards only. None filters a group whose outcomes are all equal and whose turns
    all gained the same.
    """
    work = chosen_rollout(rollout_fn_factory, rollout_fn, rollout_extras)
    require_rollout(work)
    return async_rl_loop.main(
        config,
        informed(work, config.answer_field, config.answer_prefix),
        dynamic_filter_fn=dynamic_filter_fn,
        evaluation_fn=evaluation_fn,
        evaluation_interval=evaluation_interval,
        rows=rows,
        resume=resume,
    )


def informed(work: Callable[..., Any], answer_field: str, answer_prefix: str = "") -> Callable[..., Any]:
    """A factory of the same rollout function; what it returns has the information gains of its turns.

    Nothing is scored in an evaluation, and nothing that brings turn rewards or advantages of its own.
    """

    @asynccontextmanager
    async def make_rollout(setup: RolloutSetup) -> AsyncIterator[Callable[[Prompt], Any]]:
        async with open_rollout(work, setup) as rollout:

            async def rollout_with_gain(prompt: Prompt) -> Any:
                if prompt.evaluation:
                    return await rollout(prompt)
                answer = true_answer(prompt, answer_field)
                found = await rollout(prompt)
                if not isinstance(found, RolloutSample | RolloutRun) or _is_judged(found):
                    return found
                return await with_information_gain(prompt.policy, found, answer, answer_prefix)

            yield rollout_with_gain

    return make_rollout


def true_answer(row: Mapping[str, Any], answer_field: str) -> str:
    """What the row says is true.

    Raises:
        DataError: there is no such field, or it holds nothing that could be an answer.
    """
    if answer_field not in row:
        raise DataError(
            f"a row has no field {answer_field!r}, but igpo_loop asks after each turn how likely the true answer is. "
            f"Its fields are {', '.join(map(repr, row))}. Set answer_field to the one that holds the answer."
        )
    answer = row[answer_field]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer == "":
        raise DataError(
            f"the field {answer_field!r} of a row is {answer!r:.80}. Expected the true answer as a string or a number."
        )
    return str(answer)


def _is_judged(rollout: Rollout) -> bool:
    """The rollout function has given its turns or tokens a worth of their own."""
    segments = [rollout] if isinstance(rollout, RolloutSample) else rollout.segments
    return any(segment.turn_rewards is not None or segment.advantages is not None for segment in segments)
