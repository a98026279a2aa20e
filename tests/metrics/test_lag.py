from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from asyncrl.data import Prompt
from asyncrl.metrics import lag
from asyncrl.metrics.lag import LONG_S, SLEEP_S, UNNAMED_S, WARN_EVERY_S, LagMeter, name_of, watch_lag
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import RolloutSample
from tests.test_engine import engine_of, rollout


def test_the_largest_lag_is_taken_once() -> None:
    meter = LagMeter()
    for lag_s in (0.01, 0.15, 0.02):
        assert not meter.observe(lag_s, 0.0)
    assert meter.take() == 0.15
    assert meter.take() == 0.0


def test_an_early_wake_is_no_lag() -> None:
    meter = LagMeter()
    meter.observe(-1e-6, 0.0)
    assert meter.take() == 0.0


def test_a_long_lag_is_warned_about_once_a_minute() -> None:
    meter = LagMeter()
    assert not meter.observe(LONG_S, 5.0)
    assert meter.observe(2 * LONG_S, 5.0)
    assert not meter.observe(3 * LONG_S, 5.0 + WARN_EVERY_S - 1)
    assert meter.observe(2 * LONG_S, 5.0 + WARN_EVERY_S)
    assert meter.take() == 3 * LONG_S


def test_a_lag_that_nobody_is_found_to_have_made_has_to_be_longer() -> None:
    meter = LagMeter()
    assert not meter.observe(UNNAMED_S, 0.0, named=False)
    assert meter.observe(2 * UNNAMED_S, 0.0, named=False)


def blocking_tool() -> None:
    time.sleep(0.5)


async def watched(block: Callable[[], object], after_s: float = 2 * SLEEP_S) -> tuple[LagMeter, list[Any]]:
    """What the meter and the log say after `block` has run on the loop."""
    meter = LagMeter()
    with structlog.testing.capture_logs() as logs:
        watcher = asyncio.create_task(watch_lag(meter))
        await asyncio.sleep(after_s)
        block()
        await asyncio.sleep(2 * SLEEP_S)
        watcher.cancel()
    return meter, logs


async def test_a_blocking_call_is_measured_and_the_warning_names_it_and_what_to_do() -> None:
    meter, logs = await watched(blocking_tool)
    assert meter.take() > LONG_S
    assert [entry["log_level"] for entry in logs] == ["warning"]
    line = blocking_tool.__code__.co_firstlineno + 1
    assert re.search(rf"blocked for \d\.\d s by blocking_tool \(.*test_lag\.py:{line}\)", logs[0]["event"])
    assert "asyncrl.offload" in logs[0]["to_do"]


@pytest.mark.parametrize("after_s", [2 * SLEEP_S, 0.0], ids=["later", "by the first rollout"])
async def test_a_loop_that_does_not_come_back_is_named_while_it_is_blocked(
    monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    monkeypatch.setattr(lag, "STUCK_S", 0.3)
    named = threading.Event()
    monkeypatch.setattr(lag.log, "warning", lambda event, **more: named.set() if "is blocked for" in event else None)
    blocked: list[bool] = []
    await watched(lambda: blocked.append(named.wait(10)), after_s)
    assert blocked == [True], "named while the loop could not run"


async def test_of_several_that_block_one_after_the_other_the_longest_is_named() -> None:
    def block() -> None:
        time.sleep(0.35)
        blocking_tool()
        blocking_tool()

    _, logs = await watched(block)
    assert "by blocking_tool" in logs[0]["event"]


async def test_the_line_that_is_named_is_the_users_even_when_a_library_computes() -> None:
    def score() -> None:
        json.loads(json.dumps(slow_numbers()))

    def slow_numbers() -> list[int]:
        sleep = [sys.executable, "-c", "import time; time.sleep(0.5)"]
        subprocess.run(sleep, check=True, timeout=60, capture_output=True)
        return [1]

    _, logs = await watched(score)
    assert "slow_numbers (" in logs[0]["event"]
    assert "test_lag.py:" in logs[0]["event"]


def test_a_loop_that_runs_nothing_is_not_blamed_on_who_started_it() -> None:
    """The frames below the loop's belong to the script that called `asyncrl.train`."""
    idle, seen = threading.Event(), []

    async def main() -> None:
        asyncio.get_running_loop().call_soon(idle.set)
        await asyncio.sleep(0.5)

    def look() -> None:
        idle.wait(30)
        time.sleep(0.1)
        seen.append(name_of(sys._current_frames()[threading.main_thread().ident or 0]))

    looker = threading.Thread(target=look)
    looker.start()
    asyncio.run(main())
    looker.join(30)
    assert seen == [""]


async def test_the_watching_thread_ends_with_the_measuring() -> None:
    before = threading.active_count()
    await watched(lambda: None)
    async with asyncio.timeout(30):
        while threading.active_count() > before:  # noqa: ASYNC110 - a thread sets no event of the loop
            await asyncio.sleep(0.01)


def test_virtual_time_has_no_lag() -> None:
    meter = LagMeter()
    run_virtual(watch_lag(meter))
    assert meter.take() == 0.0


async def test_a_rollout_that_blocks_shows_in_the_record_of_its_step() -> None:
    async def blocks_once(prompt: Prompt) -> RolloutSample:
        if prompt.index == 0 and prompt.rollout_index == 0:
            time.sleep(0.5)  # noqa: ASYNC251 - the fault that is to be seen
        return await rollout(prompt)

    lags: list[float] = []
    engine = engine_of(ScriptedSampler(latency_s=lambda request: 0.1), CountingTrainer(), rows=8, work=blocks_once)
    engine.on_step = lambda record, batch: lags.append(record["loop_lag_s"])
    await engine.run()
    assert lags[0] > LONG_S
    assert len(lags) == 4
