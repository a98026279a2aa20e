"""The words of the engine as types: what flows between its stages, and the seams between them.

    row -> Prompt -> rollout function -> RolloutSample | RolloutRun -> Group -> TrainSequence -> StepResult

Everything here is plain data: no torch, no clock, no I/O, so that a stage may live in another
thread, process or machine. N is the number of tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next tokens are drawn. The trainer divides its logits by the same temperature."""

    max_tokens: int
    """Most tokens to draw, the stop token included."""
    temperature: float = 1.0
    """0 is greedy (evaluation only)."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion. The stop token is part of the completion."""
    seed: int | None = None
    """Makes this one request reproducible on a given sampler; None draws freely."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Token ids in; a `Completion` comes out."""

    token_ids: Sequence[int]
    params: SamplingParams
    session: str = ""
    """Requests of one rollout share it: a sampler with replicas keeps them on one (prefix cache)."""
    version: int | None = None
    """Weights to sample with; None is the newest that is live."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the sampler drew. All three sequences have one entry per drawn token."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    """Behaviour log-probs: natural log, after temperature (and top-p, top-k where they are on)."""
    versions: Sequence[int]
    """The weights that drew each token, in optimizer steps."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """How busy one server of a sampler is."""

    name: str
    running: int
    waiting: int
    kv_use: float
    """Share of its KV cache in use, 0 to 1."""
    up: bool


def spread(requests: Mapping[int, float]) -> dict[str, float]:
    """How unevenly servers are loaded, as metrics, from the requests of each; nothing where there are none."""
    total = sum(requests.values())
    if len(requests) < 2 or not total:
        return {}
    busiest = max(requests, key=lambda number: requests[number])
    return {"replica_spread": requests[busiest] * len(requests) / total, "replica_busiest": float(busiest)}


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the sampler is. Counters only grow; gauges speak of now."""

    running: int
    """Requests that are being decoded."""
    waiting: int
    """Requests that wait for room."""
    kv_use: float | None = None
    """Share of the KV cache in use, 0 to 1; None where the sampler cannot say."""
    preemptions: int = 0
    """Counter: requests that were thrown out of the KV cache and start again."""
    rejected: int = 0
    """Counter: requests that were refused (queue full) or lost on the way."""
    generated_tokens: int = 0
    """Counter: tokens drawn since the start."""
    replicas_up: int | None = None
    """Servers that requests go to, now; None: the sampler has no servers."""
    replicas_lost: int = 0
    """Counter: servers that died, hung, or were out of reach."""
    servers: tuple[ServerLoad, ...] = ()

    def replicas(self) -> dict[str, float]:
        """What is known of servers, as metrics; nothing where there are none."""
        if self.replicas_up is None:
            return {}
        return {"replicas_up": self.replicas_up, "replicas_lost": self.replicas_lost, **spread(self.requests())}

    def requests(self) -> dict[int, float]:
        """At each server that is up, by its number from 1."""
        return {number: s.running + s.waiting for number, s in enumerate(self.servers, 1) if s.up}

    def by_server(self) -> dict[str, list[float]]:
        """For the live view: a list with an entry for each server; nothing where there are none."""
        if not self.servers:
            return {}
        return {
            "replica_running": [float(server.running) for server in self.servers],
            "replica_waiting": [float(server.waiting) for server in self.servers],
            "replica_kv": [server.kv_use for server in self.servers],
            "replica_up": [float(server.up) for server in self.servers],
        }


@dataclass(frozen=True, slots=True)
class Probe:
    """The canary: fixed tokens, and the trainer's log-probs for all of them but the first."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """[len(tokens) - 1], at temperature 1."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights on their way from the trainer to the sampler."""

    version: int
    """Optimizer steps behind these weights."""
    adapter: bool
    """True: a LoRA adapter alone; False: the whole model."""
    folder: Path | None = None
    """safetensors and config as `transformers` or `peft` open them, for samplers that read files."""
    tensors: Mapping[str, Any] | None = None
    """A snapshot of the tensors under their `transformers` / `peft` names, for samplers in this process."""
    probe: Probe | None = None
    """What the sampler must reproduce once these weights are live."""


@dataclass(frozen=True, slots=True)
class RolloutSample:
    """One trainable token sequence. The first four fields are the contract with the user."""

    tokens: Sequence[int]
    """[N] prompt, tool and generated tokens, in order."""
    logprobs: Sequence[float]
    """[N] behaviour log-probs; ignored where `loss_mask` is 0."""
    loss_mask: Sequence[int]
    """[N] 1 on tokens that the policy drew and that shall be trained, 0 elsewhere."""
    reward: float
    """Of the whole rollout. Finite."""
    versions: Sequence[int] | None = None
    """[N] the weights that drew each token; None: the oldest that this rollout's policy handle used."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold, for the rollout log: messages, the answer, why the reward is what it is."""
    advantages: Sequence[float] | None = None
    """[N] one per token, in place of what the group's comparison gives; ignored where `loss_mask` is 0."""
    turn_rewards: Sequence[float | None] | None = None
    """One per turn, beside `reward`: a turn is a stretch of ones in `loss_mask`. None: no reward of its own. They are
    compared over the group and discounted backwards (docs/objectives.md)."""

    @classmethod
    def from_completion(
        cls, prompt_tokens: Sequence[int], completion: Completion, reward: float, **info: Any
    ) -> RolloutSample:
        """The sample of a single-turn rollout: the prompt masked, the completion trained."""
        masked = len(prompt_tokens)
        return cls(
            tokens=[*prompt_tokens, *completion.tokens],
            logprobs=[0.0] * masked + list(completion.logprobs),
            loss_mask=[0] * masked + [1] * len(completion.tokens),
            reward=reward,
            versions=[0] * masked + list(completion.versions),
            info=info,
        )


@dataclass(frozen=True, slots=True)
class RolloutRun:
    """The samples of one rollout whose history branched or was rewritten: one member, one reward."""

    segments: Sequence[RolloutSample]
    """At least one. All carry the same reward."""

    @property
    def reward(self) -> float:
        return self.segments[-1].reward


Rollout = RolloutSample | RolloutRun
"""What a rollout function returns: one sequence, or several of one run."""


@dataclass(slots=True)
class Group:
    """The runs of one prompt, ready to be trained together."""

    sequence: int
    """Place in admission order."""
    row: int
    """Index of the dataset row."""
    epoch: int
    version: int
    """The version that was live when the group was admitted."""
    runs: list[RolloutRun]
    advantages: list[float]
    """One per run."""
    admitted_at: float
    finished_at: float
    seconds: list[float] = field(default_factory=list)
    """How long each run took, without the attempts that failed. One per run."""

    @property
    def rewards(self) -> list[float]:
        return [run.reward for run in self.runs]


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """One rollout of an evaluation."""

    version: int
    """The weights that are measured, in optimizer steps."""
    row: int
    """Index of the row in the evaluation's data."""
    run: RolloutRun
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainSequence:
    """One sample as the trainer sees it. All sequences are [N]."""

    tokens: Sequence[int]
    behavior_logprobs: Sequence[float]
    loss_mask: Sequence[int]
    advantage: float | Sequence[float]
    """Of the run, on every loss token; or one per token."""
    group: int
    """Samples of one group share a prompt."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer step did."""

    step: int
    """Optimizer steps taken so far, this one included: the version of the weights it made."""
    metrics: Mapping[str, float]
    """`loss`, `grad_norm`, `learning_rate`, `ppo_kl`, ...: names and meanings in docs/metrics.md."""


class Sampler(Protocol):
    """Draws tokens from the policy. Lives as an async context manager: `async with sampler: ...`.

    Raises `SamplerRequestError` for one bad request, `SamplerError` when it cannot go on.
    """

    wants: Literal["tensors", "files"]
    """The form of `Weights` that `publish` reads."""

    @property
    def version(self) -> int:
        """The newest weights that are live."""

    async def __aenter__(self) -> Sampler: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, request: SampleRequest) -> Completion:
        """Draw one completion. Cancelling this call frees its place in the engine."""

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        """Log-probs [N - start] of `token_ids[start:]` under the weights of `version`, at temperature 1.

        A sampler with replicas asks the one that serves `session`; None asks all of them, which must agree.
        """

    async def publish(self, weights: Weights) -> None:
        """Make `weights` live. On return, new requests are drawn from them."""

    def hold(self) -> AbstractContextManager[int | None]:
        """Keep the newest version live while the block lasts, whatever is published meanwhile: requests can be pinned
        to it. None: this sampler has one version at a time, and nothing is held."""

    async def load(self) -> Load:
        """How busy the sampler is, now."""


class Trainer(Protocol):
    """Turns sequences into gradients and gradients into weights. Lives as an async context manager."""

    async def __aenter__(self) -> Trainer: ...

    async def __aexit__(self, *exc: object) -> None: ...

    async def forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs [N - 1] of each sequence but its first token, at temperature 1."""

    async def forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        """Add the gradient of these sequences to that of the current optimizer batch."""

    async def optim_step(self) -> StepResult:
        """Normalise over the whole optimizer batch, clip, step, and start a new batch."""

    async def save_weights_for_sampler(self) -> Weights:
        """A snapshot of the current weights in the form that the sampler wants."""

    async def save_model(self, folder: Path) -> None:
        """Write the model or adapter as `transformers`, `peft` and vLLM open it."""

    async def save_state(self, folder: Path) -> Awaitable[None]:
        """Take a snapshot of weights, optimizer and randomness, to be written into `folder`, which does not exist yet.

        On return training may go on; the awaitable ends when every file is on the disk. It raises `OSError`, and
        `TrainerError` for weights that are not finite; nothing is left in `folder` then.
        """

    async def load_state_with_optimizer(self, folder: Path) -> int:
        """Go on from what `save_state` wrote, as if training had never stopped; gives its step.

        Raises `CheckpointError` for anything else: an exported model, another model or LoRA rank, a damaged file.
        """

    async def load_state(self, folder: Path) -> None:
        """Start at step 0, with a fresh optimizer, from the weights alone of what `save_state` wrote: they are what a
        KL refers to. Raises `CheckpointError` as `load_state_with_optimizer`."""
