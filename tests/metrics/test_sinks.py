from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.metrics.sinks import SinkList, open_sinks

CONFIG = Config(model="some/model", seed=7)


class FakeRun:
    """A run of wandb or trackio, as far as a sink uses one."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.id = settings.get("id") or "f4f4f4"
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.axes: dict[str, str] = {}
        self.finished = 0

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values["step"] if step is None and "step" in values else step, values))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.axes[name] = step_metric

    def finish(self) -> None:
        self.finished += 1


def fake_tracker(monkeypatch: pytest.MonkeyPatch, name: str) -> list[FakeRun]:
    """Put a tracker in the place of the package `name`; its runs are collected in the list."""
    runs: list[FakeRun] = []

    def init(**settings: Any) -> FakeRun:
        runs.append(FakeRun(settings))
        return runs[-1]

    module = ModuleType(name)
    module.init = init  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return runs


def test_metrics_file_has_one_line_per_step(tmp_path: Path) -> None:
    sinks = open_sinks((), tmp_path, CONFIG)
    sinks.write({"step": 1, "loss": 0.5})
    sinks.write({"step": 2, "loss": math.nan})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close: a reader may follow
    sinks.close()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_get_the_config_and_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    runs = fake_tracker(monkeypatch, tracker)
    sinks = open_sinks([tracker], tmp_path / "run-1", CONFIG) if (tmp_path / "run-1").mkdir() is None else None
    assert sinks is not None
    sinks.write({"step": 3, "reward_mean": 0.25})
    sinks.close()
    (run,) = runs
    assert run.settings["name"] == "run-1"
    assert run.settings["config"]["seed"] == 7
    step, values = run.logged[0]
    assert (step, values["reward_mean"]) == (3, 0.25)
    assert run.finished == 1


def test_evaluations_have_a_file_and_an_axis_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation ends after later steps were logged; wandb would drop a step that goes back."""
    wandb, trackio = fake_tracker(monkeypatch, "wandb"), fake_tracker(monkeypatch, "trackio")
    sinks = open_sinks(["wandb", "trackio"], tmp_path, CONFIG)
    found = {"eval_version": 3.0, "eval_reward": 0.25, "eval_reward_low": math.nan}
    for step in (3, 4, 5):
        sinks.write({"step": step, "loss": 0.0})
    sinks.evaluated(found)
    sinks.close()
    assert [step for step, _ in wandb[0].logged] == [3, 4, 5, None]
    assert wandb[0].axes == {"eval_reward": "eval_version", "eval_reward_low": "eval_version", "loss": "step"}
    assert [step for step, _ in trackio[0].logged] == [3, 4, 5, 3]
    assert wandb[0].logged[-1][1]["eval_reward"] == trackio[0].logged[-1][1]["eval_reward"] == 0.25
    (line,) = (tmp_path / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(line) == {**found, "eval_reward_low": None}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_missing_tracker_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == tracker]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ConfigError, match=rf"pip install 'asyncrl\[{tracker}\]'"):
        open_sinks([tracker], tmp_path, CONFIG)


def test_a_tracker_that_is_already_open_is_closed_when_the_next_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = fake_tracker(monkeypatch, "wandb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError):
        open_sinks(["wandb", "trackio"], tmp_path, CONFIG)
    assert runs[0].finished == 1


def test_every_sink_is_closed_when_one_fails() -> None:
    closed = []

    class Sink:
        def __init__(self, name: str) -> None:
            self.name = name

        def log(self, axis: str, record: Mapping[str, float | int | str]) -> None: ...

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "b":
                raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        SinkList([Sink("a"), Sink("b"), Sink("c")]).close()
    assert sorted(closed) == ["a", "b", "c"]


def test_records_of_rollouts_have_a_file_and_an_axis_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake_tracker(monkeypatch, "wandb")
    sinks = open_sinks(["wandb"], tmp_path, CONFIG)
    assert not (tmp_path / "producer.jsonl").exists(), "a supervised run has no rollouts"
    for ended in (32, 64):
        sinks.produced({"rollouts_ended": ended, "rollout_reward_mean": 0.5})
    sinks.close()
    assert wandb[0].axes == {"rollout_reward_mean": "rollouts_ended"}
    lines = [json.loads(line) for line in (tmp_path / "producer.jsonl").read_text().splitlines()]
    assert [line["rollouts_ended"] for line in lines] == [32, 64]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_tracker_that_does_not_start_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tracker(monkeypatch, "wandb")

    def init(**settings: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(ConfigError, match=r"no API key\. WANDB_MODE=offline"):
        open_sinks(["wandb"], tmp_path, CONFIG)


def test_wandb_goes_where_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_tracker(monkeypatch, "wandb")
    monkeypatch.setenv("WANDB_PROJECT", "of the environment")
    where = {"entity": "us", "project": "ours", "run_name": "first"}
    open_sinks(["wandb"], tmp_path, Config(model="m", wandb=where)).close()
    open_sinks(["wandb"], tmp_path, CONFIG).close()
    assert [(run.settings["entity"], run.settings["project"], run.settings["name"]) for run in runs] == [
        ("us", "ours", "first"),
        (None, "of the environment", tmp_path.name),
    ]


# A run that goes on


def test_trackers_go_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb, trackio = fake_tracker(monkeypatch, "wandb"), fake_tracker(monkeypatch, "trackio")
    (tmp_path / "run").mkdir()
    for resumed in (None, 4, None):
        open_sinks(["wandb", "trackio"], tmp_path / "run", CONFIG, resumed).close()
    assert [(run.settings["id"], run.settings["resume"]) for run in wandb] == [
        (None, "allow"),
        ("f4f4f4", "allow"),
        (None, "allow"),
    ]
    assert [(run.settings["name"], run.settings["resume"]) for run in trackio] == [
        ("run", "never"),
        ("run", "allow"),
        ("run", "never"),
    ]
