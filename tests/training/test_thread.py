"""The trainer on its own thread: one thread for all, a loop that goes on, errors and cancellation."""

from __future__ import annotations

import asyncio
import threading

import anyio
import anyio.to_thread
import pytest
import torch

from asyncrl.config import Config
from asyncrl.errors import ModelError, TrainerError
from asyncrl.losses import cross_entropy
from asyncrl.training import thread
from asyncrl.training.thread import ThreadedTrainer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import Trainer
from tests.training.cases import model_folder, token_lists, train_sequences


def make(**settings: object) -> ThreadedTrainer:
    config = Config(model=model_folder("llama"))
    return ThreadedTrainer(config, total_steps=None, weights_format="tensors", **settings)  # type: ignore[arg-type]


async def test_all_verbs(tmp_path: object) -> None:
    sequences = train_sequences(0, (12, 9))
    trainer: Trainer = make()
    async with trainer:
        assert [len(row) for row in await trainer.forward(token_lists(0, (5, 3)))] == [4, 2]
        await trainer.forward_backward(sequences)
        assert (await trainer.optim_step()).step == 1
        assert isinstance(trainer, ThreadedTrainer)
        await trainer.forward_backward_custom(sequences, cross_entropy)
        await trainer.optim_step()
        await trainer.set_probe([1, 2, 3])
        sent = await trainer.save_weights_for_sampler()
        assert sent.version == trainer.step == 2
        assert sent.probe is not None
        assert sent.probe.tokens == (1, 2, 3)
        await trainer.save_model(tmp_path / "model")  # type: ignore[operator]
    assert (tmp_path / "model" / "model.safetensors").exists()  # type: ignore[operator]


async def test_one_thread_with_its_own_number_of_torch_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    class Noting(TorchTrainer):
        def __init__(self, *args: object, **settings: object) -> None:
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            super().__init__(*args, **settings)  # type: ignore[arg-type]

        def forward(self, sequences: object) -> list[list[float]]:
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return []

    monkeypatch.setattr(thread, "TorchTrainer", Noting)
    async with make(torch_threads=1) as trainer:
        await trainer.forward([])
        await trainer.forward([])
    assert seen == [("asyncrl-trainer", 1)] * 3
    for running in threading.enumerate():
        if running.name == "asyncrl-trainer":
            running.join(timeout=10)
            assert not running.is_alive()


async def test_errors_arrive_where_they_were_awaited() -> None:
    async with make() as trainer:
        with pytest.raises(TrainerError, match="nothing to train"):
            await trainer.optim_step()
        await trainer.forward_backward(train_sequences(0, (5,)))
        assert (await trainer.optim_step()).step == 1


async def test_a_model_that_cannot_be_loaded() -> None:
    trainer = ThreadedTrainer(Config(model="./no-such-folder"), total_steps=None, weights_format="tensors")
    with pytest.raises(ModelError, match="no such folder"):
        async with trainer:
            pass


async def test_a_trainer_that_is_not_open() -> None:
    trainer = make()
    with pytest.raises(TrainerError, match="async with"):
        await trainer.optim_step()


class Slow:
    """`optim_step` as a verb that runs until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._started, self._released, self._ended = threading.Event(), threading.Event(), threading.Event()
        self.release = self._released.set
        self.ended = self._ended.is_set
        monkeypatch.setattr(TorchTrainer, "optim_step", lambda trainer, normalization: self._run())

    def _run(self) -> None:
        self._started.set()
        assert self._released.wait(30)
        self._ended.set()

    async def started(self) -> None:
        assert await anyio.to_thread.run_sync(self._started.wait, 30)


async def test_the_loop_goes_on_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = Slow(monkeypatch)
    async with make() as trainer:
        task = asyncio.create_task(trainer.optim_step())
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        verb.release()
        await task


async def test_a_cancelled_verb_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = Slow(monkeypatch)
    async with make() as trainer:
        async with anyio.create_task_group() as group:
            group.start_soon(trainer.optim_step)
            await verb.started()
            asyncio.get_running_loop().call_later(0.05, verb.release)
            group.cancel_scope.cancel()
        assert verb.ended()
        assert await trainer.forward([[1, 2]]) != []


async def test_a_cancelled_verb_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = Slow(monkeypatch)
    async with make(cancel_timeout_s=0.05) as trainer:
        task = asyncio.create_task(trainer.optim_step())
        await verb.started()
        task.cancel()
        with pytest.raises(TrainerError, match=r"cancelled during optim_step.*within 0\.05 s"):
            await task
        verb.release()


async def test_a_queued_verb_that_is_cancelled_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    verb = Slow(monkeypatch)
    async with make() as trainer:
        first = asyncio.create_task(trainer.optim_step())
        await verb.started()
        second = asyncio.create_task(trainer.forward_backward(train_sequences(0, (9,))))
        await anyio.wait_all_tasks_blocked()
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        verb.release()
        await first
        monkeypatch.undo()
        with pytest.raises(TrainerError, match="nothing to train"):
            await trainer.optim_step()
