"""`rl_loop`: synchronous GRPO with policy windows, on the same engine.

    from asyncrl.recipes import rl_loop

    rl_loop.main(rl_loop.Config(base_model="Qwen/Qwen3-0.6B", dataset="train.jsonl"), rollout_fn=rollout)

A window is the `weight_sync_interval` N optimizer steps between two hot-loads. The engine runs with a staleness bound
of N - 1, so its budget is exactly the groups of one window, and none of their places comes free before the weights
behind them are live: every group of a window begins, and is drawn to its end, with the weights that the window began
with. Inside a window rollouts and training overlap; at its boundary the last group has been trained before the
hot-load starts, and the next one is admitted when it is live.

N = 1 is strictly on-policy: sample, train, synchronise, repeat. N = 0 is one window without end: the sampler keeps the
weights that it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from asyncrl.recipes.mapping import Settings, engine_paths
from asyncrl.recipes.policy import PolicyConfig, TISConfig, WandBConfig, start

if TYPE_CHECKING:
    from asyncrl import TrainResult
    from asyncrl.data import Rows
    from asyncrl.lives import Resume

__all__ = ["Config", "TISConfig", "WandBConfig", "main"]

BATCHES_AHEAD = 1
"""With N = 0 nothing grows older by waiting, so the next batch is rolled out while this one is trained."""


class Config(PolicyConfig):
    """All settings of the recipe: those of `async_rl_loop`, but `weight_sync_interval` alone gives the staleness."""

    @model_validator(mode="after")
    def _windows_are_kept(self) -> Config:
        for path, _ in engine_paths(self.engine):
            if path.startswith("staleness."):
                raise ValueError(
                    f"engine sets {path}, but in rl_loop weight_sync_interval alone says how old weights may be. Set "
                    "that, or use async_rl_loop."
                )
        return self

    def _staleness(self) -> Settings:
        window = self.weight_sync_interval
        if not window:
            return {"policy": "pace", "max_staleness": BATCHES_AHEAD}
        return {"policy": "wait", "max_staleness": window - 1}


def main(
    config: Config,
    rollout_fn_factory: Callable[..., Any] | None = None,
    rollout_fn: Callable[..., Any] | None = None,
    dynamic_filter_fn: Callable[[list[float]], bool] | None = None,
    rows: Rows | None = None,
    rollout_extras: Mapping[str, Any] | None = None,
    resume: Resume | None = None,
) -> TrainResult:
    """Train, and return how the run ended. Arguments as of `async_rl_loop.main`."""
    return start(
        config,
        rollout_fn_factory=rollout_fn_factory,
        rollout_fn=rollout_fn,
        dynamic_filter_fn=dynamic_filter_fn,
        rows=rows,
        rollout_extras=rollout_extras,
        resume=resume,
    )
