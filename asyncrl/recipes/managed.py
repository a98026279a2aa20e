"""The simple surface of a managed service: a method by name, a dozen parameters, each with its range.

    from asyncrl.recipes import managed

    managed.main(managed.Config(base_model="Qwen/Qwen3-0.6B", dataset="train.jsonl", method="dapo"), rollout_fn=rollout)

A value outside its range is refused with the range and the reason: these are the ranges in which LoRA fine-tuning by
reinforcement is known to work. Whoever wants to leave them uses `async_rl_loop` or `asyncrl.Config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

import asyncrl
from asyncrl.data import Rows
from asyncrl.lives import Resume
from asyncrl.recipes.base import RecipeConfig
from asyncrl.recipes.checkpoints import wanted
from asyncrl.recipes.mapping import Settings, nested
from asyncrl.recipes.policy import chosen_rollout, require_rows

Method = Literal["grpo", "dapo", "gspo-token"]

METHODS: Mapping[str, Settings] = {
    "grpo": {
        "policy_loss": "grpo",
        "loss": {"eps_low": 0.2, "eps_high": 0.2, "kl_beta": 0.001, "normalization": "num_loss_tokens"},
    },
    "dapo": {
        "policy_loss": "dapo",
        "loss": {"eps_low": 0.2, "eps_high": 0.28, "kl_beta": 0.0, "normalization": "num_loss_tokens"},
    },
    "gspo-token": {
        "policy_loss": "gspo_token",
        "loss": {"eps_low": 3e-4, "eps_high": 4e-4, "kl_beta": 0.0, "normalization": "sequence_mean"},
    },
}
"""The presets: objective, clip range, KL, reduction."""


@dataclass(frozen=True, slots=True)
class Range:
    """What a parameter may be, both ends included, and why nothing else."""

    low: float
    high: float | None
    why: str
    only: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.only:
            return f"{', '.join(map(str, self.only[:-1]))} or {self.only[-1]}"
        return f"at least {self.low:g}" if self.high is None else f"{self.low:g} to {self.high:g}"

    def holds(self, value: float) -> bool:
        if self.only:
            return value in self.only
        return self.low <= value and (self.high is None or value <= self.high)


RANGES: Mapping[str, Range] = {
    "learning_rate": Range(1e-5, 5e-4, "an adapter hardly moves below, and falls apart above"),
    "epochs": Range(1, 10, "after ten passes over the same prompts the model repeats what it knows of them"),
    "lora_rank": Range(4, 32, "reinforcement carries little information, and more rank buys nothing", (4, 8, 16, 32)),
    "kl_beta": Range(0.0, None, "a negative KL would drive the policy away from where it began"),
    "temperature": Range(0.1, 2.0, "0 is greedy, which ends exploration, and above 2 the text falls apart"),
    "top_p": Range(0.0, 1.0, "it is the share of the probability that is kept"),
    "top_k": Range(0, 100, "0 is off, and beyond 100 tokens it cuts off next to nothing"),
    "n": Range(2, None, "a response is judged against the others of its prompt, and a single one has none"),
    "max_tokens": Range(16, 16384, "below there is no room for an answer, above no sequence fits the trainer"),
}

SETTINGS: Mapping[str, str] = {
    "log_path": "run_dir",
    "base_model": "model",
    "dataset": "dataset",
    "learning_rate": "optimizer.learning_rate",
    "epochs": "data.epochs",
    "lora_rank": "lora.rank",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "n": "completions_per_prompt",
    "max_tokens": "sampling.max_tokens",
    "max_seq_len": "max_seq_len",
    "max_concurrent_rollouts": "concurrency.max_window",
    "signal_patience_groups": "signal_patience_groups",
    "seed": "seed",
    "output_model_id": "export_name",
}
"""Parameter -> setting of `asyncrl.Config`. `method`, `kl_beta`, `batch_size` and `wandb` have several."""


class Config(RecipeConfig):
    """All parameters. Frozen, and checked when it is made."""

    base_model: str
    dataset: str | None = None
    """A JSONL file; or pass `rows=` to `main`."""
    method: Method = "grpo"
    learning_rate: float = 1e-4
    epochs: int = 1
    lora_rank: int = 8
    batch_size: PositiveInt = 32768
    """Of one optimizer step, in tokens: it holds `batch_size // max_seq_len` sequences, in whole groups of `n` and at
    least one of them."""
    max_seq_len: PositiveInt | None = None
    """Longest sequence, prompt and all turns. None: 2 `max_tokens`, room for a prompt as long as its response."""
    kl_beta: float = 0.0
    """0: the method's own, which is 0.001 for `grpo`."""
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 40
    n: int = 8
    """Responses to one prompt."""
    max_tokens: int = 2048
    """Of one response (one turn of an agent)."""
    max_concurrent_rollouts: PositiveInt | None = None
    """Throughput only. None: adaptive."""
    signal_patience_groups: PositiveInt | None = None
    """End the run when nearly no group of the last so many carried signal. None: never."""
    log_path: Path | None = None
    output_model_id: str | None = None
    """The folder of the trained adapter in the run folder."""
    seed: int = 0

    @property
    def sequence_tokens(self) -> int:
        """`max_seq_len`, or what stands for it."""
        return self.max_seq_len or 2 * self.max_tokens

    @property
    def prompt_groups_per_step(self) -> int:
        """Groups of `n` sequences that fit into `batch_size`."""
        return max(1, self.batch_size // self.sequence_tokens // self.n)

    @model_validator(mode="after")
    def _in_range(self) -> Config:
        for name, allowed in RANGES.items():
            value = getattr(self, name)
            if not allowed.holds(value):
                raise ValueError(f"{name} is {value:g}. Expected {allowed}: {allowed.why}.")
        if self.top_p == 0 or self.top_k == 1:
            name, value = ("top_p", self.top_p) if self.top_p == 0 else ("top_k", self.top_k)
            raise ValueError(f"{name} is {value:g}, which leaves one token to draw: greedy, which ends exploration.")
        if self.max_tokens >= self.sequence_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, but a whole sequence has max_seq_len={self.max_seq_len} tokens. "
                "Expected less, so that a prompt fits too: raise max_seq_len, or lower max_tokens."
            )
        return self

    @model_validator(mode="after")
    def _kl_has_a_place(self) -> Config:
        if self.kl_beta and self.method != "grpo":
            method = self.method.upper().replace("-", "_")
            raise ValueError(f"loss_config.kl_beta must be 0/unset when method is {method}")
        return self

    def fields(self) -> dict[str, str]:
        return {"method": "policy_loss", "batch_size": "prompt_groups_per_step", **SETTINGS}

    def settings(self) -> Settings:
        preset = METHODS[self.method]
        settings: Settings = {"policy_loss": preset["policy_loss"], "loss": dict(preset["loss"])}
        if self.kl_beta:
            nested(settings, "loss.kl_beta", self.kl_beta)
        for name, path in SETTINGS.items():
            if getattr(self, name) is not None:
                nested(settings, path, getattr(self, name))
        settings |= {"prompt_groups_per_step": self.prompt_groups_per_step, "max_seq_len": self.sequence_tokens}
        return settings if self.wandb is None else {**settings, "wandb": self.wandb}


def main(
    config: Config,
    rollout_fn_factory: Callable[..., Any] | None = None,
    rollout_fn: Callable[..., Any] | None = None,
    rows: Rows | None = None,
    rollout_extras: Mapping[str, Any] | None = None,
    resume: Resume | None = None,
) -> asyncrl.TrainResult:
    """Train, and return how the run ended. Arguments as of `async_rl_loop.main`."""
    work = chosen_rollout(rollout_fn_factory, rollout_fn, rollout_extras)
    require_rows(config.dataset, rows)
    return asyncrl.train(work, dataset=rows, config=config.engine_config(), resume=wanted(resume, config.log_path))


def parameters_table() -> str:
    """The table of `docs/recipes.md`."""
    lines = ["| parameter | default | range |", "|---|---|---|"]
    for name, allowed in RANGES.items():
        lines.append(f"| `{name}` | {Config.model_fields[name].default:g} | {allowed} |")
    return "\n".join(lines)
