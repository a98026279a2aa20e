"""Fakes for the two seams: a sampler that is scripted and a trainer that counts.

They keep the same contract as the real ones (tests/sampling/contract.py runs against both) and need neither
torch nor a model, so a scheduler, a rollout function or an agent can be tested in virtual time.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from asyncrl.errors import CheckpointError, SamplerRequestError
from asyncrl.types import Completion, Load, Probe, SampleRequest, StepResult, TrainSequence, Weights

STATE = "counting.json"

Script = Callable[[SampleRequest], Sequence[int]]
"""What the fake policy answers."""


def _nothing(request: SampleRequest) -> list[int]:
    return [1] * min(4, request.params.max_tokens)


class ScriptedSampler:
    """Answers from a script, after `latency_s(request)` seconds, with at most `capacity` answers at once.
    Prompt and answer together have at most `context_tokens`.

    Every token has log-prob ln(1/2). A hot-load takes `publish_s`. The newest `keep_versions` can be asked for, and
    those that are held; None: all. 1 is a sampler with one version at a time, which holds none.
    """

    wants: Literal["tensors", "files"] = "tensors"

    def __init__(
        self,
        script: Script = _nothing,
        *,
        latency_s: Callable[[SampleRequest], float] = lambda request: 0.0,
        publish_s: Callable[[], float] = lambda: 0.0,
        capacity: int | None = None,
        context_tokens: int | None = None,
        keep_versions: int | None = None,
    ) -> None:
        self._script = script
        self._keep_versions = keep_versions
        self._held: Counter[int] = Counter()
        self._context_tokens = context_tokens
        self._latency_s = latency_s
        self._publish_s = publish_s
        self._room = asyncio.Semaphore(capacity) if capacity else None
        self._running = 0
        self._waiting = 0
        self._generated = 0
        self.version = 0
        self.published: list[int] = []

    async def __aenter__(self) -> ScriptedSampler:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def generate(self, request: SampleRequest) -> Completion:
        self._check(request.token_ids, request.version)
        if self._room is None:
            return await self._answer(request)
        self._waiting += 1
        try:
            await self._room.acquire()
        finally:
            self._waiting -= 1
        try:
            return await self._answer(request)
        finally:
            self._room.release()

    async def _answer(self, request: SampleRequest) -> Completion:
        self._running += 1
        version = self.version if request.version is None else request.version
        try:
            await asyncio.sleep(self._latency_s(request))
        finally:
            self._running -= 1
        tokens, stopped = self._speak(request)
        self._generated += len(tokens)
        return Completion(
            tokens, [-math.log(2.0)] * len(tokens), [version] * len(tokens), "stop" if stopped else "length"
        )

    def _speak(self, request: SampleRequest) -> tuple[list[int], bool]:
        """The scripted tokens as far as limits and stop tokens let them, and whether one of the latter ended them."""
        limit, stops = request.params.max_tokens, request.params.stop_token_ids
        if self._context_tokens is not None:
            limit = min(limit, self._context_tokens - len(request.token_ids))
        tokens = list(self._script(request))[:limit]
        for place, token in enumerate(tokens if stops else ()):
            if token in stops:
                return tokens[: place + 1], True
        return tokens, False

    def _check(self, token_ids: Sequence[int], version: int | None) -> None:
        if not token_ids or (self._context_tokens is not None and len(token_ids) >= self._context_tokens):
            raise SamplerRequestError(
                f"the prompt has {len(token_ids)} tokens. Expected at least 1, and room for an answer in a context of "
                f"{self._context_tokens or 'any number of'} tokens.",
                recoverable=False,
            )
        if version is not None and version > self.version:
            raise SamplerRequestError(
                f"version {version} is not live yet; the newest is {self.version}.", recoverable=False
            )
        kept = [0, *self.published][-self._keep_versions :] if self._keep_versions else None
        if kept is not None and version is not None and version not in kept and not self._held[version]:
            raise SamplerRequestError(f"version {version} is not live any more; there are {kept}.")

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        self._check(token_ids[:1], version)
        return [-math.log(2.0)] * (len(token_ids) - start)

    async def publish(self, weights: Weights) -> None:
        await asyncio.sleep(self._publish_s())
        self.version = weights.version
        self.published.append(weights.version)

    @contextmanager
    def hold(self) -> Iterator[int | None]:
        if self._keep_versions == 1:
            yield None
            return
        version = self.version
        self._held[version] += 1
        try:
            yield version
        finally:
            self._held[version] -= 1

    async def load(self) -> Load:
        return Load(self._running, self._waiting, generated_tokens=self._generated)


class CountingTrainer:
    """Trains nothing, keeps what it was given, and takes the time it is told to.

    `batches[i]` holds the sequences of optimizer step i + 1, or of those since a state was loaded. That state is one
    small file with the step, which is on the disk after `save_s`.
    """

    def __init__(
        self,
        *,
        step_s: Callable[[], float] = lambda: 0.0,
        on_sequences: Callable[[Sequence[TrainSequence], int], Awaitable[None] | None] | None = None,
        probe: bool = False,
        save_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._step_s = step_s
        self._save_s = save_s
        self._on_sequences = on_sequences
        self._probe = probe
        self._loaded_step = 0
        self._batch: list[TrainSequence] = []
        self.batches: list[list[TrainSequence]] = []
        self.saved: list[Path] = []

    @property
    def step(self) -> int:
        return self._loaded_step + len(self.batches)

    async def __aenter__(self) -> CountingTrainer:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-math.log(2.0)] * (len(tokens) - 1) for tokens in sequences]

    async def forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        self._batch += sequences
        if self._on_sequences is not None:
            waiting = self._on_sequences(sequences, self.step)
            if waiting is not None:
                await waiting

    async def optim_step(self) -> StepResult:
        await asyncio.sleep(self._step_s())
        self.batches.append(self._batch)
        self._batch = []
        return StepResult(self.step, {"loss": 0.0, "train_tokens": float(sum(len(s.tokens) for s in self.batches[-1]))})

    async def save_weights_for_sampler(self) -> Weights:
        probe = Probe((0, 1, 2), (-math.log(2.0),) * 2) if self._probe else None
        return Weights(self.step, adapter=False, tensors={}, probe=probe)

    async def save_model(self, folder: Path) -> None:
        self.saved.append(folder)

    async def save_state(self, folder: Path) -> Awaitable[None]:
        return asyncio.ensure_future(self._write(folder, self.step))

    async def _write(self, folder: Path, step: int) -> None:
        await asyncio.sleep(self._save_s())
        _write_step(folder, step)

    async def load_state_with_optimizer(self, folder: Path) -> int:
        step = _read_step(folder)
        await self.load_state(folder)
        self._loaded_step = step
        return step

    async def load_state(self, folder: Path) -> None:
        _read_step(folder)
        self._loaded_step, self._batch, self.batches = 0, [], []


def _write_step(folder: Path, step: int) -> None:
    folder.mkdir()
    (folder / STATE).write_text(json.dumps({"step": step}))


def _read_step(folder: Path) -> int:
    try:
        return int(json.loads((folder / STATE).read_text())["step"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} is not the state of a counting trainer: {error}") from error
