"""The trainer: sequences in, gradients, optimizer steps, weights out. Synchronous, on one device.

    forward_backward (any number of times) -> optim_step -> save_weights_for_sampler

Gradients accumulate as plain sums; `optim_step` divides them once by what the whole optimizer batch holds,
so that the result does not depend on how the batch was cut into chunks and microbatches.
T tokens of a microbatch, N loss tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.errors import ConfigError, StepFailed, TrainerError
from asyncrl.losses import (
    TIS,
    Counts,
    LossInputs,
    MetricSums,
    Normalization,
    accepted_settings,
    clip_of,
    find_policy_loss,
    loss_sum,
    metric_sums,
    policy_loss,
)
from asyncrl.training.accumulator import Accumulator
from asyncrl.training.batch import Batch, Tokens, check_sequences, check_tokens, make_batch, make_tokens
from asyncrl.training.checkpoint import State, StateWriter
from asyncrl.training.columns import Columns, token_columns, train_columns
from asyncrl.training.diagnosis import (
    free_memory_of,
    is_out_of_memory,
    loss_not_finite,
    memory_exhausted,
    require_finite,
    sequences_named,
    step_not_finite,
)
from asyncrl.training.export import prune, snapshot, write_folder, write_model
from asyncrl.training.facts import Facts, digest_of_values
from asyncrl.training.logprobs import TokenLogprobs
from asyncrl.training.model import PolicyModel, load_policy
from asyncrl.training.optimizer import (
    check_schedule,
    learning_rate,
    make_optimizer,
    normalize_and_clip,
    optimizer_tensors,
    restore_optimizer,
)
from asyncrl.training.plan import Cut, plan
from asyncrl.training.randomness import randomness, restore_randomness
from asyncrl.training.reference import Reference, make_reference
from asyncrl.training.saved_state import SavedState
from asyncrl.types import Probe, StepResult, TrainSequence, Weights

LossFunction = Callable[[LossInputs], Tensor]
MicrobatchLoss = Callable[[Batch, TokenLogprobs], tuple[Tensor, LossInputs, MetricSums | None]]

PROBE_TOKENS = 16


class TorchTrainer:
    """Owns the trained model, the optimizer, and the batch that is being accumulated.

    Every verb blocks until it is done. Raises `ModelError` and `ConfigError` on construction, `TrainerError` later;
    after `StepFailed`, the weights are those of the last step that succeeded, and the batch is empty.
    """

    def __init__(
        self,
        config: Config,
        *,
        total_steps: int | None,
        weights_format: Literal["tensors", "files"],
        publish_folder: Path | None = None,
        reference: bool | None = None,
    ) -> None:
        """`total_steps` is what the learning rate falls over; `publish_folder` takes the folders of "files".

        `reference`: whether to keep the model as it is now for reference log-probs. None: if the loss asks for them.
        """
        if weights_format == "files" and publish_folder is None:
            raise ConfigError("the sampler reads weights from files, but no publish_folder was given. Name one.")
        check_schedule(config.optimizer, total_steps)
        self._config, self._total_steps = config, total_steps
        self._weights_format, self._publish_folder = weights_format, publish_folder
        self._loss = find_policy_loss(config.policy_loss)
        self._settings = accepted_settings(self._loss, loss_settings(config))
        self._clip = clip_of(self._loss, self._settings)
        if config.kl_beta and "kl_beta" not in self._settings:  # a function that the config knew by its name alone
            raise ConfigError(
                f"loss.kl_beta is {config.kl_beta:g}, but policy_loss={config.policy_loss!r} takes no `kl_beta`: the "
                "reference model would be loaded for nothing. Give the function that parameter, or leave kl_beta out."
            )
        self._policy = load_policy(config)
        self._named = {
            name: weight for name, weight in self._policy.causal_lm.named_parameters() if weight.requires_grad
        }
        self._parameters = list(self._named.values())
        self._facts = Facts.of(self._policy, config)
        self._reference: Reference | None = None
        if config.kl_beta > 0 if reference is None else reference:
            self._refer_to_this()
        self._optimizer = make_optimizer(self._parameters, config.optimizer)
        self._states = StateWriter(config.checkpoint.timeout_s)
        self._step = 0
        self._within_step = False
        self._batch = self._new_batch()
        self._probe = _spread_tokens(self._policy.vocab_size)

    @property
    def step(self) -> int:
        """Optimizer steps taken: the version of the weights."""
        return self._step

    @property
    def policy(self) -> PolicyModel:
        """The model under training. Read it; only the trainer changes it."""
        return self._policy

    def set_probe(self, token_ids: Sequence[int]) -> None:
        """Use these tokens for the canary, instead of ones spread over the vocabulary."""
        self._check([token_ids])
        self._probe = tuple(token_ids)

    def forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs [n - 1] of each sequence but its first token, at temperature 1."""
        self._check(sequences)
        results: list[list[float]] = [[] for _ in sequences]
        columns, limit = token_columns(sequences), self._config.trainer.max_tokens_per_microbatch
        for cut in plan(columns, limit, share=self._policy.shares):
            tokens = make_tokens(columns, cut, self._policy.device)
            with self._guarded("forward", TrainerError), torch.no_grad():
                logprobs = self._policy.token_logprobs(tokens, 1.0).logprobs.tolist()  # [N]
            start = 0
            for index in cut.indices.tolist():
                end = start + len(sequences[index]) - 1
                results[index] = logprobs[start:end]
                start = end
        return results

    def forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        """Add the gradient of the policy loss over `sequences` to that of the current optimizer batch."""
        self._accumulate(sequences, self._config.sampling.temperature, self._policy_objective)

    def forward_backward_custom(
        self,
        sequences: Sequence[TrainSequence],
        loss_fn: LossFunction,
        *,
        temperature: float = 1.0,
        reference: bool = False,
        whole_groups: bool = False,
    ) -> None:
        """As `forward_backward`, with your own loss per token: `loss_fn(inputs) -> [N]`.

        The inputs hold the loss tokens alone; old log-probs are the policy's own, detached.
        `asyncrl.losses.cross_entropy` is supervised training.

        Args:
            temperature: The logits are divided by it.
            reference: Fill `inputs.ref_logprobs`; the trainer must have been made with `reference=True`.
            whole_groups: Keep sequences of one group in one microbatch, for losses that compare them.
        """
        if reference and self._reference is None:
            raise ConfigError("reference log-probs are asked for, but this trainer was made without a reference model.")

        def objective(batch: Batch, found: TokenLogprobs) -> tuple[Tensor, LossInputs, MetricSums | None]:
            expected = self._reference_logprobs(batch.tokens, temperature) if reference else None
            inputs = _inputs(batch, found.logprobs, found.logprobs.detach(), expected)
            return policy_loss(loss_fn, inputs), inputs, None

        self._accumulate(sequences, temperature, objective, whole_groups=whole_groups)

    def optim_step(self, normalization: Normalization | None = None) -> StepResult:
        """Normalise over the whole optimizer batch, clip, step, and start a new batch.

        `normalization` None is the config's; another one cannot turn sums into means of sequences, or back.
        """
        batch, settings, configured = self._batch, self._config.optimizer, self._config.normalization
        normalization = configured if normalization is None else normalization
        if normalization != configured and "sequence_mean" in (normalization, configured):
            raise ConfigError(
                f"the gradients were accumulated for loss.normalization={configured!r} and cannot be normalised by "
                f"{normalization!r} any more. Set loss.normalization."
            )
        step = self._step + 1
        if batch.microbatches == 0:
            raise TrainerError(
                f"optimizer step {step} has nothing to train: no sequence with a loss token was given. Call "
                "forward_backward before optim_step."
            )
        self._batch = self._new_batch()
        with batch.timed("optimizer"):
            with self._guarded(f"optimizer step {step}", StepFailed):
                report = batch.report(normalization)
                rate = learning_rate(settings, step, self._total_steps)
                norm = normalize_and_clip(self._parameters, batch.denominator(normalization), settings.grad_clip_norm)
                if not (math.isfinite(norm) and math.isfinite(report["loss"])):
                    raise step_not_finite(step, report, norm, self._named)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._within_step = True
            with self._guarded(f"the update of optimizer step {step}", TrainerError):
                self._optimizer.step()
            self._within_step = False
            self._optimizer.zero_grad(set_to_none=True)
        self._step = step
        metrics = {**report, "grad_norm": norm, "learning_rate": rate, "optimizer_s": batch.seconds["optimizer"]}
        return StepResult(step=step, metrics=metrics)

    def save_weights_for_sampler(self) -> Weights:
        """A snapshot of the current weights, with what the sampler must reproduce under them.

        Raises `TrainerError` for weights that are not finite.
        """
        self._require_whole_step()
        require_finite(self._named, f"version {self._step} was not published")
        adapter = self._policy.adapter is not None
        probe = Probe(self._probe, tuple(self.forward([self._probe])[0]))
        if self._weights_format == "tensors":
            return Weights(version=self._step, adapter=adapter, tensors=snapshot(self._policy), probe=probe)
        assert self._publish_folder is not None
        folder = self._publish_folder / f"policy-v{self._step}"
        write_folder(self._policy, folder, self._policy.compute_dtype)
        # A sampler reads full weights once; an adapter it may read again while a rollout of its version goes on.
        keep = 2 * (self._config.staleness.max_staleness + 2) if adapter else 2
        prune(self._publish_folder, self._step, keep)
        return Weights(version=self._step, adapter=adapter, folder=folder, probe=probe)

    def save_model(self, folder: Path, *, merge: bool = False) -> None:
        """Write the model or adapter, with its tokenizer, as `transformers`, `peft` and vLLM open it.

        `merge` writes an adapter as the model that it makes of its base, which needs neither `peft` nor the base.
        Raises `TrainerError` for weights that are not finite; what is in `folder` stays then.
        """
        self._require_whole_step()
        require_finite(self._named, f"the model of step {self._step} was not saved")
        write_model(self._policy, folder, self._config.model, merge)

    def save_state(self, folder: Path) -> None:
        """Write weights, optimizer and randomness to `folder`, which does not exist yet, down to the disk.

        Raises `OSError`, and `TrainerError` for weights that are not finite; nothing is left in `folder` then.
        """
        self._states.begin(self._state(), folder, beside=False).result()

    def begin_save_state(self, folder: Path) -> Future[None]:
        """As `save_state`, but training may go on as soon as there is a copy. The future is done with the disk."""
        return self._states.begin(self._state(), folder)

    def load_state_with_optimizer(self, folder: Path) -> int:
        """Go on from what `save_state` wrote, bit by bit; gives its step. What a KL refers to stays as it is.

        Raises:
            CheckpointError: `folder` holds something else, a state of another model or another adapter, or a damaged
                one. What is found damaged only while it is read leaves this trainer unusable.
        """
        saved = SavedState.open(folder)
        saved.refuse_unless_for(self._facts, optimizer=True)
        self._load_weights(saved)
        restore_optimizer(self._optimizer, self._named, saved.read("optimizer"))
        restore_randomness(self._policy.device, saved.read("randomness"))
        self._step = saved.step
        return self._step

    def load_state(self, folder: Path) -> None:
        """Start at step 0 from the weights alone of what `save_state` wrote: they are what a KL refers to from now on.

        Raises `CheckpointError` as `load_state_with_optimizer`.
        """
        saved = SavedState.open(folder)
        saved.refuse_unless_for(self._facts, optimizer=False)
        self._load_weights(saved)
        self._optimizer.state.clear()
        self._step = 0
        if self._reference is not None:
            self._reference = None  # a copy of a model: two at once may be too many
            self._policy = replace(self._policy, adapter=self._policy.adapter and self._policy.adapter.starting_here())
            self._refer_to_this()

    def differences(self, folder: Path) -> list[str]:
        """Names of the weights and optimizer states that are not, bit by bit, those that `save_state` wrote there.

        Raises `CheckpointError` for what `save_state` did not write.
        """
        return SavedState.open(folder).differences(self._state().tensors)

    def _refer_to_this(self) -> None:
        """The policy as it is now is what a KL refers to."""
        self._reference = make_reference(self._policy, self._config.trainer)
        adapter = self._policy.adapter
        first = self._parameters if adapter is None else adapter.start
        digest = self._facts.base if first is None else digest_of_values(first)
        self._facts = replace(self._facts, reference=digest)

    def _state(self) -> State:
        self._require_whole_step()
        tensors = {
            "model": {name: weight.detach() for name, weight in self._named.items()},
            "randomness": randomness(self._policy.device),
        }
        if optimizer := optimizer_tensors(self._optimizer, self._named):
            tensors["optimizer"] = optimizer
        return State(self._step, self._facts, tensors)

    def _load_weights(self, saved: SavedState) -> None:
        self._drop_batch()
        with torch.no_grad():
            saved.fill({"model": {name: weight.detach() for name, weight in self._named.items()}})
        self._within_step = False

    def _require_whole_step(self) -> None:
        if self._within_step:
            raise TrainerError(
                f"the update of optimizer step {self._step + 1} failed half way, so these weights are of no step. Go "
                "on from a checkpoint."
            )

    def _accumulate(
        self,
        sequences: Sequence[TrainSequence],
        temperature: float,
        objective: MicrobatchLoss,
        *,
        whole_groups: bool = False,
    ) -> None:
        self._check([sequence.tokens for sequence in sequences])
        check_sequences(sequences)
        columns, limit = train_columns(sequences), self._config.trainer.max_tokens_per_microbatch
        cuts, done = list(plan(columns, limit, share=self._policy.shares, whole_groups=whole_groups)), []
        for cut in cuts:
            details = partial(sequences_named, sequences, cut.indices.tolist())
            with self._guarded(f"forward and backward of step {self._step + 1}, with ", StepFailed, details):
                done.append(self._microbatch(columns, cut, temperature, objective))
        if done and not (finite := torch.isfinite(torch.stack(done))).all():
            self._drop_batch()
            bad = [index for cut, fine in zip(cuts, finite.tolist(), strict=True) if not fine for index in cut.indices]
            raise loss_not_finite(self._step + 1, sequences, bad, self._named)

    def _microbatch(self, columns: Columns, cut: Cut, temperature: float, objective: MicrobatchLoss) -> Tensor:
        """Forward and backward of one microbatch; gives its loss sum, detached."""
        batch = make_batch(columns, cut, self._policy.device)
        with self._batch.timed("forward"):
            found = self._policy.token_logprobs(batch.tokens, temperature)
            per_token, inputs, metrics = objective(batch, found)
            loss = loss_sum(per_token, inputs, self._config.normalization)
        with self._batch.timed("backward"):
            torch.autograd.backward(loss)
        counts = Counts(loss_tokens=len(batch.sequence_ids), sequences=batch.sequences)
        self._batch.add(batch, counts, loss, metrics, self._policy.padded_tokens(batch.tokens.layout))
        return loss.detach()

    def _policy_objective(self, batch: Batch, found: TokenLogprobs) -> tuple[Tensor, LossInputs, MetricSums]:
        config = self._config
        # One optimizer step per batch, so the policy before the step is the policy of this very forward.
        anchored = config.loss.anchor == "old_policy"
        old = found.logprobs.detach() if anchored else batch.behavior_logprobs
        reference = self._reference_logprobs(batch.tokens, config.sampling.temperature) if config.kl_beta > 0 else None
        inputs = _inputs(batch, found.logprobs, old, reference)
        per_token = policy_loss(self._loss, inputs, **self._settings)
        metrics = metric_sums(inputs, clip=self._clip, tis=self._settings.get("tis"), entropy=found.entropy)
        return per_token, inputs, metrics

    def _reference_logprobs(self, tokens: Tokens, temperature: float) -> Tensor:
        assert self._reference is not None
        with self._batch.timed("reference"):
            return self._reference.token_logprobs(tokens, temperature)

    def _new_batch(self) -> Accumulator:
        return Accumulator(self._policy.device)

    def _drop_batch(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._batch = self._new_batch()

    def _check(self, sequences: Sequence[Sequence[int]]) -> None:
        check_tokens(sequences, self._policy.vocab_size, self._policy.max_length)

    @contextlib.contextmanager
    def _guarded(
        self, verb: str, failure: type[TrainerError], details: Callable[[], str] = lambda: ""
    ) -> Iterator[None]:
        """Turn running out of memory into `failure`, and leave no half-made gradient behind an error."""
        try:
            yield
        except Exception as error:
            self._drop_batch()
            if not is_out_of_memory(error):
                raise
            message = memory_exhausted(verb + details(), self._policy.device, self._config.trainer)
            free_memory_of(error, self._policy.device)
            raise failure(message) from error


def _inputs(batch: Batch, logprobs: Tensor, old: Tensor, reference: Tensor | None) -> LossInputs:
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=old,
        behavior_logprobs=batch.behavior_logprobs,
        ref_logprobs=reference,
        advantages=batch.advantages,
        loss_mask=torch.ones_like(batch.sequence_ids, dtype=torch.bool),
        sequence_ids=batch.sequence_ids,
        group_ids=batch.group_ids,
    )


def loss_settings(config: Config) -> dict[str, Any]:
    """What the config sets, under the names of `asyncrl.losses`; an objective takes those that it has.

    Settings that are left to the objective (None) are left out.
    """
    loss = config.loss
    filters = loss.tis_icepop is not None or loss.tis_mis is not None
    corrected = loss.tis_cap is not None or filters
    own = {name: getattr(loss, name) for name in ("eps_low", "eps_high", "dual_clip", "dro_beta")}
    return {
        **{name: value for name, value in own.items() if value is not None},
        "kl_beta": config.kl_beta,
        "tis": TIS(loss.tis_cap, loss.tis_level, loss.tis_icepop, loss.tis_mis) if corrected else None,
    }


def _spread_tokens(vocab_size: int) -> tuple[int, ...]:
    """Token ids far apart from each other, the same for every run of a model."""
    golden = 0.6180339887498949
    return tuple(int(math.fmod((place + 1) * golden, 1.0) * vocab_size) for place in range(PROBE_TOKENS))
