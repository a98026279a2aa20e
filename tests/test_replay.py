"""What was recorded trains to the same weights again, bit by bit; and what is not the same is named."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncrl
from asyncrl.cli.main import main
from asyncrl.config import Config
from asyncrl.errors import CheckpointError, ConfigError, DataError, RolloutFailed, StepFailed
from asyncrl.replay import ReplayResult, config_of, replay, take_step
from asyncrl.storage.samples import SampleRecorder, read_samples
from asyncrl.training.trainer import TorchTrainer
from tests.conftest import SMALL

ROWS = [{"n": n % 10} for n in range(80)]
GIVEN_UP = 3
"""The step that fails once."""
CRASH_AT, LAST = 5, 9
CHECKPOINTS = {"interval": 2, "keep_last": 99, "final": False}


@dataclass
class Task:
    """Two turns; every fifth row waits between them until others have been trained, so that its first turn is old. It
    ends the run once, when it comes to a row for the first time."""

    finished: int = 0
    crash_at: int | None = None

    async def rollout(self, prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
        if prompt.index % 5 == 0:
            return await self._old(prompt)
        ids = [65 + prompt["n"], 65]
        completion = await prompt.policy.generate(ids)
        self.finished += 1
        if self.crash_at is not None and self.finished > self.crash_at:
            raise RuntimeError("the machine is on fire")
        reward = sum(token < 64 for token in completion.tokens) / len(completion.tokens)
        return asyncrl.RolloutSample.from_completion(ids, completion, reward, row=prompt.index)

    async def _old(self, prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
        ids = [65 + prompt["n"], 65]
        first = await prompt.policy.generate(ids)
        until = self.finished + 24
        for _ in range(30):
            if self.finished >= until:
                break
            await asyncio.sleep(0.01)
        second = await prompt.policy.generate([*ids, *first.tokens, 66])
        return asyncrl.RolloutSample(
            tokens=[*ids, *first.tokens, 66, *second.tokens],
            logprobs=[0.0, 0.0, *first.logprobs, 0.0, *second.logprobs],
            loss_mask=[0, 0, *[1] * len(first.tokens), 0, *[1] * len(second.tokens)],
            versions=[0, 0, *first.versions, 0, *second.versions],
            reward=sum(token < 64 for token in second.tokens) / len(second.tokens),
        )


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with stale tokens, chunks, a step that was given up, a crash, and a resume with another learning rate."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    settings: dict[str, Any] = SMALL | {
        "model": str(model),
        "run_dir": folder,
        "pipeline_chunks_per_step": 3,
        "staleness": {"policy": "pace", "max_staleness": 1, "on_stale": "mask"},
        "loss": {"kl_beta": 0.01},
        "lora": {"rank": 4 if request.param == "lora" else 0},
        "optimizer": {"learning_rate": 3e-3, "schedule": "linear", "warmup_steps": 2},
        "data": {"epochs": 3},
        "max_steps": LAST,
        "checkpoint": CHECKPOINTS,
    }
    optim_step, failed = TorchTrainer.optim_step, list[int]()

    def fails_once(trainer: TorchTrainer, *arguments: Any) -> Any:
        if trainer.step == GIVEN_UP - 1 and not failed:
            failed.append(trainer.step)
            trainer._drop_batch()
            raise StepFailed("no memory today")
        return optim_step(trainer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchTrainer, "optim_step", fails_once)
        with pytest.raises(RolloutFailed):
            asyncrl.train(
                Task(crash_at=4 * 4 * CRASH_AT).rollout, dataset=ROWS, config=Config(**settings), view="quiet"
            )
        settings["optimizer"]["learning_rate"] = 2e-3
        asyncrl.train(Task().rollout, dataset=ROWS, config=Config(**settings), resume=True, view="quiet")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def whole(run: Path) -> ReplayResult:
    return replay(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


class TestAReplay:
    def test_comes_to_the_same_weights_bit_by_bit(self, run: Path, whole: ReplayResult) -> None:
        records = metrics(run)
        assert sum(record["stale_masked_tokens"] for record in records) > 0, "tokens were masked"
        assert max(record["staleness_max"] for record in records) > 0
        assert len({read.recording.path for read in read_samples(run / "samples")}) == 2, "it was resumed"
        assert whole.differences() == []
        assert [step.step for step in whole.steps] == list(range(1, LAST + 1))
        assert all(step.recorded for step in whole.steps)
        assert [check.kept.name for check in whole.checks] == [
            *(f"step-{step:06d}" for step in range(2, LAST + 1, 2)),
            "model",
        ]

    def test_from_a_checkpoint(self, run: Path) -> None:
        found = replay(run, start="step-000004", stop=LAST)
        assert found.differences() == []
        assert [step.step for step in found.steps] == list(range(5, LAST + 1))
        assert [check.step for check in found.checks] == [6, 8, LAST]

    def test_the_number_of_threads_is_that_of_the_run(self, run: Path) -> None:
        """How a large sum is cut among them decides about its last bits."""
        before, seen = torch.get_num_threads(), set[int]()
        recorded = read_samples(run / "samples")[0].recording.settings["torch_threads"]
        torch.set_num_threads(recorded + 1)
        try:
            replay(run, stop=2, on_step=lambda step: seen.add(torch.get_num_threads()))
            assert seen == {recorded}
            assert torch.get_num_threads() == recorded + 1
        finally:
            torch.set_num_threads(before)

    def test_gives_a_trainer_for_the_next_step_by_hand(self, run: Path) -> None:
        found = replay(run, stop=GIVEN_UP - 1)
        failed, taken = (record for record in read_samples(run / "samples") if record.step == GIVEN_UP)
        assert (failed.failed, taken.failed) == ("no memory today", None)
        assert len(failed.chunks()) == len(taken.chunks()) == 3
        result = take_step(found.trainer, taken, found.config)
        assert (result.step, result.metrics["loss"]) == (GIVEN_UP, metrics(run)[GIVEN_UP - 1]["loss"])

    def test_other_settings_show_what_they_would_have_done(self, run: Path) -> None:
        config = config_of(read_samples(run / "samples")[0].recording)
        config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"learning_rate": 1e-3})})
        found = replay(run, stop=3, config=config)
        assert found.steps[0].differences() == [], "the first step has the same weights to begin with"
        first, kept = found.differences()
        assert first.startswith("step 2: loss ")
        assert "step-000002: model." in kept


class TestWhatCannotBeReplayed:
    def test_is_refused_by_name(self, run: Path, tmp_path: Path) -> None:
        for error, message, arguments in (
            (CheckpointError, "there is no checkpoint 'step-000005'", {"start": "step-000005"}),
            (ConfigError, f"steps up to {LAST} are recorded", {"stop": LAST + 1}),
            (ConfigError, "nothing to replay after step 4 up to step 3", {"start": "step-000004", "stop": 3}),
        ):
            with pytest.raises(error, match=message):
                replay(run, **arguments)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="there is no run folder"):
            replay(tmp_path / "nowhere")

    def test_a_gap_is_named(self, run: Path, tmp_path: Path) -> None:
        records = [record for record in read_samples(run / "samples") if record.failed is None]
        recorder = SampleRecorder(tmp_path / "samples", after_step=0, settings=records[0].recording.settings)
        for record in records:
            if record.step not in (2, 3):
                recorder.write(record.step, record.chunks())
        recorder.close()
        with pytest.raises(DataError, match=r"step 2, 3 is not recorded.*Start at a checkpoint of step 3 or later"):
            replay(tmp_path)


class TestTheCommand:
    def test_says_that_all_is_as_it_was(self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert main(["replay", str(run), "--to", "4", "--out", str(tmp_path / "model")]) == 0
        said = capsys.readouterr().out
        assert said.count("as it was") == 4
        assert "checkpoints/step-000004: the same, bit by bit" in said
        assert f"step {GIVEN_UP} was given up once" in said
        assert list((tmp_path / "model").glob("*.safetensors"))
        assert main(["replay", str(run), "--to", "4", "--out", str(tmp_path / "model")]) == 2

    def test_names_the_first_step_that_differs(
        self, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """As when a reward, or a bit of a log-prob, had been another."""
        shutil.copytree(run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "samples")
        records = [record for record in read_samples(run / "samples") if record.failed is None and record.step <= 4]
        recorder = SampleRecorder(tmp_path / "run" / "samples", after_step=0, settings=records[0].recording.settings)
        for record in records:
            chunks = record.chunks()
            if record.step == 3:
                group = next(group for chunk in chunks for group in chunk if group.advantages)
                group.advantages[0] += 1e-3
            recorder.write(record.step, chunks)
        recorder.close()
        assert main(["replay", str(tmp_path / "run")]) == 1
        steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
        assert [("as it was" in line) for line in steps] == [True, True, False, False]

    def test_shows_what_a_step_was_given(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["replay", str(run), "--step", str(GIVEN_UP)]) == 0
        said = capsys.readouterr().out
        assert "given up: no memory today" in said
        assert said.count(f"step {GIVEN_UP} of {run}") == 2
        (row, *_) = (record.chunks()[0] for record in read_samples(run / "samples") if record.step == GIVEN_UP)
        assert f" {row[0].row} " in said
        assert main(["replay", str(run), "--step", "99"]) == 2


def test_a_run_that_began_from_another_ones_weights(run: Path, tmp_path: Path) -> None:
    config = config_of(read_samples(run / "samples")[0].recording)
    begun = {"run_dir": tmp_path / "run", "max_steps": 2, "checkpoint": {"init_from": f"{run}:step-000002"}}
    asyncrl.train(Task().rollout, dataset=ROWS, config=Config(**config.model_dump() | begun), view="quiet")
    found = replay(tmp_path / "run")
    assert found.differences() == []
    assert [check.kept.name for check in found.checks] == ["step-000002", "model"]


def test_nothing_is_recorded_where_it_is_switched_off(model: Path, tmp_path: Path) -> None:
    settings = SMALL | {"model": str(model), "run_dir": tmp_path / "run", "max_steps": 1, "record_samples": False}
    asyncrl.train(Task().rollout, dataset=ROWS, config=Config(**settings), view="quiet")
    assert not (tmp_path / "run" / "samples").exists()
    with pytest.raises(DataError, match="record_samples = false"):
        replay(tmp_path / "run")
