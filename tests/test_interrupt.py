"""Signals, stalls and lost terminals, on real processes: how a run ends, with which exit code, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl.exits import CUT_SHORT, FINISHED, STALLED, stopped_by
from asyncrl.storage.audit_run import audit_run
from asyncrl.storage.folder import config_toml
from tests.conftest import MakeConfig

ROOT = Path(__file__).parents[1]
LIMIT_S = 90.0
"""Of every wait: each one takes a second or two on an idle machine."""
INTERRUPTED = stopped_by(signal.SIGINT)

ROLLOUT = """
import asyncio
import time
import asyncrl
{before}
async def rollout(prompt):
    ids = [65 + prompt["n"] % 10, 65]
    if {hangs}:
        print("HANGING", flush=True)
        await asyncio.Event().wait()
    completion = await prompt.policy.generate(ids)
    low = sum(token < 64 for token in completion.tokens)
    return asyncrl.RolloutSample.from_completion(ids, completion, low / len(completion.tokens))
"""
SCRIPT = """
import json
from pathlib import Path
import asyncrl
from asyncrl.cli.config import load_config
from my_rollout import rollout
if __name__ == "__main__":
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    asyncrl.train(rollout, dataset=rows, config=load_config("run.toml"), evaluation=rows[:4])
"""
SAVES_ITS_STEP = """
from asyncrl.training.trainer import TorchTrainer
honest = TorchTrainer.save_model
def save(self, folder, **how):
    honest(self, folder, **how)
    (folder / "step").write_text(str(self.step))
TorchTrainer.save_model = save
"""
NEVER_PUBLISHES = """
from asyncrl.sampling.transformers import TransformersSampler
async def never(self, weights):
    print("PUBLISHING", flush=True)
    await asyncio.Event().wait()
TransformersSampler.publish = never
"""
LOADS_SLOWLY = """
from asyncrl.training import trainer
honest = trainer.load_policy
def slow(config):
    print("LOADING", flush=True)
    time.sleep(1)
    return honest(config)
trainer.load_policy = slow
"""


class Run:
    """One `asyncrl train`, as its own process group."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait for the run to get somewhere. It must not end before."""
        deadline = time.monotonic() + LIMIT_S
        while not reached():
            assert self.process.poll() is None, f"ended early:\n{self.errors()}"
            assert time.monotonic() < deadline, f"never got there:\n{self.errors()}"
            time.sleep(0.02)

    def says(self, text: str) -> Callable[[], bool]:
        return lambda: text in (self.folder.parent / "stdout").read_text()

    def warns(self, text: str) -> Callable[[], bool]:
        return lambda: text in self.errors()

    def errors(self) -> str:
        return (self.folder.parent / "stderr").read_text()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        return self.process.wait(LIMIT_S)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def last_step(self) -> int:
        return self.lines("metrics.jsonl")[-1]["step"]

    def last_checkpoint(self) -> int:
        return self.lines("checkpoints.jsonl")[-1]["step"]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


@pytest.fixture
def start(make_config: MakeConfig, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; after the test no process of theirs may be alive."""
    started: list[subprocess.Popen[str]] = []

    def go(*arguments: str, hangs: str = "False", before: str = "", stdout: int | None = None, **settings: Any) -> Run:
        config = make_config(data={"epochs": 1000}, **settings)
        (tmp_path / "run.toml").write_text(
            f'dataset = "rows.jsonl"\nrollout_fn = "my_rollout.py:rollout"\n{config_toml(config)}'
        )
        (tmp_path / "my_rollout.py").write_text(ROLLOUT.format(hangs=hangs, before=before))
        (tmp_path / "script.py").write_text(SCRIPT)
        (tmp_path / "rows.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(100)))
        with (tmp_path / "stdout").open("w") as out, (tmp_path / "stderr").open("w") as err:
            process = subprocess.Popen(
                [sys.executable, "-u", *(arguments or ("-m", "asyncrl", "train", "run.toml"))],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
                stdout=out if stdout is None else stdout,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        started.append(process)
        return Run(process, config.run_dir or tmp_path)

    yield go
    for process in started:
        with ended_group(process.pid):
            process.kill()
            process.wait(LIMIT_S)


@contextmanager
def ended_group(group: int) -> Iterator[None]:
    """Nobody else is left in the process group; what is left is ended."""
    yield
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    pytest.fail(f"processes of group {group} were left behind")


def stepped(run: Run, steps: int = 3) -> Callable[[], bool]:
    return lambda: len(run.lines("metrics.jsonl")) >= steps


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_once_ends_cleanly(start: Callable[..., Run], model: Path, number: signal.Signals) -> None:
    run = start(before=SAVES_ITS_STEP)
    run.until(stepped(run))
    run.send(number)
    assert run.end() == stopped_by(number)
    assert "Traceback" not in run.errors()
    assert "stopping after this step; once more stops at once" in run.errors()

    summary, records, audit = run.summary(), run.lines("metrics.jsonl"), audit_run(run.folder)
    assert summary["interrupted"] is True
    assert audit.faults == []
    assert summary["steps"] == len(records) == audit.account.step == run.last_step() == run.last_checkpoint()
    assert int((run.folder / "model" / "step").read_text()) == len(records)
    told = audit.account.summary()
    assert told == {**summary["ledger"], **told}
    assert_trained(model, run.folder / "model")


def assert_trained(before: Path, after: Path) -> None:
    old, new = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (before, after))
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_twice_ends_at_once(start: Callable[..., Run]) -> None:
    """The second signal comes while the first one waits for a hot-load that takes for ever."""
    run = start(before=NEVER_PUBLISHES)
    run.until(run.says("PUBLISHING"))
    run.send(signal.SIGINT)
    run.until(run.warns("stopping after this step"))
    run.send(signal.SIGINT)
    assert run.end() == CUT_SHORT
    assert "stopping at once" in run.errors()
    assert "Traceback" not in run.errors()


def test_a_stop_that_takes_too_long_is_cut_short_and_says_what_it_waited_for(start: Callable[..., Run]) -> None:
    run = start(before=NEVER_PUBLISHES, stop_timeout_s=2.0)
    run.until(run.says("PUBLISHING"))
    run.send(signal.SIGTERM)
    assert run.end() == CUT_SHORT
    assert "error: the stop has not come to its end within stop_timeout_s=2 s" in run.errors()
    assert "> never (my_rollout.py:" in run.errors()
    assert "MainThread" in (run.folder / "stalled.txt").read_text()


def test_a_stall_names_the_culprit_and_has_an_exit_code_of_its_own(start: Callable[..., Run]) -> None:
    """The hot-load never ends; the engine waits for it before the next one."""
    run = start(before=NEVER_PUBLISHES, rollout={"timeout_s": 2.0}, stall_timeout_s=3.0)
    assert run.end() == STALLED
    assert "error: nothing has moved for stall_timeout_s=3 s." in run.errors()
    assert "> never (my_rollout.py:" in run.errors()
    assert "Traceback" not in run.errors()
    assert "asyncrl hot-load of 1" in (run.folder / "stalled.txt").read_text()
    assert audit_run(run.folder).faults == []


def test_while_rollouts_hang(start: Callable[..., Run]) -> None:
    run = start(hangs="True")
    run.until(run.says("HANGING"))
    run.send(signal.SIGINT)
    assert run.end() == INTERRUPTED
    assert (run.summary()["steps"], run.summary()["interrupted"]) == (0, True)
    told = audit_run(run.folder).account.summary()
    assert told["admitted"] == told["pending"] > 0


def test_while_the_model_loads(start: Callable[..., Run]) -> None:
    run = start(before=LOADS_SLOWLY)
    run.until(run.says("LOADING"))
    run.send(signal.SIGINT)
    assert run.end() == INTERRUPTED
    assert "stopping; once more stops at once" in run.errors(), "there is no step to finish"
    assert "Traceback" not in run.errors()
    assert not (run.folder / "model").exists()


def test_during_the_evaluation_before(start: Callable[..., Run]) -> None:
    run = start("script.py", hangs="prompt.evaluation")
    run.until(run.says("HANGING"))
    run.send(signal.SIGINT)
    assert run.end() == -signal.SIGINT, "an exception that nobody caught: a shell says 130"
    assert audit_run(run.folder).account.summary()["admitted"] == 0


def test_during_the_evaluation_after(start: Callable[..., Run]) -> None:
    """What was trained has its summary."""
    run = start("script.py", hangs="prompt.evaluation and prompt.policy.version", max_steps=2)
    run.until(run.says("HANGING"))
    run.send(signal.SIGTERM)
    assert run.end() == stopped_by(signal.SIGTERM)
    summary = run.summary()
    assert (summary["steps"], summary["interrupted"]) == (2, True)
    assert summary["reward_before"] is not None
    assert summary["reward_after"] is None
    assert (run.folder / "model" / "model.safetensors").is_file()


def test_during_an_evaluation_beside_training(start: Callable[..., Run]) -> None:
    """Training goes on beside one that hangs, and a terminal that is lost ends both."""
    run = start("script.py", hangs="prompt.evaluation and prompt.policy.version", evaluation={"interval": 1})
    run.until(run.says("HANGING"))
    seen = len(run.lines("metrics.jsonl"))
    run.until(stepped(run, seen + 3))
    run.send(signal.SIGHUP)
    assert run.end() == stopped_by(signal.SIGHUP)
    assert "Traceback" not in run.errors()
    assert (run.summary()["interrupted"], run.summary()["evaluations"]) == (True, 1)
    assert (run.folder / "model" / "config.json").is_file()


def test_a_reader_that_goes_away_costs_what_it_would_have_read(start: Callable[..., Run]) -> None:
    """As in `asyncrl train ... | head -1`; the rollout function prints too."""
    run = start(hangs='print("x" * 9999, flush=True)', stdout=subprocess.PIPE, max_steps=3)
    assert run.process.stdout is not None
    assert "run folder" in run.process.stdout.readline()
    run.process.stdout.close()
    assert run.end() == FINISHED
    assert "Traceback" not in run.errors()
    assert run.summary()["steps"] == 3
