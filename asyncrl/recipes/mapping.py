"""How the names of the hosted cookbook's recipes map onto `asyncrl.Config`: one table, read by code and docs.

`docs/recipes.md` holds it for people, and a test keeps the two equal.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from asyncrl.errors import ConfigError

Settings = dict[str, Any]

SETTINGS: Mapping[str, str] = {
    "log_path": "run_dir",
    "base_model": "model",
    "dataset": "dataset",
    "learning_rate": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "kl_beta": "loss.kl_beta",
    "completions_per_prompt": "completions_per_prompt",
    "max_completion_tokens": "sampling.max_tokens",
    "temperature": "sampling.temperature",
    "epochs": "data.epochs",
    "shuffle": "data.shuffle",
    "seed": "seed",
    "max_rows": "data.max_rows",
    "max_seq_len": "max_seq_len",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "prompt_groups_per_step": "prompt_groups_per_step",
    "max_head_offpolicy_versions": "staleness.max_staleness",
    "max_concurrency_rollout_sample": "concurrency.max_window",
    "min_group_size": "rollout.min_group_size",
    "max_incomplete_group_retries": "rollout.retries",
    "pipeline_chunks_per_step": "pipeline_chunks_per_step",
    "grad_accumulation_normalization": "loss.normalization",
    "grad_clip_norm": "optimizer.grad_clip_norm",
    "eps_clip": "loss.eps_low",
    "eps_clip_high": "loss.eps_high",
    "tis.cap": "loss.tis_cap",
    "tis.level": "loss.tis_level",
    "tis.icepop": "loss.tis_icepop",
    "tis.mis": "loss.tis_mis",
    "anchor_logp": "loss.anchor",
    "policy_loss": "policy_loss",
    "weight_sync_interval": "publish.weight_sync_interval",
    "weight_sync_timeout": "publish.timeout_s",
    "wandb.entity": "wandb.entity",
    "wandb.project": "wandb.project",
    "wandb.run_name": "wandb.run_name",
    "dcp_save_interval": "checkpoint.interval",
    "dcp_timeout": "checkpoint.timeout_s",
    "save_final_checkpoint": "checkpoint.final",
    "init_from_checkpoint": "checkpoint.init_from",
    "warm_start_from_adapter": "lora.warm_start",
    "output_model_id": "export_name",
}
"""Field of a recipe -> setting of `asyncrl.Config`."""

ALSO: Mapping[str, str] = {"save_final_checkpoint": "save_model"}
"""A field that is a second setting too, which `engine` may set apart."""

WHEN_GIVEN = frozenset(
    {"kl_beta", "eps_clip", "eps_clip_high", "tis", "grad_accumulation_normalization", "lora_rank", "lora_alpha"}
)
"""Passed on only when they are given: left out, they are the objective's own (the defaults shown are `grpo`'s), or
those of the adapter of `warm_start_from_adapter`."""

NO_MEANING: Mapping[str, str] = {
    "infra": "there is no training service here; the model is trained on this machine. `engine={'trainer': {...}}` "
    "has the settings of the trainer.",
    "ig_weight": "the gains of a group's turns are normalised, which takes any factor away again.",
    "scoring_workers": "the sampler scores beside what it draws; there are no threads to count.",
    "deployment": "there is no hosted deployment here; the sampler runs on this machine. `engine={'sampler': {...}}` "
    "has its settings.",
    "weight_sync": "its settings are fields of the recipe itself: weight_sync_interval, weight_sync_timeout, "
    "dcp_save_interval, dcp_timeout.",
    "first_checkpoint_type": "a hot-load always carries whole weights, or a whole adapter.",
    "weight_sync_before_training": "sampler and trainer load the same files, the canary compares the two before the "
    "first step, and an adapter of warm_start_from_adapter is hot-loaded then.",
}
"""Fields of the hosted recipes that are about hosting."""

PLAIN_WORDS = frozenset({"model"})
"""A setting whose name a message may use as the word that it is."""

_NOTES: Mapping[str, str] = {
    "max_head_offpolicy_versions": "a hard bound (`staleness.policy` is `wait`)",
    "max_concurrency_rollout_sample": "at least `completions_per_prompt`; None: adaptive",
    "max_incomplete_group_retries": "the missing members are drawn again, not the whole group",
    "log_path": "the run folder; None: `runs/<time>`",
    "output_model_id": "the folder of the trained model in the run folder; None: `model`",
    "dcp_save_interval": "0: off, and the run says so; None: as often as it costs less than 1 % of the time",
    "dcp_timeout": "longest time until a checkpoint is on the disk",
    "save_final_checkpoint": "a last checkpoint, and the trained model (`save_model`)",
    "init_from_checkpoint": "`RUN`, `RUN:step-000012` or a path: its weights, at step 0, with a new optimizer",
    "kl_beta": "left out: 0.001 for `grpo`, 0 for all others",
    "eps_clip": "left out: the objective's own",
    "eps_clip_high": "left out: the objective's own",
    "grad_accumulation_normalization": "left out: the objective's own, `num_loss_tokens` for most",
    "lora_rank": "0 trains the full model",
    "policy_loss": "a name or a function",
}


def nested(settings: Settings, path: str, value: Any) -> None:
    """`settings["a"]["b"] = value` for the path `a.b`."""
    *sections, leaf = path.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[leaf] = value


def engine_paths(engine: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"sampler": {"replicas": 2}}` -> `("sampler.replicas", 2)`; a section of `asyncrl.config` counts as a dict."""
    for name, value in engine.items():
        if isinstance(value, BaseModel):
            value = value.model_dump(exclude_unset=True)
        if isinstance(value, Mapping):
            yield from engine_paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def lay_over(settings: Settings, engine: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Add the settings of `engine`, in the names of `asyncrl.Config`, to those that come from the recipe's `fields`.

    Raises:
        ConfigError: one that a field of the recipe sets.
    """
    owners = {path: field for field, path in fields.items()}
    for path, value in engine_paths(engine):
        if path in owners:
            raise ConfigError(f"engine sets {path}, which is {owners[path]} in this recipe: set that instead.")
        nested(settings, path, value)


def in_these_words(message: str, fields: Mapping[str, str]) -> str:
    """What `asyncrl.Config` says, and what its settings are called in the recipe."""
    called = [
        f"{path} is {field} here"
        for field, path in fields.items()
        if field != path and path not in PLAIN_WORDS and re.search(rf"(?<![\w.]){re.escape(path)}(?!\w)", message)
    ]
    return f"{message}\n({'; '.join(called)})" if called else message


def mapping_table() -> str:
    """The table of `docs/recipes.md`."""
    rows = ["| recipe | `asyncrl.Config` | |", "|---|---|---|"]
    rows += [f"| `{field}` | `{path}` | {_NOTES.get(field, '')} |" for field, path in SETTINGS.items()]
    rows += [f"| `{field}` | | no such field: {why} |" for field, why in NO_MEANING.items()]
    return "\n".join(rows)
