"""What `sft_loop`, `dpo_loop` and `orpo_loop` share: their fields, and how these become an `asyncrl.Config`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from asyncrl.recipes.base import RecipeConfig
from asyncrl.recipes.mapping import Settings
from asyncrl.sections import NonNegativeFloat, NonNegativeInt

OnTooLong = Literal["skip", "truncate", "error"]

OWN_SETTINGS: Mapping[str, str] = {
    "max_steps": "max_steps",
    "warmup_steps": "optimizer.warmup_steps",
    "weight_decay": "optimizer.weight_decay",
}
"""Field of these recipes -> setting of `asyncrl.Config`, beside those that all recipes share."""

OF_THE_ADAPTER = frozenset({"lora_rank", "lora_alpha"})
"""Those of `warm_start_from_adapter`, unless they are given: then they must be the same."""

ENGINE_SECTIONS = ("trainer", "optimizer", "lora", "checkpoint", "trackers", "wandb", "save_model", "stop_timeout_s")
"""The parts of `asyncrl.Config` that training without rollouts has a use for."""


class SupervisedConfig(RecipeConfig):
    """The fields of the three recipes. Names that `async_rl_loop` has too mean the same there."""

    log_path: Path | None = None
    """The run folder. None: `runs/<time>`."""
    base_model: str
    """Name on the Hugging Face hub, or a folder."""
    dataset: str | None = None
    """A JSONL file; or pass `rows=` to `main`. docs/supervised.md has the shapes of rows."""
    evaluation_dataset: str | None = None
    """Held-out rows, measured before and after training; or pass `evaluation_rows=` to `main`."""
    learning_rate: PositiveFloat = 2e-5
    """Suits full fine-tuning; adapters take about ten times as much."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: stay, or fall towards 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 up to `learning_rate`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW)."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm. None: no clipping."""
    batch_size: PositiveInt = 32
    """Rows (pairs, for preferences) of one optimizer step; the last batch of an epoch may be smaller. Memory does not
    grow with it: `engine={"trainer": {"max_tokens_per_microbatch": ...}}` says what goes through the model at once."""
    epochs: PositiveInt = 1
    """Passes over the dataset."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps. None: when the epochs are over."""
    shuffle: bool = True
    """A new order each epoch, from `seed`."""
    seed: int = 0
    """Of the data order and the initial adapter."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows."""
    max_seq_len: PositiveInt | None = None
    """Longest sequence in tokens. None: what the model allows, at most 8192."""
    on_too_long: OnTooLong = "skip"
    """What becomes of a row with a longer one: it is left out, or cut at its end (both are counted), or refused."""
    lora_rank: NonNegativeInt = 0
    """0 trains the full model."""
    lora_alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""
    warm_start_from_adapter: Path | None = None
    """Folder of a saved `peft` adapter to go on from."""
    dcp_save_interval: NonNegativeInt | None = None
    """Optimizer steps from one checkpoint to the next. None: as often as it costs less than 1 % of the time, and at
    most once a minute. 0: none."""
    dcp_timeout: PositiveFloat = 2700.0
    """Longest time until a checkpoint is on the disk, in seconds."""
    save_final_checkpoint: bool = True
    """A last checkpoint when the run ends, however it ends; and the trained model."""
    init_from_checkpoint: str | None = None
    """Start at step 0 from the weights of a checkpoint: a run folder (its newest), `RUN:step-000012`, or a path."""
    output_model_id: str | None = None
    """Folder of the trained model in the run folder. None: `model`."""
    engine: Mapping[str, Any] = {}
    """Settings of `asyncrl.Config` that have no name here, from its sections `trainer`, `optimizer`, `lora` and
    `checkpoint`, and `trackers`: `{"trainer": {"gradient_checkpointing": True}}`."""

    @model_validator(mode="after")
    def _engine_has_a_use(self) -> SupervisedConfig:
        if useless := [name for name in self.engine if name not in ENGINE_SECTIONS]:
            raise ValueError(
                f"engine.{useless[0]} has no use in this recipe: there are no rollouts, and the objective is its own. "
                f"Expected {', '.join(ENGINE_SECTIONS)}."
            )
        return self

    def fields(self) -> dict[str, str]:
        return {**super().fields(), **OWN_SETTINGS}

    def settings(self) -> Settings:
        return {"loss": {"kl_beta": 0.0}, **super().settings()}

    def is_left_out(self, name: str) -> bool:
        if name in OF_THE_ADAPTER and self.warm_start_from_adapter is not None:
            return name not in self.model_fields_set
        return super().is_left_out(name)
