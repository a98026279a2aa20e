"""What `async_rl_loop` and `rl_loop` share: their fields, how these become an `asyncrl.Config`, and the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PositiveFloat, PositiveInt, model_validator

import asyncrl
from asyncrl.config import Section, WandbConfig
from asyncrl.data import Rows
from asyncrl.errors import ConfigError
from asyncrl.lives import Resume
from asyncrl.recipes.base import RecipeConfig
from asyncrl.recipes.checkpoints import wanted
from asyncrl.recipes.mapping import NO_MEANING, WHEN_GIVEN, Settings, engine_paths
from asyncrl.rollout.factory import is_async, with_extras
from asyncrl.sections import NonNegativeFloat, NonNegativeInt

WandBConfig = WandbConfig
"""As the hosted recipes spell it."""


class TISConfig(Section):
    """Train/sampler correction, in the words of `asyncrl.losses.TIS`."""

    cap: NonNegativeFloat | None = 5.0
    level: Literal["token", "sequence"] = "token"
    icepop: float | None = None
    mis: tuple[float, float] | None = None


def _as_tis(value: Any) -> Any:
    """A number, or None for no weights, is the cap; `asyncrl.losses.TIS` is a dataclass of the same fields, and this
    side loads no torch."""
    if value is None or isinstance(value, int | float):
        return {"cap": value}
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


class PolicyConfig(RecipeConfig):
    """The fields of both recipes. docs/recipes.md says what each is in `asyncrl.Config`."""

    log_path: Path | None = None
    base_model: str
    dataset: str | None = None
    """A JSONL file; or pass `rows=` to `main`."""
    learning_rate: PositiveFloat = 1e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    kl_beta: NonNegativeFloat = 0.001
    completions_per_prompt: PositiveInt = 4
    max_completion_tokens: PositiveInt = 1024
    temperature: float = 1.0
    epochs: PositiveInt = 1
    shuffle: bool = True
    seed: int = 0
    max_rows: PositiveInt | None = None
    max_seq_len: PositiveInt | None = None
    lora_rank: NonNegativeInt = 0
    lora_alpha: PositiveFloat = 32.0
    prompt_groups_per_step: PositiveInt = 1
    max_concurrency_rollout_sample: PositiveInt | None = None
    min_group_size: PositiveInt = 1
    max_incomplete_group_retries: NonNegativeInt = 0
    pipeline_chunks_per_step: PositiveInt = 1
    grad_accumulation_normalization: (
        Literal["num_loss_tokens", "num_sequences", "sequence_mean", "none"] | PositiveFloat
    ) = "num_loss_tokens"
    grad_clip_norm: PositiveFloat | None = 1.0
    eps_clip: NonNegativeFloat = 0.2
    eps_clip_high: NonNegativeFloat | None = None
    tis: Annotated[TISConfig, BeforeValidator(_as_tis)] = TISConfig()
    """`asyncrl.losses.TIS(...)`, a dict of its fields, a number (the cap), or None (off)."""
    anchor_logp: Literal["old_policy", "rollout"] = "old_policy"
    policy_loss: str | Callable[..., Any] = "grpo"
    weight_sync_interval: NonNegativeInt = 1
    weight_sync_timeout: PositiveFloat = 600.0
    dcp_save_interval: NonNegativeInt | None = 0
    dcp_timeout: PositiveFloat = 2700.0
    save_final_checkpoint: bool = True
    init_from_checkpoint: str | None = None
    warm_start_from_adapter: Path | None = None
    output_model_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_a_meaning(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name in settings:
            if name in NO_MEANING:
                raise ValueError(f"{name} has no meaning here: {NO_MEANING[name]} Leave it out.")
        return settings

    @model_validator(mode="after")
    def _can_be_used(self) -> PolicyConfig:
        most, group = self.max_concurrency_rollout_sample, self.completions_per_prompt
        if most is not None and most < group:
            raise ValueError(
                f"max_concurrency_rollout_sample is {most}, but completions_per_prompt is {group}. Expected room "
                f"for the rollouts of one prompt at least: {group} or more, or None."
            )
        return self

    def settings(self) -> Settings:
        found = super().settings()
        return {**found, "staleness": self._staleness() | found.get("staleness", {})}

    def is_left_out(self, name: str) -> bool:
        return (name in WHEN_GIVEN and name not in self.model_fields_set) or super().is_left_out(name)

    def _staleness(self) -> Settings:
        """What the engine's section of that name is, from when weights are synchronised."""
        raise NotImplementedError


def start(
    config: PolicyConfig,
    *,
    rollout_fn_factory: Callable[..., Any] | None,
    rollout_fn: Callable[..., Any] | None,
    dynamic_filter_fn: Callable[[list[float]], bool] | None,
    rows: Rows | None,
    rollout_extras: Mapping[str, Any] | None,
    resume: Resume | None,
    evaluation_fn: Callable[..., Any] | None = None,
    evaluation_interval: int | None = None,
) -> asyncrl.TrainResult:
    """Train. Raises as `asyncrl.train`."""
    work = chosen_rollout(rollout_fn_factory, rollout_fn, rollout_extras)
    require_rows(config.dataset, rows)
    engine = config.engine_config(
        group_filter=dynamic_filter_fn, **evaluated(config, evaluation_fn, evaluation_interval)
    )
    return asyncrl.train(
        work, dataset=rows, config=engine, evaluation=evaluation_fn, resume=wanted(resume, config.log_path)
    )


def evaluated(config: PolicyConfig, function: Callable[..., Any] | None, interval: int | None) -> Settings:
    """The engine's section for evaluations, where `main` was given an interval.

    Raises:
        ConfigError: an interval without anything to evaluate, or `engine` sets another.
    """
    if interval is None:
        return {}
    paths = [(path.partition("."), value) for path, value in engine_paths(config.engine)]
    own = {leaf: value for (section, _, leaf), value in paths if section == "evaluation"}
    if "interval" in own:
        raise ConfigError("engine sets evaluation.interval, which is evaluation_interval of main: give one of them.")
    if function is None and own.get("dataset") is None:
        raise ConfigError(
            f"evaluation_interval is {interval}, but there is nothing to evaluate. Pass evaluation_fn, or "
            "engine={'evaluation': {'dataset': ...}} for the rollout function on held-out rows."
        )
    return {"evaluation": {**own, "interval": interval}}


def chosen_rollout(
    factory: Callable[..., Any] | None, rollout_fn: Callable[..., Any] | None, extras: Mapping[str, Any] | None
) -> Callable[..., Any]:
    """The rollout function, or the factory with its extras.

    Raises:
        ConfigError: none or both of them, extras without a factory, or an async factory.
    """
    if (factory is None) == (rollout_fn is None):
        found = "neither" if factory is None else "both"
        raise ConfigError(f"found {found} of rollout_fn_factory and rollout_fn. Expected exactly one of them.")
    if factory is not None:
        if is_async(factory):
            raise ConfigError(
                "rollout_fn_factory is an async function. Expected a plain function of `setup` that returns the "
                "rollout function, or an async context manager around it. The rollout function itself is rollout_fn."
            )
        return with_extras(factory, extras or {})
    assert rollout_fn is not None
    if extras:
        raise ConfigError(
            "rollout_extras are for a factory (`setup.extras`), but a rollout_fn was given. Pass rollout_fn_factory, "
            "or bind them to the function with functools.partial."
        )
    return rollout_fn


def require_rows(dataset: str | None, rows: Rows | None) -> None:
    if dataset is None and rows is None:
        raise ConfigError("there is no data. Set `dataset` to a JSONL file, or pass rows= to main.")
