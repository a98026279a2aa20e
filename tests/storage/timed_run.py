"""A run of the real engine in virtual time that leaves what a run folder holds of its time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.engine import Engine
from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.rollout.scheduler import RolloutFn
from asyncrl.storage.ledger_file import LedgerStore
from asyncrl.storage.timeline import Timeline
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import SamplingParams

MODEL_S, TRAIN_S, LOAD_S = 0.5, 0.25, 0.125
"""How long a call of the model, an optimizer step and a hot-load take."""


def timed_run(
    folder: Path, rollout: RolloutFn, config: Config, rows: int, stop: Callable[[Engine], bool] = lambda engine: False
) -> Engine:
    """Run `rollout` on `rows` rows; the engine is stopped when `stop` says so, which is asked ten times a second."""
    return run_virtual(_run(folder, rollout, config, rows, stop))


async def _run(folder: Path, rollout: RolloutFn, config: Config, rows: int, stop: Callable[[Engine], bool]) -> Engine:
    sampler = ScriptedSampler(latency_s=lambda request: MODEL_S, publish_s=lambda: LOAD_S)
    context = PolicyContext(sampler, params=SamplingParams(4), max_seq_len=1 << 20, load_tokenizer=lambda: None)
    timeline = Timeline(folder / "timeline")
    store = LedgerStore.open(folder / "ledger.db", resumed_at=None)
    with JsonlFile(folder / "metrics.jsonl") as metrics:
        async with sampler, CountingTrainer(step_s=lambda: TRAIN_S) as trainer:
            engine = assemble(
                config,
                rollout,
                [{"row": row} for row in range(rows)],
                sampler=sampler,
                trainer=trainer,
                make_policy=lambda session, version: Policy(context, session, version),
                on_step=lambda record, batch: metrics.write(record),
                ledger_store=store,
                timeline=timeline,
            )
            watch = asyncio.create_task(_stop_when(engine, stop))
            await engine.run()
            watch.cancel()
    timeline.close()
    engine.ledger.close()
    return engine


async def _stop_when(engine: Engine, stop: Callable[[Engine], bool]) -> None:
    while not stop(engine):  # noqa: ASYNC110 - in virtual time it costs nothing
        await asyncio.sleep(0.1)
    engine.stop()
