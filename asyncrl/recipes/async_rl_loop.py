"""`async_rl_loop`: rollouts and training overlap; you write one async rollout function.

    from asyncrl.recipes import async_rl_loop

    config = async_rl_loop.Config(base_model="Qwen/Qwen3-0.6B", dataset="train.jsonl", max_head_offpolicy_versions=2)
    async_rl_loop.main(config, rollout_fn=rollout)

Names and defaults are those of the hosted cookbook's recipe; docs/recipes.md maps each onto `asyncrl.Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from asyncrl.recipes.mapping import Settings
from asyncrl.recipes.policy import PolicyConfig, TISConfig, WandBConfig, start
from asyncrl.sections import NonNegativeInt

if TYPE_CHECKING:
    from asyncrl import TrainResult
    from asyncrl.data import Rows
    from asyncrl.lives import Resume

__all__ = ["Config", "TISConfig", "WandBConfig", "main"]


class Config(PolicyConfig):
    """All settings of the recipe. Frozen, and checked when it is made."""

    max_head_offpolicy_versions: NonNegativeInt = 0
    """O: no token is trained more than so many optimizer steps after the weights that drew it. 0 is on-policy."""

    def _staleness(self) -> Settings:
        # Weights that are never synchronised grow older without end: only `pace` can go on with them.
        return {"policy": "wait" if self.weight_sync_interval else "pace"}


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
    """Train, and return how the run ended.

    Args:
        config: The settings.
        rollout_fn_factory: `make_rollout(setup)`, which returns the rollout function, or a context manager around it.
        rollout_fn: `async def rollout(prompt)` itself: one of the two is needed.
        dynamic_filter_fn: From a group's rewards to whether it is trained; None filters groups of equal rewards.
        evaluation_fn: `async def evaluation_fn(evaluation)`, which measures one version: docs/evaluation.md. Called
            before and after training; training does not wait for it.
        evaluation_interval: Called during training too, whenever so many more optimizer steps are live.
        rows: Anything with len() and [index], in place of `config.dataset`.
        rollout_extras: What the factory finds in `setup.extras`.
        resume: None: go on from the newest checkpoint where `log_path` holds one, else begin. Anything else is as for
            `asyncrl.train`: False refuses a folder that holds a run.

    Raises: as `asyncrl.train`.
    """
    return start(
        config,
        rollout_fn_factory=rollout_fn_factory,
        rollout_fn=rollout_fn,
        dynamic_filter_fn=dynamic_filter_fn,
        rows=rows,
        rollout_extras=rollout_extras,
        resume=resume,
        evaluation_fn=evaluation_fn,
        evaluation_interval=evaluation_interval,
    )
