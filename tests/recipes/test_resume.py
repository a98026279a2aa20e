"""Runs without rollouts that end early and go on: the same run, bit by bit; and what cannot be gone on from."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncrl.cli.main import main
from asyncrl.errors import CheckpointError, ConfigError, EngineError, StepFailed
from asyncrl.metrics.sinks import JsonlSink
from asyncrl.recipes import dpo_loop, orpo_loop, resolve_resume, save_checkpoint, sft_loop
from asyncrl.recipes.learner import Learner
from asyncrl.recipes.supervised import Result
from asyncrl.storage.checkpoints import Checkpoints
from asyncrl.testing.models import tiny_model
from asyncrl.training.trainer import TorchTrainer
from tests.recipes.cases import chats, preferences, records

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
STEPS = 6
"""Of two epochs of 10 units, 4 at a time."""


def settings(model: Path, run: Path, **more: Any) -> dict[str, Any]:
    common = {"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "warmup_steps": 1, "dcp_save_interval": 1}
    return {"base_model": str(model), "log_path": run, "engine": {"checkpoint": {"keep_last": 9}}, **common, **more}


def train(recipe: ModuleType, given: dict[str, Any], **more: Any) -> Result:
    make = chats if recipe is sft_loop else preferences
    return recipe.main(recipe.Config(**given), make(10), make(4, held_out=True), view="quiet", **more)  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def learned(folder: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock, of each step."""
    return [{k: v for k, v in record.items() if not k.endswith(("_s", "_per_s"))} for record in records(folder)]


def names(run: Path) -> list[str]:
    return [checkpoint.folder.name for checkpoint in Checkpoints(run).all()]


# The same run


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("recipe", [sft_loop, dpo_loop, orpo_loop], ids=["sft", "dpo", "orpo"])
def test_a_run_that_goes_on_is_the_same_run(recipe: ModuleType, rank: int, model: Path, tmp_path: Path) -> None:
    """From the middle of an epoch, and from its end."""
    given = settings(model, tmp_path / "run", lora_rank=rank)
    whole = train(recipe, given)
    expected, trace = weights(whole.model_dir), learned(whole.run_dir)
    assert (whole.steps, len(trace)) == (STEPS, STEPS)
    for step in (4, 3):
        again = train(recipe, given, resume=f"step-{step:06d}")
        assert weights(again.model_dir) == expected
        assert learned(again.run_dir) == trace
        assert (again.before, again.after, again.steps) == (whole.before, whole.after, STEPS)
        assert again.wall_s > 0
    undone = (tmp_path / "run" / "logs" / "undone" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in undone] == [5, 6, 4, 5, 6]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.life-0")) == [
        "step-000005.life-0",
        "step-000006.life-0",
    ]


def test_a_warm_start_and_a_start_from_a_checkpoint_go_on(model: Path, tmp_path: Path) -> None:
    """DPO's reference is where the run began: an adapter, or the weights of a checkpoint that has moved on since."""
    supervised = train(sft_loop, settings(model, tmp_path / "sft", lora_rank=4, learning_rate=1e-2))
    starts = {"warm_start_from_adapter": supervised.model_dir, "init_from_checkpoint": str(tmp_path / "sft")}
    for number, (name, start) in enumerate(starts.items()):
        rank = {} if number == 0 else {"lora_rank": 4}
        given = settings(model, tmp_path / name, **{name: start}, **rank)
        whole = train(dpo_loop, given)
        assert whole.before is not None
        assert whole.before["reward_margin"] == 0
        assert learned(whole.run_dir)[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
        expected, trace = weights(whole.model_dir), learned(whole.run_dir)
        if name == "init_from_checkpoint":
            train(sft_loop, settings(model, tmp_path / "sft", lora_rank=4, learning_rate=1e-2, epochs=3))
            assert names(tmp_path / "sft")[-1] == "step-000009"
        again = train(dpo_loop, given, resume="step-000002")
        assert learned(again.run_dir) == trace
        assert weights(again.model_dir) == expected
        assert again.before == whole.before


KILLED = """
import os, signal, sys
from asyncrl.cli.main import main
from asyncrl.storage.checkpoints import Checkpoints

commit = Checkpoints.commit

def killed_at_step_3(self, step, entry):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, step, entry)

Checkpoints.commit = killed_at_step_3
main(sys.argv[1:])
"""


@pytest.fixture
def project(model: Path, tmp_path: Path) -> Path:
    """A user's folder."""
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(10)))
    lines = f'base_model = "{model}"\ndataset = "chats.jsonl"\nbatch_size = 4\nepochs = 2\ndcp_save_interval = 1\n'
    (tmp_path / "sft.toml").write_text(lines)
    return tmp_path


def test_what_was_killed_goes_on_from_the_command_line(project: Path) -> None:
    """kill -9 while a checkpoint is being written, and `asyncrl resume`: the same weights as without."""
    whole, run = project / "whole", project / "run"
    assert main(["sft", str(project / "sft.toml"), "--log_path", str(whole)]) == 0
    command = [sys.executable, "-c", KILLED, "sft", str(project / "sft.toml"), "--log_path", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LIMIT_S, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        ".step-000003.unfinished",
        "step-000001",
        "step-000002",
    ]
    assert main(["resume", str(run)]) == 0
    assert (learned(run), weights(run / "model")) == (learned(whole), weights(whole / "model"))
    entries = [json.loads(line) for line in (run / "checkpoints.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["life"]) for entry in entries] == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1)]
    assert names(run) == ["step-000005", "step-000006"]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(project: Path) -> None:
    run = project / "run"
    assert main(["sft", str(project / "sft.toml"), "--log_path", str(run), "--dcp_save_interval", "0"]) == 0
    expected, kept = weights(run / "model"), learned(run)
    shutil.rmtree(run / "checkpoints")
    assert main(["resume", str(run)]) == 0
    assert (weights(run / "model"), learned(run)) == (expected, kept)
    assert (run / "logs" / "environment.life-0.json").is_file()
    assert main(["resume", f"{run}:step-000003"]) == 2


def test_ctrl_c_leaves_a_checkpoint(model: Path, tmp_path: Path) -> None:
    given = settings(model, tmp_path / "run", dcp_save_interval=0, epochs=500)
    thread = threading.Thread(
        target=lambda: (
            wait_for(lambda: len(records_so_far(tmp_path / "run")) > 1),
            os.kill(os.getpid(), signal.SIGINT),
        )
    )
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train(sft_loop, given)
    thread.join(LIMIT_S)
    (name,) = names(tmp_path / "run")
    steps = json.loads((tmp_path / "run" / "summary.json").read_text())["steps"]
    assert name == f"step-{steps:06d}"
    assert train(sft_loop, {**given, "max_steps": steps + 2}).steps == steps + 2  # goes on by itself
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, steps + 3))


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.01)


def records_so_far(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_nothing_is_left_to_train_of_a_run_that_had_ended(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(model, tmp_path / "run", dcp_save_interval=None)
    first = train(sft_loop, given)
    assert names(tmp_path / "run") == ["step-000006"]
    again = sft_loop.main(sft_loop.Config(**given), chats(10))
    assert (again.steps, learned(again.run_dir)) == (STEPS, learned(first.run_dir))
    assert "resumed from step-000006: nothing is left to train" in capsys.readouterr().out


# Which checkpoints there are


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"engine": {"checkpoint": {"keep_last": 2}}}, ["step-000005", "step-000006"]),
        ({"engine": {"checkpoint": {"keep_last": 1, "keep_every": 2}}}, ["step-000002", "step-000004", "step-000006"]),
        ({"dcp_save_interval": 4}, ["step-000004", "step-000006"]),
        ({"dcp_save_interval": 4, "save_final_checkpoint": False}, ["step-000004"]),
        ({"dcp_save_interval": 0}, ["step-000006"]),
        ({"dcp_save_interval": 0, "save_final_checkpoint": False}, []),
    ],
)
def test_checkpoints_come_and_go_as_the_settings_say(
    more: dict[str, Any], expected: list[str], model: Path, tmp_path: Path
) -> None:
    result = train(sft_loop, settings(model, tmp_path / "run", **more))
    assert names(result.run_dir) == expected
    assert result.model_dir.exists() == more.get("save_final_checkpoint", True)
    assert not list((tmp_path / "run").glob("checkpoints/.*"))


def test_a_run_without_checkpoints_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft_loop.main(sft_loop.Config(**settings(model, tmp_path / "run", dcp_save_interval=0)), chats(4))
    assert "warning: dcp_save_interval is 0: a run that is killed cannot be resumed" in capsys.readouterr().out


# What cannot be gone on from


def test_misuse_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    given = settings(model, tmp_path / "run", lora_rank=4)
    result = train(sft_loop, given)
    kept = learned(result.run_dir)
    other = tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"the data changed \(rows is 9 and was 10; fingerprint is"):
        sft_loop.main(sft_loop.Config(**given), chats(9), view="quiet")
    with pytest.raises(CheckpointError, match="the data changed"):
        train(sft_loop, {**given, "seed": 1})
    with pytest.raises(CheckpointError, match="LoRA rank 4"):
        train(sft_loop, {**given, "lora_rank": 8})
    with pytest.raises(CheckpointError, match="a full model"):
        train(sft_loop, {**given, "lora_rank": 0})
    with pytest.raises(CheckpointError, match="another model"):
        train(sft_loop, {**given, "base_model": str(other)})
    with pytest.raises(CheckpointError, match="is of `asyncrl sft`, and `asyncrl dpo` cannot go on from it"):
        train(dpo_loop, given)
    with pytest.raises(CheckpointError, match="there is no checkpoint 'step-000099'"):
        train(sft_loop, given, resume="step-000099")
    with pytest.raises(CheckpointError, match="sampler snapshot"):
        train(sft_loop, {**given, "log_path": None}, resume=result.model_dir)
    with pytest.raises(CheckpointError, match="sampler snapshot"):
        train(sft_loop, {**given, "log_path": tmp_path / "new", "init_from_checkpoint": str(result.model_dir)})
    assert not (tmp_path / "new").exists()
    assert learned(result.run_dir) == kept
    assert names(result.run_dir)[-1] == "step-000006"


def test_a_folder_is_lived_in_once_at_a_time(model: Path, tmp_path: Path) -> None:
    given = settings(model, tmp_path / "run")
    asked: list[str] = []

    def second_life(*arguments: Any) -> None:
        with pytest.raises(ConfigError, match="is working on"):
            train(sft_loop, given, resume=True)
        asked.append("refused")

    sft_loop.main(sft_loop.Config(**given), Watched(chats(10), second_life), view="quiet")
    assert asked == ["refused"]


class Watched(list[Any]):
    """Rows that do something when the last one is read for training, in the middle of the run's beginning."""

    def __init__(self, rows: list[Any], happens: Callable[[], None]) -> None:
        super().__init__(rows)
        self._happens, self._reads = happens, 0

    def __getitem__(self, index: Any) -> Any:
        self._reads += 1
        if self._reads == 2 * len(self):  # the first pass is that of the fingerprint
            self._happens()
        return super().__getitem__(index)


# Faults


def test_a_disk_that_is_full_costs_a_checkpoint_and_not_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = TorchTrainer.begin_save_state

    def full_at_step_2(self: TorchTrainer, folder: Path) -> Any:
        if self.step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return begin(self, folder)

    monkeypatch.setattr(TorchTrainer, "begin_save_state", full_at_step_2)
    result = sft_loop.main(sft_loop.Config(**settings(model, tmp_path / "run")), chats(10))
    assert names(result.run_dir) == [f"step-{step:06d}" for step in (1, 3, 4, 5, 6)]
    said = capsys.readouterr().out
    assert (
        "warning: the checkpoint of step 2 could not be written (No space left on device); the newest is that" in said
    )


def test_old_checkpoints_that_cannot_be_removed_cost_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Checkpoints, "prune", fails)
    result = sft_loop.main(sft_loop.Config(**settings(model, tmp_path / "run")), chats(10))
    assert len(names(result.run_dir)) == STEPS
    said = capsys.readouterr()
    assert "could not be written" not in said.out
    assert "old checkpoints could not be removed" in said.err


def test_a_disk_too_slow_for_the_last_checkpoint_costs_no_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchTrainer, "begin_save_state", lambda self, folder: Future())
    with pytest.raises(EngineError, match=r"not on the disk after checkpoint.timeout_s=0.2 s"):
        train(sft_loop, settings(model, tmp_path / "run", dcp_save_interval=0, dcp_timeout=0.2))
    assert weights(tmp_path / "run" / "model")


def test_a_disk_that_is_full_for_all_is_one_clear_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: JsonlSink, axis: str, record: Any) -> None:
        if axis == "step" and record["step"] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonlSink, "log", full)
    with pytest.raises(EngineError, match=r"run cannot be written: No space left on device. Make room"):
        train(sft_loop, settings(model, tmp_path / "run"))
    assert names(tmp_path / "run")[-1] == "step-000003"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_a_batch_that_cannot_be_trained_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, calls = Learner.step, []

    def fails(self: Learner, units: Any) -> dict[str, float]:
        calls.append(len(units))
        if len(calls) in bad:
            raise StepFailed("the loss is not finite")
        return step(self, units)

    monkeypatch.setattr(Learner, "step", fails)
    bad = {2, 3, 5}
    result = sft_loop.main(sft_loop.Config(**settings(model, tmp_path / "run")), chats(10))
    assert [record["units"] for record in records(result.run_dir)] == [4, 4, 2]
    assert capsys.readouterr().out.count("warning: a batch was left out: the loss is not finite") == 3
    calls.clear()
    bad = {2, 3, 4}
    with pytest.raises(StepFailed):
        train(sft_loop, settings(model, tmp_path / "stops"))
    entries = [json.loads(line) for line in (tmp_path / "stops" / "checkpoints.jsonl").read_text().splitlines()]
    assert [(entry["name"], entry["reason"]) for entry in entries] == [("step-000001", "interval")]


# In the words of the hosted cookbook


def test_a_loop_of_ones_own_goes_on(model: Path, tmp_path: Path) -> None:
    config = sft_loop.Config(base_model=str(model), lora_rank=4).engine_config()

    def trainer() -> TorchTrainer:
        return TorchTrainer(config, total_steps=4, weights_format="tensors")

    first = trainer()
    assert resolve_resume(first, tmp_path / "run") is None
    save_checkpoint(first, "step-3", tmp_path / "run", {"step": 3, "data_consumed": 12, "mine": "x"}, kind="both")
    snapshot = save_checkpoint(first, "step-4", tmp_path / "run", {"step": 4}, kind="sampler")
    found = resolve_resume(trainer(), tmp_path / "run")
    assert found is not None
    assert (found.step, found.data_consumed, found.loop_state["mine"]) == (3, 12, "x")
    assert found.source_job_id == str(tmp_path / "run")
    entries = [json.loads(line) for line in (tmp_path / "run" / "checkpoints.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["kind"]) for entry in entries] == [(3, "both"), (4, "sampler")]
    fresh = resolve_resume(trainer(), tmp_path / "new", "run:step-000003")
    assert fresh is not None
    assert (fresh.step, fresh.data_consumed, fresh.source_job_id) == (0, 0, str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="sampler snapshot"):
        resolve_resume(trainer(), tmp_path / "new", str(snapshot))
    with pytest.raises(ConfigError, match="Expected step-N"):
        save_checkpoint(first, "best", tmp_path / "run", {})
    with pytest.raises(ConfigError, match="loop_state says step 4"):
        save_checkpoint(first, "step-3", tmp_path / "run", {"step": 4})
