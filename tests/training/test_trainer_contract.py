"""What the engine may expect of a trainer's state: one suite, against the real trainer and the one that counts."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from asyncrl.config import Config
from asyncrl.errors import CheckpointError
from asyncrl.testing.fakes import CountingTrainer
from asyncrl.training import checkpoint
from asyncrl.training.tensor_files import Tree
from asyncrl.training.thread import ThreadedTrainer
from asyncrl.types import Trainer
from tests.training.cases import model_folder, train_sequences

SEQUENCES = train_sequences(0, (12, 9))


@pytest.fixture(params=["real", "counting"])
async def trainer(request: pytest.FixtureRequest) -> AsyncIterator[Trainer]:
    config = Config(model=model_folder("llama"))
    kinds = {
        "real": lambda: ThreadedTrainer(config, total_steps=None, weights_format="tensors"),
        "counting": CountingTrainer,
    }
    async with kinds[request.param]() as opened:
        yield opened


async def step(trainer: Trainer) -> int:
    await trainer.forward_backward(SEQUENCES)
    return (await trainer.optim_step()).step


async def test_a_state_is_that_of_the_moment_it_was_taken(trainer: Trainer, tmp_path: Path) -> None:
    await step(trainer)
    written = await trainer.save_state(tmp_path / "state")
    await step(trainer)
    await step(trainer)
    await written
    assert await trainer.load_state_with_optimizer(tmp_path / "state") == 1
    assert await step(trainer) == 2
    assert (await trainer.save_weights_for_sampler()).version == 2


async def test_weights_alone_begin_at_step_0(trainer: Trainer, tmp_path: Path) -> None:
    await step(trainer)
    await (await trainer.save_state(tmp_path / "state"))
    await trainer.load_state(tmp_path / "state")
    assert await step(trainer) == 1


async def test_half_a_batch_is_forgotten(trainer: Trainer, tmp_path: Path) -> None:
    await (await trainer.save_state(tmp_path / "state"))
    await trainer.forward_backward(SEQUENCES)
    await trainer.load_state_with_optimizer(tmp_path / "state")
    await trainer.forward_backward(SEQUENCES)
    tokens = sum(len(sequence.tokens) for sequence in SEQUENCES)
    assert (await trainer.optim_step()).metrics["train_tokens"] == tokens


async def test_what_is_no_state(trainer: Trainer, tmp_path: Path) -> None:
    for load in (trainer.load_state, trainer.load_state_with_optimizer):
        with pytest.raises(CheckpointError, match="is not the state of a"):
            await load(tmp_path / "none")


async def test_a_folder_that_is_there_already(trainer: Trainer, tmp_path: Path) -> None:
    written = await trainer.save_state(tmp_path)
    with pytest.raises(FileExistsError):
        await written


async def test_the_loop_goes_on_while_the_disk_is_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, honest = threading.Event(), checkpoint.write_tensors

    def slow(tree: Tree, folder: Path) -> None:
        release.wait(20)
        honest(tree, folder)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    config = Config(model=model_folder("llama"))
    async with ThreadedTrainer(config, total_steps=None, weights_format="tensors") as trainer:
        written = asyncio.ensure_future(await trainer.save_state(tmp_path / "state"))
        assert await step(trainer) == 1
        assert not written.done()
        written.cancel()  # whoever waits may give up; the file is written all the same
        release.set()
        again = await trainer.save_state(tmp_path / "again")
        await again
    assert json.loads((tmp_path / "state" / "facts.json").read_text())["step"] == 0


async def test_a_failure_that_nobody_waits_for_is_no_noise(tmp_path: Path) -> None:
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    async with ThreadedTrainer(
        Config(model=model_folder("llama")), total_steps=None, weights_format="tensors"
    ) as trainer:
        await trainer.save_state(tmp_path)  # it exists
        for _ in range(3):  # turns of the loop, until the failure has arrived
            await asyncio.sleep(0)
        gc.collect()
    assert heard == []
