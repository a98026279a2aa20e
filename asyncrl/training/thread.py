"""The trainer of the engine: a `TorchTrainer` on a worker thread of its own, so that the event loop never waits.

One thread for everything, loading included: torch keeps its thread settings per thread, and the verbs of a
trainer must not overlap. The thread is a daemon: a verb that never ends cannot keep the process alive.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import anyio
import torch

from asyncrl.config import Config
from asyncrl.errors import TrainerError
from asyncrl.losses import Normalization
from asyncrl.training.trainer import LossFunction, TorchTrainer
from asyncrl.types import StepResult, TrainSequence, Weights

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Job:
    function: Callable[[], Any]
    future: Future[Any]


class _Worker:
    """One daemon thread that runs jobs in the order they came. Owns the queue."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        self._jobs.put(_Job(function, future))
        return future

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                result = job.function()
            except BaseException as error:  # carried to the caller, whatever it is
                job.future.set_exception(error)
            else:
                job.future.set_result(result)
            del job  # an idle worker must not keep the last batch, or a failure's frames, alive


class ThreadedTrainer:
    """`asyncrl.types.Trainer` over a `TorchTrainer`. Use it as an async context manager.

    A verb's exception is raised where it was awaited. A cancelled verb is waited for, since torch cannot be
    interrupted: at most `cancel_timeout_s`, after which `TrainerError` names it.
    """

    def __init__(
        self,
        config: Config,
        *,
        total_steps: int | None,
        weights_format: Literal["tensors", "files"],
        publish_folder: Path | None = None,
        reference: bool | None = None,
        torch_threads: int | None = None,
        cancel_timeout_s: float = 120.0,
    ) -> None:
        """`torch_threads` are those of this trainer's thread; None leaves torch's own number."""
        self._make: Callable[[], TorchTrainer] = lambda: TorchTrainer(
            config,
            total_steps=total_steps,
            weights_format=weights_format,
            publish_folder=publish_folder,
            reference=reference,
        )
        self._torch_threads = torch_threads
        self._cancel_timeout_s = cancel_timeout_s
        self._worker: _Worker | None = None
        self._trainer: TorchTrainer | None = None

    async def __aenter__(self) -> ThreadedTrainer:
        self._worker = _Worker("asyncrl-trainer")
        try:
            self._trainer = await self._run("load", self._load)
        except BaseException:
            self._worker.close()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._worker is not None
        self._trainer = None
        self._worker.close()

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self._open().step

    async def forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs [N - 1] of each sequence but its first token, at temperature 1."""
        trainer = self._open()
        return await self._run("forward", lambda: trainer.forward(sequences))

    async def forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        """Add the gradient of these sequences to that of the current optimizer batch."""
        trainer = self._open()
        await self._run("forward_backward", lambda: trainer.forward_backward(sequences))

    async def forward_backward_custom(
        self,
        sequences: Sequence[TrainSequence],
        loss_fn: LossFunction,
        *,
        temperature: float = 1.0,
        reference: bool = False,
        whole_groups: bool = False,
    ) -> None:
        """As `forward_backward`, with your own loss per token; `loss_fn` runs on the trainer's thread.

        What the settings mean is said at `TorchTrainer.forward_backward_custom`.
        """
        trainer = self._open()
        await self._run(
            "forward_backward_custom",
            lambda: trainer.forward_backward_custom(
                sequences, loss_fn, temperature=temperature, reference=reference, whole_groups=whole_groups
            ),
        )

    async def optim_step(self, normalization: Normalization | None = None) -> StepResult:
        """Normalise over the whole optimizer batch, clip, step, and start a new batch."""
        trainer = self._open()
        return await self._run("optim_step", lambda: trainer.optim_step(normalization))

    async def save_weights_for_sampler(self) -> Weights:
        """A snapshot of the current weights in the form that the sampler wants."""
        return await self._run("save_weights_for_sampler", self._open().save_weights_for_sampler)

    async def save_model(self, folder: Path, *, merge: bool = False) -> None:
        """Write the model or adapter as `transformers`, `peft` and vLLM open it; `merge`: an adapter in its base."""
        trainer = self._open()
        await self._run("save_model", lambda: trainer.save_model(folder, merge=merge))

    async def save_state(self, folder: Path) -> Awaitable[None]:
        """Take a snapshot to be written into `folder`; training may go on while the awaitable waits for the disk."""
        trainer = self._open()
        written = asyncio.wrap_future(await self._run("save_state", lambda: trainer.begin_save_state(folder)))
        written.add_done_callback(_heard)
        return written

    async def load_state_with_optimizer(self, folder: Path) -> int:
        """Go on from a saved state: weights, optimizer, randomness. Gives its step."""
        trainer = self._open()
        return await self._run("load_state_with_optimizer", lambda: trainer.load_state_with_optimizer(folder))

    async def load_state(self, folder: Path) -> None:
        """Start at step 0 from the weights alone of a saved state."""
        trainer = self._open()
        await self._run("load_state", lambda: trainer.load_state(folder))

    async def set_probe(self, token_ids: Sequence[int]) -> None:
        """Use these tokens for the canary."""
        trainer = self._open()
        await self._run("set_probe", lambda: trainer.set_probe(token_ids))

    def _load(self) -> TorchTrainer:
        if self._torch_threads is not None:
            torch.set_num_threads(self._torch_threads)
        return self._make()

    def _open(self) -> TorchTrainer:
        if self._trainer is None:
            raise TrainerError("the trainer is not open. Use it inside `async with trainer:`.")
        return self._trainer

    async def _run(self, verb: str, function: Callable[[], Result]) -> Result:
        assert self._worker is not None
        future = self._worker.submit(function)
        waiter = asyncio.wrap_future(future)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            if not future.cancel():
                await self._let_end(verb, waiter)
            raise

    async def _let_end(self, verb: str, waiter: asyncio.Future[Any]) -> None:
        """Wait for a verb whose caller was cancelled; what it gives or raises is nobody's any more."""
        with anyio.move_on_after(self._cancel_timeout_s, shield=True):
            await asyncio.wait([waiter])
        if not waiter.done():
            raise TrainerError(
                f"the trainer was cancelled during {verb}, which did not end within {self._cancel_timeout_s:g} s. "
                "Its thread is left behind; end the process."
            )
        waiter.exception()


def _heard(written: asyncio.Future[None]) -> None:
    """A failure that nobody waits for any more is not worth a message of asyncio's."""
    if not written.cancelled():
        written.exception()
