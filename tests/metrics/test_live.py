from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from asyncrl.metrics.live import LiveView
from asyncrl.metrics.panel import duration, sparkline


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
        "tokens_per_s": 2000.0,
        "samples_per_s": 32.0,
        "wait_s": 0.5,
        "train_s": 1.4,
        "publish_wait_s": 0.1,
        "step_s": 2.0,
        "in_flight": 30,
        "window": 32,
        "queue_groups": 1,
        **more,
    }


def drawn(view: LiveView) -> str:
    console = Console(width=100, record=True, file=io.StringIO(), force_terminal=True)
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


def test_panel_shows_what_the_run_does() -> None:
    clock = Clock()
    view = LiveView("calculator agent", 10, mode="quiet", clock=clock)
    for number in (1, 2, 3):
        clock.now += 2.0
        view.step(step(number, members_failed=1 if number == 2 else 0, members_retried=2))
    view.gauges({"in_flight": 17, "window": 48})
    clock.now += 1.0
    text = drawn(view)
    for said in (
        "calculator agent",
        "step 3/10",
        "0:07, 0:13 left",  # 7 steps of 2 s, one second of which has passed
        "0.300 ▁▅█ best 0.300",
        "mean 1.5, max 3, worst so far 3",
        "17 in flight of 48, 1 group ready, 6 retried, 1 failed",  # gauges first, else the last record
        "2,000 tokens/s, 32 samples/s",
        "waiting for rollouts 25%, training 70%, publishing 5%",
    ):
        assert said in text


def test_panel_shows_evaluations_once_there_are_any() -> None:
    view = LiveView("demo", 10, mode="quiet")
    assert "held-out" not in drawn(view)
    view.evaluated({"eval_version": 5.0, "eval_reward": 0.75, "eval_reward_low": 0.5, "eval_reward_high": 0.9})
    assert "0.750 [0.500, 0.900] at step 5 " in drawn(view)
    view.evaluated({"eval_version": 10.0, "eval_reward": 0.5, "eval_reward_low": None, "eval_reward_high": None})
    view.gauges({"eval_version": 15, "eval_done": 12})
    assert "0.500 at step 10, best 0.750 at step 5, measuring step 15: 12 rollouts" in drawn(view)
    other = LiveView("demo", 10, mode="quiet")
    other.evaluated({"eval_version": 5.0, "eval_accuracy": 0.75})
    assert "evaluated at step 5" in drawn(other)


def test_panel_before_the_first_step_and_without_an_end() -> None:
    view = LiveView("x", None, mode="quiet", clock=Clock())
    text = drawn(view)
    assert "step 0 " in text
    assert "waiting for the first batch" in text
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
