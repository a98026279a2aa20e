"""The sections of a config: one class per concern, each setting with its meaning, its unit, and why that default."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from asyncrl.private import hide_secrets
from asyncrl.saved_adapter import read_adapter

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Limit = Literal["length", "context", "max_turns", "total_tokens"]
LAST_PORT = 65535
LimitChoice = Literal["stop", "truncate", "error"]


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

    @field_validator("temperature", mode="before")
    @classmethod
    def _explores(cls, value: object) -> object:
        if value in (0, "0"):
            raise ValueError(
                "sampling.temperature is 0: all rollouts of a prompt would be the same, so that no group carries "
                "signal and exploration ends. Use a temperature above 0."
            )
        return value


class ChatConfig(Section):
    """Conversations: `policy.chat` and the endpoint for agent programs."""

    history: Literal["keep", "render"] | None = None
    """What the model reads of its earlier turns. `keep`: what was drawn, token for token, thoughts included. `render`:
    what the chat template makes of them; where that differs from what was drawn (thoughts that are taken out, say),
    the conversation forks into another trained sequence. None: `keep`, and `render` for a template whose turns cannot
    be joined."""
    realign_tokens: NonNegativeInt = 0
    """When a history comes back that differs from what was drawn in at most so many last tokens of a turn, these tokens
    are given up (not trained) instead of forking."""
    template: dict[str, Any] = {}
    """More arguments for the chat template, such as `enable_thinking = false`."""
    on_limit: LimitChoice | dict[Limit, LimitChoice] = "stop"
    """What a conversation does at a limit: `stop` ends it and trains all of it; `truncate` ends it and gives the turn
    that was cut up; `error` draws the whole rollout again. One choice, or one for each of `length` (a turn's
    `max_tokens`), `context` (`max_seq_len`), `max_turns`, `total_tokens` (`max_total_tokens`)."""


class EndpointConfig(Section):
    """The server that agent programs use as their model, through `policy.openai_base_url`."""

    host: str = "127.0.0.1"
    """The address it listens on. Agents in containers need one that they can reach: then anyone on that network can,
    and only the key of each rollout stands before the model."""
    max_calls: PositiveInt = 1024
    """Most calls of one rollout, branches and sub-agents together."""


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
    min_staleness: NonNegativeInt | None = None
    """The bound moves between it and `max_staleness`, which remains the promise: it starts here, rises while the
    trainer waits for rollouts that it holds back, and falls when tokens are too off-policy or finished groups always
    wait. Hot-loads that take longer than a step then come further apart than `publish.weight_sync_interval`. None: the
    bound stays at `max_staleness`."""
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
        if self.min_staleness is not None and self.min_staleness > self.max_staleness:
            raise ValueError(
                f"staleness.min_staleness is {self.min_staleness} and max_staleness is {self.max_staleness}: the bound "
                "moves between them, so min_staleness must not be larger."
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
    port: Annotated[int, Field(ge=0, le=LAST_PORT)] = 0
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
    outage_timeout_s: PositiveFloat = 300.0
    """A server that dies or does not answer is started again; the run ends when none has answered for so long, and as
    long as the first start took."""

    @field_validator("urls")
    @classmethod
    def _are_servers(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if "@" in url.partition("://")[2].partition("/")[0]:
                raise ValueError(
                    f"sampler.urls: {hide_secrets(url)} holds a user name or a password, which would stand in "
                    "config.toml and in logs. Leave it out, and put the server's key into the variable VLLM_API_KEY."
                )
            if not re.fullmatch(r"https?://[^\s/]+(/[^\s?#]*)?", url) or url.rstrip("/").endswith("/v1"):
                raise ValueError(
                    f"sampler.urls holds {url!r}. Expected where a server listens, without the path of an API: "
                    "'http://127.0.0.1:8000'."
                )
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(
                f"sampler.urls names a server twice: {', '.join(urls)}. Each is one replica: name it once."
            )
        return urls

    @model_validator(mode="after")
    def _have_ports(self) -> SamplerConfig:
        if self.port and self.port + self.replicas - 1 > LAST_PORT:
            raise ValueError(
                f"sampler.port is {self.port} and sampler.replicas {self.replicas}: the last replica would need a port "
                f"above {LAST_PORT}. Lower sampler.port, or set it to 0 to have free ports picked."
            )
        return self


POLICY_LOSS_NAMES = ("grpo", "importance_sampling", "reinforce", "dapo", "gspo", "gspo_token", "cispo", "dro")

CLIPPED = ("grpo", "importance_sampling", "dapo", "gspo", "gspo_token", "cispo")
LOSS_SETTING_OWNERS: dict[str, tuple[str, ...]] = {
    "eps_low": CLIPPED,
    "eps_high": CLIPPED,
    "kl_beta": ("grpo",),
    "dual_clip": ("dapo",),
    "dro_beta": ("dro",),
}
"""Settings of `LossConfig` that only some objectives have."""


class LossConfig(Section):
    """The objective: docs/objectives.md has the formulas. None leaves a setting to the objective."""

    eps_low: NonNegativeFloat | None = None
    """The ratio is clipped below 1 - eps_low. None: 0.2; for `gspo` 3e-4; no clip for `importance_sampling`."""
    eps_high: NonNegativeFloat | None = None
    """... and above 1 + eps_high. None: `grpo` as `eps_low`; `dapo`, `cispo` 0.28; `gspo` 4e-4."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """`dapo` only: where the advantage is negative, the loss of a token is at most so many times its size."""
    kl_beta: NonNegativeFloat | None = None
    """Weight of the KL to the reference model. None: 0.001 for `grpo`, 0 for all others. 0: no reference model."""
    dro_beta: NonNegativeFloat | None = None
    """`dro` only: how strongly the log-probs are held to the anchor. None: 0.05."""
    anchor: Literal["old_policy", "rollout"] = "old_policy"
    """What the ratio is taken against: the trainer's own log-probs before this step, or the sampler's."""
    tis_cap: NonNegativeFloat | None = 5.0
    """Cap of the importance weight old / behaviour. None switches the weights off."""
    tis_level: Literal["token", "sequence"] = "token"
    """One weight per token, or the geometric mean of the sequence for each of its tokens."""
    tis_icepop: Annotated[float, Field(ge=1)] | None = None
    """c: tokens whose old / behaviour is outside [1/c, c] are left out of the loss."""
    tis_mis: tuple[NonNegativeFloat, PositiveFloat] | None = None
    """(low, high): sequences whose geometric mean of old / behaviour is outside are left out of the loss."""
    normalization: Literal["auto", "num_loss_tokens", "num_sequences", "sequence_mean", "none"] | PositiveFloat = "auto"
    """What the summed loss is divided by, over the whole optimizer batch; a number is a constant (Dr. GRPO).
    `auto`: `sequence_mean` for `gspo` and `gspo_token`, else `num_loss_tokens`."""

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        if self.tis_cap == 0:
            raise ValueError(
                "loss.tis_cap is 0: every weight would be 0, and the loss silent. Use a cap above 0, such as 5, or "
                "None to switch the weights off."
            )
        if self.tis_icepop is not None and self.tis_level == "sequence":
            raise ValueError(
                f"loss.tis_icepop={self.tis_icepop:g} leaves out single tokens, but loss.tis_level is 'sequence'. "
                "Use tis_level='token', or loss.tis_mis to leave out sequences."
            )
        if self.tis_mis is not None and not self.tis_mis[0] < self.tis_mis[1]:
            raise ValueError(f"loss.tis_mis is {self.tis_mis}. Expected (low, high) with low < high.")
        if self.anchor == "rollout" and (self.tis_icepop is not None or self.tis_mis is not None):
            raise ValueError(
                "loss.tis_icepop and loss.tis_mis look at old / behaviour, which is 1 everywhere with "
                "loss.anchor='rollout': they would filter nothing. Use anchor='old_policy'."
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 1e-5
    """Of AdamW. The default suits full fine-tuning; adapters take about ten times as much."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall towards `min_rate_ratio` at the last step."""
    min_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of `learning_rate` that a falling schedule ends at."""
    warmup_steps: NonNegativeInt = 0
    """Steps from 0 up to `learning_rate`."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the means of the gradient and of its square. 0.95: the gradients of RL are noisy and change."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second mean."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled (AdamW). Off: it would pull the policy away from the model that it started from."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm. None: no clipping."""
    state_bits: Literal[32, 8] = 32
    """Of both means of a matrix; those of vectors have 32. 8 takes a quarter of their memory, by `bitsandbytes`."""


class LoraConfig(Section):
    """Low-rank adapters by `peft`."""

    rank: NonNegativeInt = 0
    """0 trains the full model."""
    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter, as `peft` names them."""
    warm_start: Path | None = None
    """Folder of a saved `peft` adapter to go on from: rank, alpha and targets are those it was saved with. It is
    version 0, and what a KL refers to."""

    @model_validator(mode="before")
    @classmethod
    def _as_saved(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or settings.get("warm_start") is None:
            return settings
        saved = read_adapter(Path(settings["warm_start"]))
        facts = {"rank": saved.rank, "alpha": saved.alpha, "targets": saved.targets}
        for name, found in facts.items():
            given = settings.get(name, found)
            same = tuple(sorted(given)) == found if isinstance(given, list | tuple) else given == found
            if not same:
                raise ValueError(
                    f"lora.{name} is {given!r}, but the adapter of lora.warm_start in {str(saved.folder)!r} has "
                    f"{found!r}. Leave lora.{name} out: it is read from there."
                )
        return {**settings, **facts}


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
    reference_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen copy that a full fine-tune keeps for a KL. `auto`: as it is computed in."""
    reference_device: str | None = None
    """Where that copy lies, such as "cpu" or "cuda:1". None: with the trained model."""
    share_prompts: bool = True
    """Compute what sequences of a group have in common once instead of once for each. Results do not change."""
    skip_steps: NonNegativeInt = 2
    """Optimizer steps in a row that may be given up, because their loss or gradient is not finite or memory ran out.
    Their groups are rejected; one more ends the run."""
    compile: bool = False
    """Run the model's layers through `torch.compile`: slow first steps, faster later ones on a GPU."""


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


class CheckpointConfig(Section):
    """What a run that ends early goes on from: docs/durability.md."""

    interval: NonNegativeInt | None = None
    """Optimizer steps from one checkpoint to the next. None: as often as it costs less than 1 % of the time, and at
    most once a minute. 0: none on the way, so that a run that is killed starts again."""
    keep_last: PositiveInt = 2
    """So many stay; older ones are removed."""
    keep_every: PositiveInt | None = None
    """Those whose step is a multiple of it stay too."""
    final: bool = True
    """One more when the run ends, however it ends."""
    init_from: str | None = None
    """Start at step 0 from the weights of a checkpoint: a run folder (its newest), `RUN:step-000012`, or a path."""
    timeout_s: PositiveFloat = 2700.0
    """Longest time until a checkpoint is on the disk."""


class EvaluationConfig(Section):
    """Held-out prompts, rolled out to be measured and never trained on: docs/evaluation.md."""

    dataset: str | None = None
    """A JSONL file; in Python you may pass `evaluation=` rows, or a function, to `asyncrl.train`."""
    interval: PositiveInt | None = None
    """Also during training: whenever so many more optimizer steps are live in the sampler. None: before and after."""
    samples: PositiveInt = 1
    """Rollouts of each held-out prompt. With several there is pass@k."""
    concurrency: PositiveInt | None = None
    """Rollouts of an evaluation that run at once, never more than `concurrency.max_window`. During training they take
    slots of its window. None: an eighth of the window during training, else 64."""
    temperature: NonNegativeFloat | None = None
    """None: that of training, so that what is measured is what is trained. 0 is greedy."""

    @model_validator(mode="after")
    def _consistent(self) -> EvaluationConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"evaluation.samples is {self.samples}, but with evaluation.temperature=0 all rollouts of a prompt are "
                "the same. Use one sample, or a temperature above 0."
            )
        return self


class WandbConfig(Section):
    """Weights & Biases, when `trackers` names it. Where a setting is None, the variables of `wandb` rule."""

    entity: str | None = None
    """The user or team that owns the run."""
    project: str | None = None
    """None: `WANDB_PROJECT`, or else `asyncrl`."""
    run_name: str | None = None
    """None: the name of the run folder."""
