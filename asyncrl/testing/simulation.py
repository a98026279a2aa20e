"""The engine in virtual time: a configuration and durations in, throughput and staleness out, in milliseconds.

The scheduler, the queue, the budget and the loop are the real ones; sampler and trainer are the fakes.

    outcome = simulate(config, rows=1000, duration_s=lambda rng: rng.lognormvariate(-2, 1), step_s=lambda: 0.1)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.engine import Engine
from asyncrl.errors import AsyncRLError
from asyncrl.rollout.batch import Batch, loss_versions
from asyncrl.rollout.scheduler import RolloutFn
from asyncrl.step_record import Record
from asyncrl.storage.ledger import Ledger
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import RolloutSample, SamplingParams

Duration = Callable[[random.Random], float]
"""Draws the seconds that one rollout takes."""


@dataclass(slots=True)
class Outcome:
    """What a simulated run did."""

    seconds: float = 0.0
    """Virtual."""
    busy_s: float = 0.0
    """Seconds that rollouts ran, summed over all of them."""
    rollouts: int = 0
    trained_groups: int = 0
    steps: int = 0
    staleness: list[int] = field(default_factory=list)
    """One entry per trained loss token."""
    ledger: dict[str, int] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    peak_in_flight: int = 0
    failure: AsyncRLError | None = None

    @property
    def worst_staleness(self) -> int:
        return max(self.staleness, default=0)


def timed_rollout(outcome: Outcome, duration_s: Duration, turns: int = 1) -> RolloutFn:
    """A rollout of `turns` turns whose time is spread over them evenly. Rewards are random."""

    async def rollout(prompt: Prompt) -> RolloutSample:
        seconds = duration_s(prompt.rng)
        tokens, logprobs, mask, versions = [0], [0.0], [0], [0]
        for _ in range(turns):
            drawn = await prompt.policy.generate(tokens, max_tokens=1)
            await asyncio.sleep(seconds / turns)
            tokens += drawn.tokens
            logprobs += drawn.logprobs
            versions += drawn.versions
            mask += [1] * len(drawn.tokens)
        outcome.busy_s += seconds
        return RolloutSample(tokens, logprobs, mask, prompt.rng.random(), versions)

    return rollout


def simulate(
    config: Config,
    *,
    rows: int,
    duration_s: Duration = lambda rng: 1.0,
    step_s: Callable[[], float] = lambda: 0.0,
    publish_s: Callable[[], float] = lambda: 0.0,
    turns: int = 1,
    rollout: RolloutFn | None = None,
    stop_after_s: float | None = None,
    keep_failure: bool = False,
) -> Outcome:
    """Run the engine on `rows` rows in virtual time.

    Raises:
        AsyncRLError: what ended the run, unless `keep_failure`: then it is in `Outcome.failure`.
        Deadlock: every task waits and no timer is set.
    """
    outcome = Outcome()
    work = rollout or timed_rollout(outcome, duration_s, turns)
    try:
        run_virtual(_run(config, work, rows, step_s, publish_s, stop_after_s, outcome))
    except AsyncRLError as error:
        if not keep_failure:
            raise
        outcome.failure = error
    return outcome


async def _run(
    config: Config,
    rollout: RolloutFn,
    rows: int,
    step_s: Callable[[], float],
    publish_s: Callable[[], float],
    stop_after_s: float | None,
    outcome: Outcome,
) -> None:
    sampler = ScriptedSampler(publish_s=publish_s)
    context = PolicyContext(
        sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=lambda: None
    )

    def record_step(record: Record, batch: Batch) -> None:
        outcome.records.append(record)
        outcome.peak_in_flight = max(outcome.peak_in_flight, int(record["in_flight_peak"]))
        for group in batch.trained:
            for run in group.runs:
                outcome.staleness += [
                    batch.step - version
                    for version in loss_versions(run.segments[0])
                    if batch.on_stale != "mask" or batch.step - version <= batch.max_staleness
                ]

    async with sampler, CountingTrainer(step_s=step_s) as trainer:
        engine = assemble(
            config,
            rollout,
            [{"row": row} for row in range(rows)],
            sampler=sampler,
            trainer=trainer,
            make_policy=lambda session, version: Policy(context, session, version),
            on_step=record_step,
        )
        loop = asyncio.get_running_loop()
        if stop_after_s is not None:
            loop.call_later(stop_after_s, engine.stop)
        try:
            await engine.run()
        finally:
            _account(outcome, engine, loop.time())


def _account(outcome: Outcome, engine: Engine, seconds: float) -> None:
    ledger: Ledger = engine.ledger
    ledger.close()
    outcome.seconds = seconds
    outcome.rollouts = engine.scheduler.finished_rollouts
    outcome.trained_groups = ledger.ends["trained"]
    outcome.steps = engine.step
    outcome.ledger = ledger.summary()
