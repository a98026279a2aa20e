"""Every setting of a run on one page, validated at birth.

A `Config` is frozen, knows no unknown field, and refuses combinations that cannot work, so that a
run that starts does not end an hour later for a reason that was known before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_serializer,
    model_validator,
)

from asyncrl.errors import ConfigError

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A group of settings: frozen, no unknown fields, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class DataConfig(Section):
    """Which rows are rolled out, in which order."""

    epochs: PositiveInt = 1
    """Passes over the dataset."""
    shuffle: bool = True
    """A new order each epoch, from `seed`."""
    max_rows: PositiveInt | None = None
    """Use only the first so many rows."""


class SamplingConfig(Section):
    """How the policy draws tokens while it is trained."""

    max_tokens: PositiveInt = 1024
    """Most tokens of one completion (one turn of an agent)."""
    temperature: PositiveFloat = 1.0
    """The trainer divides its logits by the same number. 0 is refused: greedy rollouts explore nothing."""
    top_p: Fraction = 1.0
    """Below 1 the sampler's distribution is truncated; the trainer does not replay that: watch `behavior_kl`."""
    top_k: NonNegativeInt = 0
    """0 is off. The same remark as for `top_p`."""


class RolloutConfig(Section):
    """What happens around one call of the rollout function."""

    timeout_s: PositiveFloat = 600.0
    """Longest life of one rollout; then it is cancelled and counts as a recoverable failure."""
    retries: NonNegativeInt = 2
    """How often one group member is drawn again after a recoverable failure."""
    min_group_size: PositiveInt = 1
    """A group with fewer survivors is rejected."""
    on_error: Literal["fail", "drop"] = "fail"
    """An unknown exception, or a malformed sample, ends the run (`fail`), or is drawn again like a
    recoverable failure (`drop`), at most `error_budget` times."""
    error_budget: NonNegativeInt = 100
    """Unknown exceptions that `on_error="drop"` forgives in one run."""


class StalenessConfig(Section):
    """How old the weights that drew a token may be when the token is trained."""

    policy: Literal["wait", "pace"] = "wait"
    """`wait`: a hard bound; a straggler is passed until its own bound is near, then waited for. `pace`: bounds the
    mean, and never waits for a straggler; what becomes of tokens over the bound is `on_stale`."""
    max_staleness: NonNegativeInt = 4
    """O, in optimizer steps. 0 is on-policy. Published gains come at 1 to 4 already (docs/staleness.md)."""
    on_stale: Literal["train", "mask", "requeue", "drop"] = "train"
    """`pace` only, for tokens over the bound: train them; mask them (younger tokens of the sample still train);
    roll the prompt out again; or drop the group."""

    @model_validator(mode="after")
    def _consistent(self) -> StalenessConfig:
        if self.policy == "wait" and self.on_stale != "train":
            raise ValueError(
                f"staleness.on_stale={self.on_stale!r} has no meaning with staleness.policy='wait': no token is "
                "ever over the bound there. Use policy='pace', or leave on_stale out."
            )
        return self


class ConcurrencyConfig(Section):
    """How many rollouts run at once. `min_window == max_window` is a fixed window."""

    min_window: PositiveInt = 1
    """Never fewer."""
    max_window: PositiveInt = 4096
    """Never more."""
    initial_window: PositiveInt = 16
    """The cold start. Clamped into [min_window, max_window]."""

    @model_validator(mode="after")
    def _consistent(self) -> ConcurrencyConfig:
        if self.min_window > self.max_window:
            raise ValueError(
                f"concurrency.min_window is {self.min_window} and max_window is {self.max_window}: "
                "min_window must not be larger."
            )
        return self


class SamplerConfig(Section):
    """Where tokens come from."""

    kind: Literal["auto", "vllm", "transformers"] = "auto"
    """`vllm`: a vLLM server, started here or found at `urls`. `transformers`: embedded in this process.
    `auto`: vLLM on a CUDA machine that has it installed, or when `urls` are given; else embedded."""
    urls: tuple[str, ...] = ()
    """Running vLLM servers to use instead of starting some."""
    replicas: PositiveInt = 1
    """vLLM servers to start. Each rollout stays on one of them."""
    port: NonNegativeInt = 0
    """First port of the servers that are started; 0 picks free ones."""
    in_flight: Literal["interrupt", "keep", "drain"] = "keep"
    """Full weights only. What a hot-load does to requests in flight: stop them and compute their past again
    under the new weights; go on over the old KV cache; or wait until they have ended."""
    version_policy: Literal["per_turn", "per_rollout"] = "per_turn"
    """`per_turn`: every request uses the newest weights. `per_rollout`: a rollout keeps the weights it began
    with (needs LoRA, or the embedded sampler)."""
    max_running: PositiveInt | None = None
    """Most requests that the engine decodes at once. None: vLLM's own default; embedded: 64 on CPU, 256 on GPU."""
    gpu_memory_utilization: Fraction = 0.45
    """Share of the GPU that vLLM may take; the trainer lives beside it on a machine with one GPU."""
    kv_cache_bytes: PositiveInt = 1 << 28
    """Size of vLLM's KV cache on a CPU."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for `vllm serve`."""
    start_timeout_s: PositiveFloat = 600.0
    """How long a server may take until it is ready."""
    request_timeout_s: PositiveFloat = 600.0
    """How long one request may take."""


class LossConfig(Section):
    """The objective: docs/objectives.md has the formulas."""

    eps_low: NonNegativeFloat = 0.2
    """The ratio is clipped below 1 - eps_low."""
    eps_high: NonNegativeFloat | None = None
    """... and above 1 + eps_high. None: as `eps_low`."""
    kl_beta: NonNegativeFloat = 0.001
    """Weight of the KL to the reference model. 0 switches the reference model off."""
    anchor: Literal["old_policy", "rollout"] = "old_policy"
    """What the ratio is taken against: the trainer's own log-probs before this step, or the sampler's."""
    tis_cap: PositiveFloat | None = 5.0
    """Cap of the importance weight old / behaviour. None switches the correction off."""
    tis_level: Literal["token", "sequence"] = "token"
    """One weight per token, or the geometric mean of the sequence for each of its tokens."""
    normalization: Literal["num_loss_tokens", "num_sequences", "sequence_mean", "none"] | PositiveFloat = (
        "num_loss_tokens"
    )
    """What the summed loss is divided by, over the whole optimizer batch. A number is a constant (Dr. GRPO)."""


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 1e-5
    """Of AdamW. The default suits full fine-tuning; adapters take about ten times as much."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 up to `learning_rate`."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """Decay of the means of the gradient and of its square. 0.95: the gradients of RL are noisy and change."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW). Off: it would pull the policy away from the model that it started from."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm. None: no clipping."""


class LoraConfig(Section):
    """Low-rank adapters by `peft`."""

    rank: NonNegativeInt = 0
    """0 trains the full model."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter, as `peft` names them."""


class TrainerConfig(Section):
    """Where and how the model is trained."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto`: CUDA where there is one, then Apple's MPS, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation: `auto` is bf16 autocast over float32 weights on CUDA, float32 elsewhere."""
    max_tokens_per_microbatch: PositiveInt = 8192
    """Tokens that go through the model at once. Memory grows with it, results do not change."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at once."""


class PublishConfig(Section):
    """How new weights reach the sampler."""

    weight_sync_interval: NonNegativeInt = 1
    """N: optimizer steps from one hot-load to the next. 0: the sampler keeps the weights it began with."""
    timeout_s: PositiveFloat = 600.0
    """Longest hot-load."""
    canary: bool = True
    """After each hot-load, sampler and trainer must agree on the log-probs of a fixed probe."""
    canary_tolerance: PositiveFloat | None = None
    """Largest difference. None: 1e-3 in float32, 0.25 in bfloat16 (rounding differs from kernel to kernel)."""


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
    """A name from `asyncrl.losses`, or a function like those."""
    advantage: str | Callable[[list[float]], list[float]] = "grpo"
    """`grpo`, `dr_grpo`, `rloo`, `reinforce`, or a function from a group's rewards to its advantages."""
    on_filtered: Literal["replace", "drop"] = "replace"
    """A group whose rewards are all equal carries no signal: fill its place in the batch, or leave it empty."""
    stall_timeout_s: PositiveFloat = 1800.0
    """The run ends with a report of who waits for what when nothing has moved for so long."""
    trackers: tuple[Literal["wandb", "tensorboard", "trackio"], ...] = ()
    """Beside `metrics.jsonl`, which is always written."""
    log_rollouts: NonNegativeInt = 2
    """Groups per step whose rollouts are written to `rollouts.jsonl`."""

    data: DataConfig = DataConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    concurrency: ConcurrencyConfig = ConcurrencyConfig()
    sampler: SamplerConfig = SamplerConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    trainer: TrainerConfig = TrainerConfig()
    publish: PublishConfig = PublishConfig()

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @property
    def budget_groups(self) -> int:
        """Groups that may be under way at once: (O + 1) B."""
        return (self.staleness.max_staleness + 1) * self.prompt_groups_per_step

    @model_validator(mode="after")
    def _can_make_progress(self) -> Config:
        self._check_staleness()
        self._check_rollouts()
        self._check_sampler()
        return self

    def _check_staleness(self) -> None:
        batch, budget = self.prompt_groups_per_step, self.budget_groups
        interval = self.publish.weight_sync_interval
        if interval == 0 and (self.staleness.policy == "wait" or self.staleness.on_stale != "train"):
            raise ValueError(
                "publish.weight_sync_interval is 0, so the sampler keeps its first weights and staleness grows "
                "without end; that cannot be bounded. Use staleness.policy='pace' with on_stale='train', "
                "or an interval of at least 1."
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

    @field_serializer("policy_loss", "advantage")
    def _name_of_function(self, value: Any) -> str:
        return value if isinstance(value, str) else f"{value.__module__}:{value.__qualname__}"


def explain(error: ValidationError) -> str:
    """One line per fault: which setting, what was found, what was expected."""
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "value_error":
            lines.append(str(fault["ctx"]["error"]))
        elif fault["type"] == "extra_forbidden":
            lines.append(f"{where}: there is no such setting. {_nearest(where)}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: this setting is needed.")
        else:
            lines.append(f"{where}: found {fault['input']!r}. {fault['msg']}.")
    return "\n".join(dict.fromkeys(lines))


def _nearest(path: str) -> str:
    """A hint at the setting that was probably meant, or where the list of all settings is."""
    import difflib

    names = list(_paths(Config))
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in names}
    leaf = path.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(path, names, 1, 0.75) or [
        by_leaf[match] for match in difflib.get_close_matches(leaf, list(by_leaf), 1, 0.75)
    ]
    return f"Did you mean {close[0]!r}?" if close else "docs/configuration.md lists them all."


def _paths(section: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, info in section.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _paths(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found
