from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.errors import ConfigError, EngineError
from asyncrl.planning.described import Description, described
from asyncrl.planning.grid import Axes, Search, search, windows_to_try
from asyncrl.planning.predict import Machine
from asyncrl.planning.runner import Question, Runner, Task, running, solve
from asyncrl.planning.setting import Failure, Point, Setting
from asyncrl.storage.folder import OFF


def config(**settings: Any) -> Config:
    return Config(**{"model": "m", "completions_per_prompt": 4, "prompt_groups_per_step": 2, **settings})


class Curve:
    """An oracle: the rate grows with the window up to 60 slots, and with the staleness; hot-loads cost `publish`."""

    def __init__(self, *, publish: float = 0.0, failing: Sequence[int] = ()) -> None:
        self.publish, self.failing = publish, failing
        self.asked: list[Setting] = []

    def ideals(self, settings: Sequence[Setting]) -> list[float]:
        return [0.0 if s.window in self.failing else float(min(s.window or 60, 60)) for s in settings]

    def points(self, settings: Sequence[Setting], ideal: float) -> list[Point | Failure]:
        self.asked += settings
        return [
            Failure(s, "an outage") if s.window in self.failing or s.policy == "drop" else self._point(s, ideal)
            for s in settings
        ]

    def _point(self, setting: Setting, ideal: float) -> Point:
        rate = min(setting.window or 60, 60) * (1 - 0.5 ** (setting.max_staleness + 1))
        return Point(
            setting,
            rate,
            rate / ideal,
            0.0,
            staleness_mean=setting.max_staleness * 0.8,
            staleness_worst=setting.max_staleness,
            publish_share=self.publish / setting.sync_interval,
        )


def find(base: Config, axes: Axes, oracle: Curve) -> Search:
    return search(base, axes, oracle, give=0.1, worst=8)


def test_the_smallest_window_that_is_as_fast_as_any_serves_all_other_settings() -> None:
    found = find(config(), Axes(), Curve())
    assert [window for window, _ in found.windows] == [2, 3, 5, 9, 17, 34, 68, 136]
    assert {point.setting.window for point in found.points} == {68}
    assert found.ideal == 60
    assert len(found.points) == 6 * 3
    assert found.now is not None
    assert found.now.setting.window is None


def test_full_slots_limit_nothing_where_more_of_them_brought_nothing() -> None:
    class Full(Curve):
        def _point(self, setting: Setting, ideal: float) -> Point:
            return replace(super()._point(setting, ideal), binds="window")

    assert {point.binds for point in find(config(), Axes(), Full()).points} == {"sampler"}
    assert {point.binds for point in find(config(), Axes(window=(68, 136)), Full()).points} == {"window"}
    few = config(concurrency={"max_window": 20, "initial_window": 20})
    assert {point.binds for point in find(few, Axes(), Full()).points} == {"window"}


def test_axes_that_are_given_are_tried_as_given() -> None:
    axes = Axes(max_staleness=(1, 3), policy=("pace",), window=(8, 16), batch=(2, 4), sync=(1, 2))
    found = find(config(), axes, Curve())
    settings = [point.setting for point in found.points]
    assert len(settings) == len(set(settings)) == 2 * 1 * 2 * 2 * 2
    assert {s.window for s in settings} == {8, 16}
    assert {s.groups_per_step for s in settings} == {2, 4}
    assert {s.policy for s in settings} == {"pace"}


def test_other_sync_intervals_are_tried_where_hot_loads_cost_time() -> None:
    assert {point.setting.sync_interval for point in find(config(), Axes(), Curve()).points} == {1}
    assert {point.setting.sync_interval for point in find(config(), Axes(), Curve(publish=0.1)).points} == {1, 2, 4}


def test_settings_that_no_config_can_have_are_left_out_with_the_reason() -> None:
    found = find(config(), Axes(max_staleness=(0, 4), policy=("wait",), sync=(4,)), Curve())
    assert [point.setting.max_staleness for point in found.points] == [4]
    ((reason, count),) = found.left_out.items()
    assert "no step could ever be published" in reason
    assert count == 1
    with pytest.raises(ConfigError, match=r"none of these settings can work(.|\n)*no step could ever be published"):
        find(config(), Axes(max_staleness=(0,), sync=(4,)), Curve())


def test_what_would_end_the_run_early_is_no_recommendation() -> None:
    found = find(config(), Axes(policy=("wait", "drop")), Curve(failing=(136,)))
    assert {point.setting.policy for point in found.points} == {"wait"}
    assert {failure.setting.policy for failure in found.failures} == {"drop"}
    with pytest.raises(ConfigError, match=r"every window that was tried would end the run early. an outage"):
        find(config(), Axes(window=(8,)), Curve(failing=(8,)))
    with pytest.raises(ConfigError, match=r"every setting that was tried would end the run early. an outage"):
        find(config(), Axes(policy=("drop",)), Curve())


def test_too_much_is_refused_before_it_is_begun() -> None:
    oracle = Curve()
    with pytest.raises(ConfigError, match="3,000 settings are asked for, and at most 2,000"):
        find(config(), Axes(max_staleness=tuple(range(100)), policy=("wait",), window=tuple(range(1, 31))), oracle)
    assert oracle.asked == []


def test_a_bound_that_is_faster_than_none_is_the_ideal() -> None:
    class Contended(Curve):
        def ideals(self, settings: Sequence[Setting]) -> list[float]:
            return [rate / 2 for rate in super().ideals(settings)]

    found = find(config(), Axes(), Contended())
    assert found.ideal == max(point.samples_per_s for point in found.points)
    assert max(point.share for point in found.points) == 1


def test_windows_end_at_what_staleness_can_use_or_at_what_the_user_allows() -> None:
    assert windows_to_try(config(), 8) == [1, 2, 4, 8]
    assert windows_to_try(config(concurrency={"max_window": 6}), 80) == [1, 2, 3, 6]
    assert max(windows_to_try(config(), 100_000)) == 100_000


# Settings


@pytest.mark.parametrize("policy", ["wait", "pace", "mask", "requeue", "drop"])
@pytest.mark.parametrize("before", [{}, {"min_staleness": 1}, {"policy": "pace", "on_stale": "mask"}])
@pytest.mark.parametrize("chunks", [1, 8])
def test_the_toml_of_a_setting_makes_the_config_that_was_simulated(
    policy: Any, before: dict[str, Any], chunks: int
) -> None:
    batch = {"prompt_groups_per_step": 8, "pipeline_chunks_per_step": chunks}
    base = config(staleness=before, publish={"timeout_s": 7.0}, **batch)
    setting = Setting(policy, 3, 24, 6, 8, 2)
    written = tomllib.loads(setting.toml(base))
    settings = base.model_dump()
    for name, value in written.items():
        settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
    if written["staleness"].get("min_staleness") == OFF:  # as a config file says it
        settings["staleness"]["min_staleness"] = None
    assert Config(**settings) == setting.config(base)
    assert Setting.of(setting.config(base)) == setting
    assert setting.toml(setting.config(base)) == ""


# Running


def question(**description: Any) -> Question:
    base = config(rollout={"timeout_s": 60.0})
    found = described(base, Description(**{"rollout": "uniform(1s, 3s)", "step": "1s", **description}), 4)
    return Question(base, found.machine, found.workload, steps=20)


def quiet(done: int, total: int) -> None:
    pass


def test_a_rate_is_that_of_the_slower_of_sampler_and_trainer() -> None:
    """8 rollouts a step of a second; rollouts take 2 s on average, so 4 slots draw 2 of them a second."""
    setting = Setting("pace", 4, 4, 2, 4, 1)
    slow, fast = (solve(question(publish="0s"), Task(setting.but(window=window))) for window in (4, 200))
    assert not isinstance(slow, str)
    assert not isinstance(fast, str)
    assert slow.bottleneck is not None
    assert fast.bottleneck is not None
    assert (slow.bottleneck.kind, fast.bottleneck.kind) == ("slots", "trainer")
    assert slow.prediction.samples_per_s == pytest.approx(2.0, rel=0.15)
    assert fast.prediction.samples_per_s == pytest.approx(8.0, rel=0.05)


def test_processes_find_what_one_finds() -> None:
    settings = [Setting("wait", bound, 8, 2, 4, 1) for bound in (0, 1, 2)]
    told: list[tuple[int, int]] = []
    with running(question(), 1, lambda done, total: told.append((done, total))) as runner:
        here = runner.points(settings, 10.0)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with running(question(), 2, quiet) as runner:
        assert runner.points(settings, 10.0) == here
    assert all(isinstance(point, Point) for point in here)


def test_a_run_that_would_end_early_says_so() -> None:
    with running(question(rollout="100s"), 1, quiet) as runner:
        (found,) = runner.points([Setting("wait", 1, 8, 2, 4, 1)], 1.0)
        assert runner.ideals([Setting("wait", 1, 8, 2, 4, 1)]) == [0.0]
    assert isinstance(found, Failure)
    assert "timeout_s" in found.why


def test_a_process_that_dies_ends_it_with_words() -> None:
    asked = question()
    broken = Question(asked.base, Machine(_Deadly(), asked.machine.trainer), asked.workload, steps=20)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="--jobs 1"), running(broken, 2, quiet) as runner:
        runner.predictions([Task(Setting("wait", 1, 8, 2, 4, 1))])


class _Deadly:
    """Ends the process that looks at it, as a lack of memory does."""

    @property
    def replicas(self) -> int:
        import os

        os._exit(9)


def test_nothing_to_do_needs_no_process() -> None:
    assert Runner(question(), None, quiet).predictions([]) == []
