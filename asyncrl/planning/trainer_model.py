"""The trainer as a simulation needs it: steps that take as long as their tokens say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncrl.planning.sampler_model import ModelledSampler
from asyncrl.planning.world import World
from asyncrl.types import StepResult, TrainSequence, Weights


@dataclass(frozen=True, slots=True)
class TrainerModel:
    """How fast the trainer is. Times in seconds."""

    step_s: float = 0.0
    """Of every optimizer step, whatever its size: the optimizer, and what is done between steps."""
    token_s: float = 0.0
    """Forward and backward of one token that is computed."""
    shared: float = 0.0
    """Share of the prompt tokens of a group that its members compute together."""
    export_s: float = 0.0
    """A snapshot of the weights, in which nothing is trained."""
    slowdown: float = 0.0
    """How much longer a step takes while the sampler on the same device is busy: 0.5 is half as long again."""


class ModelledTrainer:
    """Implements `asyncrl.types.Trainer`. The length of `tokens` is all that it looks at in a sequence."""

    def __init__(self, model: TrainerModel, world: World, sampler: ModelledSampler) -> None:
        self.model = model
        self.step = 0
        self._tokens = 0
        self._world = world
        self._sampler = sampler
        sampler.totals.on_busy = self._sampler_changed
        self._left_s = 0.0
        """Of what is computed now, with the device to itself."""
        self._speed = 1.0
        self._since = 0.0
        self._over: asyncio.Future[None] | None = None
        self._due = 0.0

    async def __aenter__(self) -> ModelledTrainer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        tokens = sum(len(sequence.tokens) for sequence in sequences)
        self._tokens += tokens
        await self._compute(tokens * self.model.token_s)

    async def optim_step(self) -> StepResult:
        began = self._world.now
        await self._compute(self.model.step_s)
        self.step += 1
        tokens, self._tokens = self._tokens, 0
        return StepResult(self.step, {"train_tokens": float(tokens), "optimizer_s": self._world.now - began})

    async def save_weights_for_sampler(self) -> Weights:
        await self._compute(self.model.export_s)
        return Weights(self.step, adapter=False)

    async def forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[0.0] * (len(tokens) - 1) for tokens in sequences]

    async def save_model(self, folder: Path) -> None:
        """There is no model."""

    async def save_state(self, folder: Path) -> Awaitable[None]:
        return self._world.sleep(0.0)

    async def load_state_with_optimizer(self, folder: Path) -> int:
        return self.step

    async def load_state(self, folder: Path) -> None:
        """There is no state."""

    async def _compute(self, seconds: float) -> None:
        """Take `seconds`, more where the sampler takes its share of the device meanwhile."""
        if seconds <= 0:
            return
        self._left_s, self._since = seconds, self._world.now
        self._speed = self._speed_now()
        self._over = asyncio.get_running_loop().create_future()
        self._sampler.trainer_computes(True)
        self._arm()
        try:
            await self._over
        finally:
            self._over = None
            self._sampler.trainer_computes(False)

    def _speed_now(self) -> float:
        return 1 / (1 + self.model.slowdown) if self._sampler.totals.busy else 1.0

    def _sampler_changed(self) -> None:
        if self._over is not None and self.model.slowdown:
            self._advance()
            self._speed = self._speed_now()
            self._arm()

    def _advance(self) -> None:
        self._left_s -= (self._world.now - self._since) * self._speed
        self._since = self._world.now

    def _arm(self) -> None:
        self._due = self._world.now + max(0.0, self._left_s) / self._speed
        self._world.at(self._due, self._look)

    def _look(self, time: float) -> None:
        if self._over is None or time != self._due:
            return
        self._advance()
        self._world.wake(self._over)
