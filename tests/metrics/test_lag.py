from __future__ import annotations

import asyncio
import time

import structlog

from asyncrl.data import Prompt
from asyncrl.metrics.lag import LONG_S, WARN_EVERY_S, LagMeter, watch_lag
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


async def test_a_blocking_call_is_measured_and_the_warning_says_what_to_do() -> None:
    meter = LagMeter()
    with structlog.testing.capture_logs() as logs:
        watcher = asyncio.create_task(watch_lag(meter))
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251 - the fault that is to be seen
        await asyncio.sleep(0.01)
        watcher.cancel()
    assert meter.take() > LONG_S
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "asyncrl.offload" in logs[0]["to_do"]


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
