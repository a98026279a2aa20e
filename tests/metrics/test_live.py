from __future__ import annotations

import cProfile
import io
import pstats
from typing import Any

import pytest
from rich.console import Console

from asyncrl.metrics.live import LiveView
from asyncrl.metrics.rows import duration, sparkline


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "time_s": 2.0 * number,
        "reward_mean": number / 10,
        "staleness_mean": 1.5,
        "staleness_max": 3,
        "staleness_share_0": 0.2,
        "staleness_share_1": 0.6,
        "staleness_share_4": 0.2,
        "tokens_generated": 4000,
        "train_tokens": 3000,
        "samples": 64,
        "rollouts_finished": 64,
        "wait_s": 0.5,
        "wait_slots_s": 0.5,
        "train_s": 1.4,
        "publish_wait_s": 0.1,
        "step_s": 2.0,
        "in_flight": 30,
        "window": 32,
        "queue_groups": 1,
        **more,
    }


def drawn(view: LiveView, width: int = 100) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), force_terminal=True)
    console.print(view.render())
    return console.export_text()


def run(mode: Any, steps: int = 3, total: int | None = 10, seconds: float = 2.0, terminal: bool = False) -> str:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=100, force_terminal=terminal)
    with LiveView("demo", total, mode=mode, console=console, clock=clock) as view:
        for number in range(1, steps + 1):
            clock.now += seconds
            view.step(step(number))
        view.note("saved [bold] to runs/x")
    return out.getvalue()


def told(clock: Clock, steps: int = 3, **more: Any) -> LiveView:
    """A view that has seen so many steps of 2 s."""
    view = LiveView("calculator agent", 10, mode="quiet", clock=clock)
    for number in range(1, steps + 1):
        clock.now += 2.0
        view.step(step(number, **more))
    return view


FLEET = {
    "replica_running": [20.0, 4.0],
    "replica_waiting": [3.0, 0.0],
    "replica_kv": [0.63, 0.2],
    "replica_up": [1.0, 1.0],
}


def test_panel_shows_what_the_run_does() -> None:
    clock = Clock()
    view = told(clock, members_retried=2)
    view.step(step(4, members_failed=1, publish_s=1.25, checkpoint_s=0.3))
    view.gauges(
        {
            **{"in_flight": 17, "window": 48, "queue_groups": 2, "published": 3, "sampler_running": 15},
            **{"sampler_waiting": 1, "kv_use": 0.5, "phase": "training step 5: optimizer"},
            **{"window_reason": "32 -> 48: the limit binds and nothing waits"},
            **FLEET,
        }
    )
    clock.now += 1.0
    text = drawn(view)
    for said in (
        "calculator agent",
        "step 4/10",
        "0:07, 0:12 left",  # 6 steps of 2 s; the fourth took no time by this clock
        "0.400 ▁▃▆█ +0.300 in 4 steps, best 0.400",
        "0 ▃  1 █  2 ·  3-4 ▃  mean 1.5, max 3, worst so far 3",
        "17 of 48 in flight → 2 ready → training step 5: optimizer",
        "48 rollouts (32 -> 48: the limit binds and nothing waits)",
        "2,000 tokens/s, 15 requests running, 1 waiting, KV 50%",
        "replica 1  20 running, 3 waiting, KV 63%",
        "replica 2  4 running, 0 waiting, KV 20%",
        "1,500 tokens/s, 32 samples/s, 2 s a step",
        "version 3 is live, hot-load 1.2 s, checkpoint 0.3 s (step 3)",
        "6 retried, 1 failed",
        "training 67%, waiting for rollouts 24%, publishing 5%, checkpoints 4%",
        "The trainer waited 24% of the time for rollouts: the window was full (32 rollouts on average)",
        "Raise concurrency.initial_window",
    ):
        assert said in text, said


def test_of_many_replicas_the_panel_shows_the_span() -> None:
    view = told(Clock())
    many = {name: [value * place for place in range(1, 8)] for name, (value, _) in FLEET.items()}
    view.gauges(many | {"replica_up": [1.0] * 6 + [0.0], "replica_kv": [0.1 * place for place in range(1, 8)]})
    assert "6/7 up, running 20/70/120, waiting 3/10/18, KV 10%/35%/60%" in drawn(view)
    view.gauges(many | {"replica_up": [0.0] * 7})
    assert "0/7 up" in drawn(view)


def test_tokens_per_s_are_those_of_now_while_a_step_lasts() -> None:
    clock = Clock()
    view = told(clock)
    for tick in range(9):
        clock.now += 0.25
        view.gauges({"tokens_generated": 1000 + 100 * tick, "sampler_running": 1, "sampler_waiting": 0})
    assert "400 tokens/s, 1 requests running" in drawn(view)


def test_the_panel_says_what_is_done_before_and_after_training() -> None:
    view = LiveView("x", 10, mode="quiet", clock=Clock())
    view.doing = lambda: "loading the model"
    assert "loading the model" in drawn(view)
    view.step(step(1))
    view.gauges({"in_flight": 3, "window": 8, "phase": "training step 2", "sampler_running": 7, "sampler_waiting": 1})
    view.doing = lambda: "evaluation"
    text = drawn(view)
    assert "evaluation" in text
    assert "3 of 8 in flight" not in text
    assert "7 requests running" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_panel_keeps_its_height_and_its_width(width: int) -> None:
    """A panel that jumps cannot be read."""
    view = LiveView(
        "a title that is a good deal longer than a narrow terminal is wide", 10, mode="quiet", clock=Clock()
    )
    view.gauges({"in_flight": 1, **FLEET})
    heights = set()
    for number in range(1, 40):
        late = {"wait_s": 1.9, "train_s": 0.1} if number % 3 else {"wait_s": 0.0, "train_s": 2.0}
        view.step(step(number, members_failed=number % 7, groups_filtered=number % 5 * 100, **late))
        view.gauges({"in_flight": 10**number % 977, "phase": "x" * number, "window_reason": "y" * number, **FLEET})
        lines = drawn(view, width).splitlines()
        heights.add(len(lines))
        assert {len(line) for line in lines} <= {min(width, 120)}
    assert len(heights) == 1


def test_drawing_takes_little_of_the_interpreter() -> None:
    """Not a time, which depends on the machine: function calls, of which 5 ms has 50,000 on a slow one."""
    view = told(Clock(), steps=40)
    view.gauges(FLEET)
    drawn(view, 80)
    profile = cProfile.Profile()
    profile.enable()
    drawn(view, 80)
    profile.disable()
    assert pstats.Stats(profile).total_calls < 20_000  # type: ignore[attr-defined]


def test_panel_shows_evaluations_once_there_are_any() -> None:
    view = LiveView("demo", 10, mode="quiet")
    assert "held-out" not in drawn(view)
    view.evaluated({"eval_version": 5.0, "eval_reward": 0.75, "eval_reward_low": 0.5, "eval_reward_high": 0.9})
    assert "0.750 [0.500, 0.900] at step 5 " in drawn(view)
    view.evaluated({"eval_version": 10.0, "eval_reward": 0.5, "eval_reward_low": None, "eval_reward_high": None})
    view.gauges({"eval_version": 15, "eval_done": 12})
    assert "0.500 at step 10, best 0.750 at step 5, measuring step 15: 12 rollouts" in drawn(view)
    view.evaluated({"eval_version": 15.0, "eval_reward": 0.8})  # the gauge is as old as it was
    assert "measuring" not in drawn(view)
    other = LiveView("demo", 10, mode="quiet")
    other.evaluated({"eval_version": 5.0, "eval_accuracy": 0.75})
    assert "evaluated at step 5" in drawn(other)


def test_panel_before_the_first_step_and_without_an_end() -> None:
    view = LiveView("x", None, mode="quiet", clock=Clock())
    text = drawn(view)
    assert "step 0 " in text
    assert "What binds is known after the first step." in text
    assert "left" not in text


def test_a_metric_that_is_not_a_number_does_not_break_the_view() -> None:
    view = LiveView("x", 5, mode="quiet", clock=Clock())
    view.step({"step": 1, "reward_mean": float("nan"), "staleness_max": float("nan"), "step_s": float("inf")})
    assert "step 1/5" in drawn(view)


def test_pipe_gets_plain_lines_without_control_codes() -> None:
    out = run("auto", steps=4, seconds=6.0)
    lines = out.splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == ["step 1/10", "step 2/10", "step 3/10", "step 4/10"]
    assert "reward 0.100 | staleness 1.5 (worst 3)" in lines[0]
    assert lines[4] == "saved [bold] to runs/x"
    assert "\x1b" not in out
    assert out.isascii()


def test_plain_lines_are_a_few_seconds_apart_and_the_last_step_is_always_there() -> None:
    lines = [line for line in run("plain", steps=9, seconds=2.0).splitlines() if line.startswith("step")]
    assert [line.split(" | ")[0] for line in lines] == ["step 1/10", "step 4/10", "step 7/10", "step 9/10"]


def test_a_last_step_is_printed_once() -> None:
    lines = [line for line in run("plain", steps=10, seconds=0.1).splitlines() if line.startswith("step")]
    assert [line.split(" | ")[0] for line in lines] == ["step 1/10", "step 10/10"]


def test_quiet_shows_notes_only() -> None:
    assert run("quiet") == "saved [bold] to runs/x\n"


def test_forced_colours_do_not_make_a_pipe_a_terminal() -> None:
    assert "\x1b[?25l" not in run("auto", terminal=True)  # the code that hides the cursor


def test_live_draws_and_gives_the_cursor_back() -> None:
    out = run("live", terminal=True)
    assert "step 3/10" in out
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1


def test_live_gives_the_terminal_back_after_an_error() -> None:
    out = io.StringIO()
    view = LiveView("x", 3, mode="live", console=Console(file=out, force_terminal=True))
    with pytest.raises(KeyboardInterrupt), view:
        raise KeyboardInterrupt
    assert "\x1b[?25h" in out.getvalue()


@pytest.mark.parametrize(("values", "bars"), [([], ""), ([1.0, 1.0], "▄▄"), ([0.0, 0.5, 1.0], "▁▅█"), ([3.0], "▄")])
def test_sparkline(values: list[float], bars: str) -> None:
    assert sparkline(values) == bars


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (67.9, "1:07"), (3600, "1:00:00"), (-3, "0:00")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
