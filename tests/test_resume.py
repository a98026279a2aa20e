"""A run that ended early goes on: with real torch, real files and the embedded sampler."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import asyncrl
from asyncrl.checkpointing import load_state
from asyncrl.cli.main import main
from asyncrl.errors import CheckpointError, ConfigError, RolloutFailed, TrainerError
from asyncrl.run import TrainResult
from asyncrl.storage.audit_run import audit_run
from asyncrl.storage.checkpoints import Checkpoints
from asyncrl.storage.folder import RunFolder
from asyncrl.testing.models import tiny_model
from asyncrl.training import trainer as trainer_module
from tests.conftest import MakeConfig

ROWS = [{"n": n % 10} for n in range(48)]
EVERY_2 = {"interval": 2}


class Bug(Exception):
    pass


class Rollout:
    """A rollout function that can be told to fail, and counts its calls."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls: Counter[int] = Counter()
        self.fails_at = fails_at

    async def __call__(self, prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
        if not prompt.evaluation:
            self.calls[prompt.index] += 1
            if self.fails_at is not None and sum(self.calls.values()) == self.fails_at:
                raise Bug
        ids = [65 + prompt["n"], 65]
        completion = await prompt.policy.generate(ids)
        return asyncrl.RolloutSample.from_completion(ids, completion, prompt.rng.random())


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(next(result.model_dir.glob("*.safetensors")))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_run(run: Path, steps: int) -> None:
    """It is whole: each step once, every prompt once, and the audit has nothing to say."""
    assert [line["step"] for line in lines(run, "metrics.jsonl")] == list(range(1, steps + 1))
    audit = audit_run(run)
    assert audit.faults == []


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 4, "alpha": 8}}], ids=["full", "lora"])
def test_a_run_that_failed_goes_on_and_rolls_nothing_finished_out_again(
    make_config: MakeConfig, settings: dict[str, Any]
) -> None:
    config = make_config(checkpoint=EVERY_2, **settings)
    first = Rollout(fails_at=130)
    with pytest.raises(RolloutFailed):
        asyncrl.train(first, dataset=ROWS, config=config)
    run = RunFolder(config.run_dir)
    left = Checkpoints(run.root).latest()
    assert left is not None
    assert left.step > 0
    assert lines(run.root, "checkpoints.jsonl")[-1]["step"] == left.step
    assert "RolloutFailed" in json.loads(run.summary.read_text())["error"]
    kept = {group.row for group in load_state(left).groups}

    second = Rollout()
    result = asyncrl.train(second, dataset=ROWS, config=config, resume=True)
    assert result.resumed_from == left.step
    assert result.steps == 12
    assert result.ledger["admitted"] == 48
    assert result.ledger["pending"] == 0
    assert not kept & second.calls.keys(), "finished groups are trained, not rolled out again"
    check_run(run.root, 12)
    assert json.loads(run.summary.read_text())["resumed_from"] == left.step
    assert (run.logs / "summary.life-0.json").exists()


def test_a_named_checkpoint_of_the_same_run(make_config: MakeConfig) -> None:
    config = make_config(checkpoint={"interval": 2, "keep_last": 9}, max_steps=8)
    asyncrl.train(Rollout(), dataset=ROWS, config=config)
    result = asyncrl.train(Rollout(), dataset=ROWS, config=config, resume="step-000002")
    assert (result.resumed_from, result.steps) == (2, 8)
    check_run(result.run_dir, 8)
    names = {path.name for path in (result.run_dir / "checkpoints").iterdir()}
    assert {"step-000002", "step-000008", "step-000008.life-0"} <= names, "what was undone can still be named"
    with pytest.raises(CheckpointError, match="There are: step-000002"):
        asyncrl.train(Rollout(), dataset=ROWS, config=config, resume="step-000001")


def test_a_finished_run_goes_on_when_it_gets_more_steps(make_config: MakeConfig) -> None:
    config = make_config(max_steps=3, evaluation={"samples": 2})
    rollout = Rollout()
    before = asyncrl.train(rollout, dataset=ROWS, config=config, evaluation=ROWS[:3]).before
    again = asyncrl.train(rollout, dataset=ROWS, config=config, resume=True, evaluation=ROWS[:3])
    assert (again.steps, again.resumed_from) == (3, 3), "there is nothing left to do"
    more = asyncrl.train(
        rollout, dataset=ROWS, config=make_config(max_steps=5), resume=str(config.run_dir), evaluation=ROWS[:3]
    )
    assert (more.steps, more.resumed_from) == (5, 3)
    assert before is not None
    assert more.before == before, "what the run started from is not measured again"
    assert [evaluated.version for evaluated in more.evaluations] == [0, 5]
    check_run(more.run_dir, 5)


def test_a_run_without_a_checkpoint_begins_again(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(checkpoint={"interval": 0, "final": False}, max_steps=4)
    with pytest.raises(RolloutFailed):
        asyncrl.train(Rollout(fails_at=60), dataset=ROWS, config=config)
    result = asyncrl.train(Rollout(), dataset=ROWS, config=config, resume=True, view="live")
    assert (result.resumed_from, result.steps) == (0, 4)
    check_run(result.run_dir, 4)
    said = capsys.readouterr().out
    assert "there is no checkpoint yet: the run begins again from its start" in said
    assert said.index("finished after 4 steps") > said.rindex("╰"), "what is said last stands below the panel"


def test_a_folder_that_is_not_there_yet_is_a_new_run(make_config: MakeConfig) -> None:
    result = asyncrl.train(Rollout(), dataset=ROWS, config=make_config(max_steps=1), resume=True)
    assert (result.resumed_from, result.steps) == (None, 1)


def test_a_checkpoint_that_lost_something_is_passed_over(make_config: MakeConfig) -> None:
    config = make_config(checkpoint=EVERY_2, max_steps=4)
    asyncrl.train(Rollout(), dataset=ROWS, config=config)
    largest = max((config.run_dir / "checkpoints" / "step-000004").rglob("*.distcp"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    result = asyncrl.train(Rollout(), dataset=ROWS, config=config, resume=True)
    assert (result.resumed_from, result.steps) == (2, 4)
    check_run(result.run_dir, 4)


class TestMisuse:
    @pytest.fixture
    def done(self, make_config: MakeConfig) -> Path:
        result = asyncrl.train(Rollout(), dataset=ROWS, config=make_config(max_steps=2, lora={"rank": 4, "alpha": 8}))
        return result.run_dir

    def test_other_data(self, done: Path, make_config: MakeConfig) -> None:
        config = make_config(max_steps=4, lora={"rank": 4, "alpha": 8})
        for rows in (ROWS[:-1], [*ROWS[:-1], {"n": 3}], [dict(row, more=1) for row in ROWS]):
            with pytest.raises(CheckpointError, match=r"the data changed.*checkpoint\.init_from"):
                asyncrl.train(Rollout(), dataset=rows, config=config, resume=True)
        with pytest.raises(CheckpointError, match="seed is 1 and was 0"):
            asyncrl.train(
                Rollout(),
                dataset=ROWS,
                config=make_config(max_steps=4, seed=1, lora={"rank": 4, "alpha": 8}),
                resume=True,
            )

    def test_another_rank(self, done: Path, make_config: MakeConfig) -> None:
        for lora in ({"rank": 8, "alpha": 8}, {"rank": 0}):
            with pytest.raises(CheckpointError, match="rank"):
                asyncrl.train(Rollout(), dataset=ROWS, config=make_config(max_steps=4, lora=lora), resume=True)

    def test_another_model(self, done: Path, make_config: MakeConfig, tmp_path: Path) -> None:
        other = tiny_model(tmp_path / "other", seed=1)
        with pytest.raises(CheckpointError, match="model"):
            asyncrl.train(
                Rollout(),
                dataset=ROWS,
                config=make_config(model=str(other), max_steps=4, lora={"rank": 4, "alpha": 8}),
                resume=True,
            )

    def test_a_sampler_snapshot(self, done: Path, make_config: MakeConfig, tmp_path: Path) -> None:
        for settings in ({"resume": str(done / "model")}, {}):
            config = make_config(run_dir=tmp_path / "new", checkpoint={"init_from": str(done / "model")})
            with pytest.raises(CheckpointError, match="sampler snapshot"):
                asyncrl.train(Rollout(), dataset=ROWS, config=config, **settings)

    def test_nothing_of_it_is_changed(self, done: Path, make_config: MakeConfig) -> None:
        before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file() and path.suffix != ".db"}
        with pytest.raises(CheckpointError):
            asyncrl.train(Rollout(), dataset=ROWS[1:], config=make_config(lora={"rank": 4}), resume=True)
        assert {path: path.read_bytes() for path in before} == before

    def test_a_run_that_is_alive(self, done: Path, make_config: MakeConfig) -> None:
        with RunFolder(done).lock(), pytest.raises(ConfigError, match="process"):
            asyncrl.train(Rollout(), dataset=ROWS, config=make_config(lora={"rank": 4, "alpha": 8}), resume=True)

    def test_another_run_dir(self, done: Path, make_config: MakeConfig, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"checkpoint\.init_from"):
            asyncrl.train(Rollout(), dataset=ROWS, config=make_config(run_dir=tmp_path / "b"), resume=str(done))


@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 4, "alpha": 8}}], ids=["full", "lora"])
def test_new_data_from_old_weights(make_config: MakeConfig, tmp_path: Path, settings: dict[str, Any]) -> None:
    """The sampler holds them from the first rollout on: the canary compares both ends at version 0."""
    old = asyncrl.train(Rollout(), dataset=ROWS, config=make_config(max_steps=3, **settings))
    config = make_config(
        run_dir=tmp_path / "new",
        max_steps=1,
        checkpoint={"init_from": f"{old.run_dir}:step-000003"},
        optimizer={"learning_rate": 1e-12},
        **settings,
    )
    new = asyncrl.train(Rollout(), dataset=ROWS[5:], config=config)
    assert (new.steps, new.resumed_from) == (1, None)
    for name, weight in weights(old).items():
        torch.testing.assert_close(weights(new)[name], weight, atol=1e-6, rtol=0)


def poisoned(at_steps: set[int]) -> Callable[..., Any]:
    """`normalize_and_clip` that finds no finite gradient at some calls."""
    honest = trainer_module.normalize_and_clip
    calls = iter(range(1, 1000))

    def clip(*arguments: Any) -> float:
        norm = honest(*arguments)
        return math.nan if next(calls) in at_steps else norm

    return clip


def test_a_step_that_cannot_be_taken_is_given_up(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "normalize_and_clip", poisoned({2, 3, 6}))
    result = asyncrl.train(Rollout(), dataset=ROWS, config=make_config())
    assert result.ledger["rejected"] == 12, "the groups of three steps"
    assert result.ledger["trained"] + result.ledger["filtered"] == 36
    check_run(result.run_dir, 9)
    told = [json.loads(path.read_text()) for path in sorted((result.run_dir / "diagnosis").iterdir())]
    assert [len(failed["groups"]) for failed in told] == [4, 4]
    assert all("finite" in failed["error"] for failed in told)


def test_too_many_of_them_end_the_run_with_a_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(trainer={"device": "cpu", "skip_steps": 1})
    with monkeypatch.context() as patched:
        patched.setattr(trainer_module, "normalize_and_clip", poisoned({3, 4}))
        with pytest.raises(TrainerError, match="2 optimizer steps in a row could not be taken"):
            asyncrl.train(Rollout(), dataset=ROWS, config=config)
    assert lines(config.run_dir, "checkpoints.jsonl")[-1]["step"] == 2
    result = asyncrl.train(Rollout(), dataset=ROWS, config=config, resume=True)
    assert result.ledger["rejected"] == 4
    assert result.ledger["pending"] == 0
    check_run(result.run_dir, result.steps)


ROLLOUT_FILE = """
import asyncrl

async def rollout(prompt):
    ids = [65 + prompt["n"], 65]
    completion = await prompt.policy.generate(ids)
    return asyncrl.RolloutSample.from_completion(ids, completion, prompt.rng.random())
"""


def test_the_command_line_goes_on_with_a_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(ROLLOUT_FILE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.toml").write_text(
        f'model = "{model}"\nrollout_fn = "my.py:rollout"\ndataset = "rows.jsonl"\nrun_dir = "runs/a"\nmax_steps = 2\n'
        'max_seq_len = 64\n[sampling]\nmax_tokens = 4\n[trainer]\ndevice = "cpu"\n[loss]\nkl_beta = 0.0\n'
    )
    assert main(["train", "run.toml"]) == 0
    assert main(["train", "run.toml"]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", "run.toml", "--resume", "--max_steps", "3"]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert main(["resume", "runs/a", "--max_steps", "4"]) == 0
    assert main(["resume", "runs/a:step-000003", "--max_steps", "5"]) == 0
    assert main(["resume", "runs/b"]) == 2
    assert "there is no run in" in capsys.readouterr().err
    check_run(tmp_path / "runs" / "a", 5)
