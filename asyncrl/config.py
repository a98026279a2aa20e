"""Every setting of a run on one page, validated at birth.

A `Config` is frozen, knows no unknown field, and refuses combinations that cannot work, so that a
run that starts does not end an hour later for a reason that was known before. Its sections are in sections.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from asyncrl.errors import ConfigError
from asyncrl.sections import (
    LOSS_SETTING_OWNERS,
    POLICY_LOSS_NAMES,
    ChatConfig,
    CheckpointConfig,
    ConcurrencyConfig,
    DataConfig,
    EndpointConfig,
    EvaluationConfig,
    LoraConfig,
    LossConfig,
    NonNegativeInt,
    OptimizerConfig,
    PublishConfig,
    RolloutConfig,
    SamplerConfig,
    SamplingConfig,
    Section,
    Share,
    StalenessConfig,
    TrainerConfig,
    WandbConfig,
)

__all__ = [
    "ChatConfig",
    "CheckpointConfig",
    "ConcurrencyConfig",
    "Config",
    "DataConfig",
    "EndpointConfig",
    "EvaluationConfig",
    "LoraConfig",
    "LossConfig",
    "OptimizerConfig",
    "PublishConfig",
    "RolloutConfig",
    "SamplerConfig",
    "SamplingConfig",
    "Section",
    "StalenessConfig",
    "TrainerConfig",
    "WandbConfig",
    "explain",
]

GRPO_KL_BETA = 0.001
TAKEN_NAMES = frozenset({"checkpoints", "evaluation", "logs", "samples", "tensorboard", "timeline", "wandb", "weights"})


class Config(Section):
    """A whole run. Only `model` has no default."""

    model: str
    """Name on the Hugging Face hub, or a folder."""
    rollout_fn: str | None = None
    """`module:function` or `file.py:function`: for `asyncrl train CONFIG.toml`; in Python you pass the function."""
    dataset: str | None = None
    """A JSONL file: for `asyncrl train CONFIG.toml`; in Python you pass any rows."""
    run_dir: Path | None = None
    """The run folder. None: `runs/<time>`."""
    seed: int = 0
    """Of the data order, the initial adapter, and `prompt.rng`."""
    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps. None: when the data ends."""

    completions_per_prompt: PositiveInt = 4
    """G: rollouts of one prompt. The advantage compares them."""
    prompt_groups_per_step: PositiveInt = 8
    """B: groups of one optimizer step."""
    pipeline_chunks_per_step: PositiveInt = 1
    """K: the batch is trained in so many parts, each as soon as it is full."""
    max_seq_len: PositiveInt | None = None
    """Longest sample, prompt included. None: what the model allows, at most 8192."""
    policy_loss: str | Callable[..., Any] = "grpo"
    """The objective: a name, a function like those of `asyncrl.losses`, or `file.py:function` that names one."""
    advantage: str | Callable[[list[float]], list[float]] = "grpo"
    """`grpo`, `dr_grpo`, `rloo`, `reinforce`, or a function (`file.py:function` in a file) from a group's rewards to
    its advantages."""
    turn_discount: Share = 0.95
    """How much of what comes after a turn counts for the turn, where samples have `turn_rewards` (arXiv:2510.14967)."""
    on_filtered: Literal["replace", "drop"] = "replace"
    """A group without signal is filtered: fill its place in the batch, or leave it empty."""
    group_filter: str | Callable[[list[float]], bool] | None = None
    """A function (`file.py:function` in a file) from a group's rewards to whether the group is trained. None: a group
    whose rewards are all equal carries no signal."""
    signal_patience_groups: PositiveInt | None = None
    """End the run when fewer than a tenth of so many finished groups in a row carried signal: no prompt is begun any
    more, and what is under way is still trained. None: go on until the data ends."""
    stall_timeout_s: PositiveFloat = 1800.0
    """The run ends with a report of who waits for what when nothing has moved for so long."""
    stop_timeout_s: PositiveFloat = 300.0
    """After Ctrl-C or SIGTERM the step is finished, published and saved; the process ends after so long in any case. So
    it does when what has stalled does not let itself be ended."""
    deterministic: bool = False
    """The same seed gives the same weights, bit by bit, if rollout functions do the same. On-policy, with the embedded
    sampler, one request at a time and one thread on a CPU: for debugging, not for speed."""
    record_samples: bool = True
    """Keep what is trained on, so that `asyncrl replay` can train again from it."""
    record_timeline: bool = True
    """Keep when every rollout and every step began and ended: for `asyncrl trace`, `report` and `tune`."""
    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Beside `metrics.jsonl`, which is always written."""
    log_rollouts: NonNegativeInt = 2
    """Groups per step whose rollouts are written to `rollouts.jsonl`."""
    save_model: bool = True
    """Write the trained model or adapter when the run ends."""
    export_name: str = "model"
    """Folder of the trained model, inside the run folder."""

    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    chat: ChatConfig = ChatConfig()
    endpoint: EndpointConfig = EndpointConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    concurrency: ConcurrencyConfig = ConcurrencyConfig()
    sampler: SamplerConfig = SamplerConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    trainer: TrainerConfig = TrainerConfig()
    publish: PublishConfig = PublishConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: WandbConfig = WandbConfig()

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @property
    def budget_groups(self) -> int:
        """Groups that may be under way at once: (O + 1) B."""
        return (self.staleness.max_staleness + 1) * self.prompt_groups_per_step

    @property
    def kl_beta(self) -> float:
        """`loss.kl_beta`, or that of the objective."""
        if self.loss.kl_beta is not None:
            return self.loss.kl_beta
        return GRPO_KL_BETA if self.policy_loss == "grpo" else 0.0

    @property
    def normalization(self) -> Literal["num_loss_tokens", "num_sequences", "sequence_mean", "none"] | float:
        """`loss.normalization`, or that of the objective."""
        if self.loss.normalization != "auto":
            return self.loss.normalization
        return "sequence_mean" if self.policy_loss in ("gspo", "gspo_token") else "num_loss_tokens"

    @model_validator(mode="after")
    def _can_make_progress(self) -> Config:
        self._check_loss()
        self._check_staleness()
        self._check_rollouts()
        self._check_sampler()
        self._check_determinism()
        return self

    def _check_loss(self) -> None:
        loss = self.loss
        if isinstance(self.policy_loss, str) and ":" not in self.policy_loss:
            name = self.policy_loss
            if name not in POLICY_LOSS_NAMES:
                raise ValueError(
                    f"policy_loss is {name!r}. Expected one of {', '.join(POLICY_LOSS_NAMES)}, or a function from "
                    "asyncrl.losses.LossInputs to a loss per token."
                )
            if name != "grpo" and loss.kl_beta:
                raise ValueError(
                    f"loss_config.kl_beta must be 0/unset when method is {name.upper()}: it has no KL term, and the "
                    f"reference model would be loaded for nothing. Found loss.kl_beta={loss.kl_beta:g}."
                )
            for setting, owners in LOSS_SETTING_OWNERS.items():
                if getattr(loss, setting) and name not in owners:
                    raise ValueError(
                        f"loss.{setting} is {getattr(loss, setting):g}, but policy_loss={name!r} has no such setting; "
                        f"it belongs to {', '.join(owners)}. Leave it out."
                    )
            if name == "reinforce" and (loss.tis_level != "token" or loss.tis_icepop or loss.tis_mis):
                raise ValueError(
                    "policy_loss='reinforce' corrects by its own ratio to the sampler: loss.tis_level, tis_icepop and "
                    "tis_mis have no place in it. Leave them out, or use 'importance_sampling'."
                )
        elif callable(self.policy_loss) and loss.kl_beta and "kl_beta" not in _parameters(self.policy_loss):
            raise ValueError(
                f"loss.kl_beta is {loss.kl_beta:g}, but your policy_loss takes no `kl_beta`: the reference model would "
                "be loaded for nothing. Give the function that parameter, or leave loss.kl_beta out."
            )
        copy = self.trainer.reference_device is not None or self.trainer.reference_dtype != "auto"
        if copy and self.lora.rank:
            raise ValueError(
                "trainer.reference_device and reference_dtype are about the frozen copy of a full fine-tune; with "
                "lora.rank the reference is the base model with the adapter switched off. Leave them out."
            )

    def _check_staleness(self) -> None:
        batch, budget = self.prompt_groups_per_step, self.budget_groups
        interval = self.publish.weight_sync_interval
        if interval == 0 and (self.staleness.policy == "wait" or self.staleness.on_stale != "train"):
            raise ValueError(
                "publish.weight_sync_interval is 0, so the sampler keeps its first weights and staleness grows "
                "without end; that cannot be bounded. Use staleness.policy='pace' with on_stale='train', "
                "or an interval of at least 1."
            )
        if interval == 0 and self.evaluation.interval is not None:
            raise ValueError(
                f"evaluation.interval is {self.evaluation.interval}, but with publish.weight_sync_interval=0 the "
                "sampler keeps its first weights: every evaluation would measure the same. Leave the interval out."
            )
        least = self.staleness.min_staleness
        if interval == 0 and least is not None:
            raise ValueError(
                f"staleness.min_staleness is {least}, but with publish.weight_sync_interval=0 the sampler keeps its "
                "first weights: no bound holds, wherever it moves. Leave min_staleness out, or use an interval of at "
                "least 1."
            )
        if least is not None and interval > least + 1:
            raise ValueError(
                f"staleness.min_staleness is {least}, where no step could ever be published: {interval} steps of "
                f"{batch} groups do not fit into the staleness budget of ({least} + 1) x {batch}. Raise it to at least "
                f"{interval - 1}, or lower publish.weight_sync_interval; hot-loads come further apart by themselves "
                "where they are slow."
            )
        if interval * batch > budget:
            raise ValueError(
                f"no step could ever be published: {interval} steps of {batch} groups are {interval * batch} groups, "
                f"but the staleness budget is {budget} = (max_staleness {self.staleness.max_staleness} + 1) x {batch}"
                f". Raise staleness.max_staleness to at least {interval - 1}, or lower publish.weight_sync_interval."
            )
        if self.pipeline_chunks_per_step > batch:
            raise ValueError(
                f"pipeline_chunks_per_step is {self.pipeline_chunks_per_step}, but a step has only {batch} groups. "
                "Use at most one chunk per group."
            )

    def _check_rollouts(self) -> None:
        if self.rollout.min_group_size > self.completions_per_prompt:
            raise ValueError(
                f"rollout.min_group_size is {self.rollout.min_group_size}, but a group has only "
                f"completions_per_prompt={self.completions_per_prompt} members. Every group would be rejected."
            )
        if self.completions_per_prompt == 1 and self.advantage != "reinforce" and isinstance(self.advantage, str):
            raise ValueError(
                f"completions_per_prompt is 1, but advantage={self.advantage!r} compares the members of a group, and "
                "a group of one is always filtered. Use at least 2, or advantage='reinforce'."
            )
        if self.stall_timeout_s <= self.rollout.timeout_s:
            raise ValueError(
                f"stall_timeout_s is {self.stall_timeout_s:g}, but one rollout may take rollout.timeout_s="
                f"{self.rollout.timeout_s:g}. Set stall_timeout_s above it."
            )

    def _check_sampler(self) -> None:
        vllm = self.sampler.kind == "vllm" or bool(self.sampler.urls)
        if self.sampler.kind == "transformers" and self.sampler.urls:
            raise ValueError(
                "sampler.urls are given, but sampler.kind is 'transformers'. Use kind='vllm', or leave urls out."
            )
        if vllm and self.sampler.version_policy == "per_rollout" and self.lora.rank == 0:
            raise ValueError(
                "sampler.version_policy='per_rollout' needs several versions side by side, which vLLM has for LoRA "
                "adapters only. Set lora.rank, use version_policy='per_turn', or sampler.kind='transformers'."
            )

    def _check_determinism(self) -> None:
        if not self.deterministic:
            return
        if self.staleness.max_staleness:
            raise ValueError(
                f"deterministic is set, but staleness.max_staleness is {self.staleness.max_staleness}: which weights "
                "draw a token depends on how fast the machine is. Set staleness.max_staleness=0."
            )
        if self.sampler.kind == "vllm" or self.sampler.urls or self.sampler.replicas > 1:
            raise ValueError(
                "deterministic is set, but vLLM rounds differently for every batch that requests happen to share. Use "
                "sampler.kind='transformers', and leave sampler.urls and sampler.replicas out."
            )
        if self.signal_patience_groups is not None:
            raise ValueError(
                "deterministic is set, but signal_patience_groups looks at groups in the order in which they end, "
                "which depends on how fast the machine is. Leave it out, and set max_steps."
            )

    @field_validator("export_name")
    @classmethod
    def _is_a_plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", name) or name in TAKEN_NAMES:
            raise ValueError(
                f"export_name is {name!r}. Expected the plain name of a folder, of letters, digits, '.', '-' and '_', "
                f"and none of those that a run folder has anyway: {', '.join(sorted(TAKEN_NAMES))}."
            )
        return name

    @field_serializer("policy_loss", "advantage", "group_filter")
    def _name_of_function(self, value: Any) -> str | None:
        return value if value is None or isinstance(value, str) else f"{value.__module__}:{value.__qualname__}"


def _parameters(function: Callable[..., Any]) -> set[str]:
    """The names of its parameters; a function that takes any keyword has them all."""
    import inspect

    parameters = inspect.signature(function).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return set(LOSS_SETTING_OWNERS) if anything else set(parameters)


def explain(error: ValidationError, settings: type[BaseModel] | None = None) -> str:
    """One line per fault: which setting, what was found, what was expected. `settings`: if not those of `Config`."""
    lines: list[str] = []
    expected: dict[str, list[str]] = {}  # a setting of several kinds has one fault for each of them
    for fault in error.errors():
        where = _setting(fault["loc"], settings or Config)
        if fault["type"] == "value_error":
            lines.append(str(fault["ctx"]["error"]))
        elif fault["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such setting. {_nearest(where, settings or Config)}")
        elif fault["type"] == "model_type":
            lines.append(f"{where}: found {fault['input']!r}, but it is a section. Name its settings below [{where}].")
        elif fault["type"] == "missing":
            lines.append(f"{where}: this setting is needed.")
        else:
            expected.setdefault(f"{where}: found {fault['input']!r}. ", []).append(fault["msg"])
    for found, messages in expected.items():
        first, *others = dict.fromkeys(messages)
        lines.append(found + "; or ".join([first, *(other[0].lower() + other[1:] for other in others)]) + ".")
    return "\n".join(dict.fromkeys(lines))


def _setting(location: tuple[int | str, ...], settings: type[BaseModel]) -> str:
    """The dotted name of a setting, without pydantic's word for the kind that was tried."""
    path = [str(part) for part in location]
    names = set(_paths(settings))
    known = next((end for end in range(len(path), 0, -1) if ".".join(path[:end]) in names), len(path))
    return ".".join(path[:known])


def _nearest(path: str, settings: type[BaseModel]) -> str:
    """A hint at the setting that was probably meant, or where the list of all settings is."""
    import difflib

    names = list(_paths(settings))
    sections = {name.rpartition(".")[0] for name in names} - {""}
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in names}
    leaf = path.rsplit(".", 1)[-1]
    close = (
        difflib.get_close_matches(path, names, 1, 0.75)
        or difflib.get_close_matches(path, sorted(sections), 1, 0.85)
        or [by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), 1, 0.75)]
    )
    listed = "docs/configuration.md lists them all." if settings is Config else f"There are {', '.join(names)}."
    return f"Did you mean {close[0]!r}?" if close else listed


def _paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _paths(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
