"""The trainer, shown units instead of rollouts: the torch side of the supervised and preference recipes."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.losses import LossInputs, MetricSums
from asyncrl.losses.preference import dpo, dpo_metrics, orpo, orpo_metrics
from asyncrl.recipes.dataset import Unit
from asyncrl.recipes.examples import Example
from asyncrl.training.model import quiet_progress
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

MEASURED_UNITS = 64
"""Held-out units that are measured at once: a wish to stop is heard between them."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is minimised: the mean over the loss tokens by their weights, or over pairs."""

    loss: Callable[[LossInputs], Tensor]
    metrics: Callable[[LossInputs], MetricSums] | None = None
    """Of pairs."""
    reference: bool = False

    @property
    def pairs(self) -> bool:
        return self.metrics is not None

    def divisor(self, units: Sequence[Unit]) -> float:
        """What the sum of the losses is divided by. Known before the batch is cut, so no cut changes the result."""
        return float(len(units)) if self.pairs else sum(sum(example.weights) for unit in units for example in unit)


def weighted_cross_entropy(inputs: LossInputs) -> Tensor:
    """-w log pi: supervised training, the weight of a token in place of its advantage. [N]"""
    return -inputs.logprobs * inputs.advantages


def sft_objective() -> Objective:
    return Objective(weighted_cross_entropy)


def dpo_objective(beta: float) -> Objective:
    return Objective(partial(dpo, beta=beta), partial(dpo_metrics, beta=beta), reference=True)


def orpo_objective(odds_weight: float) -> Objective:
    return Objective(partial(orpo, odds_weight=odds_weight), partial(orpo_metrics, odds_weight=odds_weight))


class Learner:
    """Owns the trainer, and the log-probs of the starting model on held-out units where the objective has them."""

    def __init__(self, config: Config, objective: Objective, total_steps: int) -> None:
        self._objective = objective
        self._trainer = TorchTrainer(
            config, total_steps=total_steps, weights_format="tensors", reference=objective.reference
        )
        self._seen: list[MetricSums] = []
        self._start_logprobs: dict[int, Tensor] = {}

    def step(self, units: Sequence[Unit]) -> dict[str, float]:
        """One optimizer step; returns its metrics."""
        objective = self._objective
        self._seen.clear()
        self._trainer.forward_backward_custom(
            [_sequence(example, group) for group, unit in enumerate(units) for example in unit],
            self._loss,
            reference=objective.reference,
            whole_groups=objective.pairs,
        )
        result = self._trainer.optim_step(objective.divisor(units))
        return {**result.metrics, **_means(self._seen)}

    def measure(self, units: Sequence[Unit], stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Mean loss and metrics over held-out units, without training on them; None where it was stopped.

        The first call must come before the first step: it is what DPO's reference says of these units.
        """
        losses: list[float] = []
        metrics: list[MetricSums] = []
        for start in range(0, len(units), MEASURED_UNITS):
            if stopped():
                return None
            inputs = self._held_out(units[start : start + MEASURED_UNITS], start)
            losses.append(float(self._objective.loss(inputs).sum()))
            if self._objective.metrics is not None:
                metrics.append(self._objective.metrics(inputs))
        return {"loss": sum(losses) / self._objective.divisor(units), **_means(metrics)}

    def save_state(self, folder: Path) -> Future[None]:
        """Copy weights, optimizer and randomness. The future is done when the copy is in `folder`, on the disk."""
        return self._trainer.begin_save_state(folder)

    def load_state(self, folder: Path) -> None:
        """Go on where `save_state` was. Raises `CheckpointError`."""
        self._trainer.load_state_with_optimizer(folder)

    def start_from(self, folder: Path) -> None:
        """Begin with those weights, at step 0; they are the reference too. Raises `CheckpointError`."""
        self._trainer.load_state(folder)

    def save(self, folder: Path) -> None:
        """Write the model or adapter."""
        with quiet_progress():
            self._trainer.save_model(folder)

    def _loss(self, inputs: LossInputs) -> Tensor:
        if self._objective.metrics is not None:
            self._seen.append(self._objective.metrics(inputs))
        return self._objective.loss(inputs)

    def _held_out(self, units: Sequence[Unit], key: int) -> LossInputs:
        """What an objective reads of these units, [N] over all tokens but each first."""
        examples = [(group, example) for group, unit in enumerate(units) for example in unit]
        found = self._trainer.forward([example.tokens for _, example in examples])
        logprobs = torch.tensor(list(chain.from_iterable(found)))  # [N]
        weights = torch.tensor(list(chain.from_iterable(example.weights[1:] for _, example in examples)))  # [N]
        lengths = torch.tensor([len(part) for part in found])
        groups = torch.tensor([group for group, _ in examples])
        return LossInputs(
            logprobs=logprobs,
            old_logprobs=logprobs,
            behavior_logprobs=logprobs,
            ref_logprobs=self._start_logprobs.setdefault(key, logprobs) if self._objective.reference else None,
            advantages=weights,
            loss_mask=weights != 0,
            sequence_ids=torch.repeat_interleave(torch.arange(len(examples)), lengths),
            group_ids=torch.repeat_interleave(groups, lengths),
        )


def _sequence(example: Example, group: int) -> TrainSequence:
    return TrainSequence(
        tokens=example.tokens,
        behavior_logprobs=array("f", bytes(4 * len(example.tokens))),  # nobody sampled these tokens
        loss_mask=[int(weight != 0) for weight in example.weights],
        advantage=example.weights,
        group=group,
    )


def _means(sums: Sequence[MetricSums]) -> dict[str, float]:
    return reduce(add, sums).means() if sums else {}
