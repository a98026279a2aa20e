"""Makes every await of the engine never return, one after the other, and looks who is named. In virtual time.

    python tests/durability/hang_hunt.py        one line of JSON for each fault point

A process of its own: the modules must be compiled with their fault points before anything imports them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import structlog
from fault_points import Point, arm, instrument, reached

from asyncrl import workers

MODULES = (
    "asyncrl.engine",
    "asyncrl.publication",
    "asyncrl.checkpointing",
    "asyncrl.rollout.scheduler",
    "asyncrl.rollout.queue",
    "asyncrl.rollout.evaluation",
    "asyncrl.rollout.evaluations",
    "asyncrl.rollout.guests",
    "asyncrl.rollout.limited",
    "asyncrl.agents.policy",
)
T = TypeVar("T")
STALL_S, ROLLOUT_S, HOT_LOAD_S, CHECKPOINT_S = 1000.0, 100.0, 50.0, 70.0
ENDED_WITHIN_S = 3 * STALL_S


@dataclass
class Outcome:
    """What came of one hang."""

    point: str
    function: str
    line: int
    reached: int
    """How often the await was come to."""
    error: str = ""
    """Of the run; empty: it finished."""
    report: str = ""
    whole: bool = False
    """Every prompt ended, and so did the checkpoints."""
    seconds: float = 0.0
    """Virtual ones."""


def hunt(point: Point, at_call: int) -> Outcome:
    from asyncrl.errors import AsyncRLError
    from asyncrl.testing.clock import run_virtual

    arm(point, at_call)
    outcome = Outcome(str(point), point.function, point.line, 0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_virtual(run(Path(folder), outcome))
        except AsyncRLError as error:
            outcome.error = f"{type(error).__name__}: {error}"
        except BaseException as error:  # a fault of the engine: reported as it is
            outcome.error = f"not one of ours: {error!r}"
        report = Path(folder) / "stalled.txt"
        outcome.report = report.read_text() if report.exists() else ""
    outcome.reached = reached(point)
    return outcome


async def run(folder: Path, outcome: Outcome) -> None:
    """A small run with everything that waits: hot-loads, evaluations, checkpoints, retries, a stop."""
    from asyncrl.agents.policy import Policy, PolicyContext
    from asyncrl.assemble import assemble
    from asyncrl.checkpointing import Checkpointer
    from asyncrl.config import CheckpointConfig, Config, RolloutConfig
    from asyncrl.data import Prompt
    from asyncrl.errors import RecoverableRolloutError
    from asyncrl.rollout.contract import Contract
    from asyncrl.rollout.evaluation import Evaluator
    from asyncrl.rollout.evaluations import Evaluation, Evaluations
    from asyncrl.storage.checkpoints import Checkpoints
    from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
    from asyncrl.types import RolloutSample, SamplingParams
    from asyncrl.watchdog import Watchdog

    loop = asyncio.get_running_loop()
    config = Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=2,
        max_steps=6,
        stall_timeout_s=STALL_S,
        rollout=RolloutConfig(timeout_s=ROLLOUT_S, retries=1),
        publish={"timeout_s": HOT_LOAD_S},
        staleness={"max_staleness": 1},
        concurrency={"min_window": 4, "max_window": 4},
        evaluation={"interval": 2},
    )
    sampler = ScriptedSampler(latency_s=lambda request: 1.0, publish_s=lambda: 2.0)
    context = PolicyContext(
        sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=lambda: None
    )
    failed: set[int] = set()

    async def rollout(prompt: Prompt) -> RolloutSample:
        if prompt.index % 3 == 0 and prompt.index not in failed and not prompt.evaluation:
            failed.add(prompt.index)
            raise RecoverableRolloutError("once")
        drawn = await prompt.policy.generate([0], max_tokens=1)
        return RolloutSample.from_completion([0], drawn, prompt.rng.random())

    def make_policy(session: str, version: int | None) -> Policy:
        return Policy(context, session, version)

    async with CountingTrainer(step_s=lambda: 3.0, probe=True) as trainer:
        engine = assemble(
            config,
            rollout,
            [{"row": row} for row in range(40)],
            sampler=sampler,
            trainer=trainer,
            make_policy=make_policy,
            on_step=lambda record, batch: None,
            canary_tolerance=0.1,
            watchdog=Watchdog(config.stall_timeout_s, folder / "stalled.txt"),
        )
        evaluator = Evaluator(rollout, make_policy, Contract(), config.rollout, 0)

        async def held_out(evaluation: Evaluation) -> object:
            return await evaluation.rollouts([{"row": row} for row in range(3)])

        evaluations = Evaluations(
            function=held_out,
            evaluator=evaluator,
            sampler=sampler,
            guests=engine.scheduler.guests,
            interval=2,
            alone=4,
            limit_s=STALL_S / 2,
            on_result=lambda evaluated: None,
            report=lambda text: None,
            fail=engine.scheduler.fail,
        )
        engine.on_published = evaluations.published
        engine.checkpoints = Checkpointer(
            folder=Checkpoints(folder),
            trainer=trainer,
            config=CheckpointConfig(interval=2, timeout_s=CHECKPOINT_S),
            every_steps=1,
            flush=engine.ledger.flush,
            about=dict,
            life=0,
            say=lambda text: None,
        )
        try:
            with engine.watchdog.phase("evaluation", marks=evaluations.marks):
                await evaluations.before()
            await engine.run()
            evaluations.training_is_over()
            with engine.watchdog.phase("saving the checkpoint"):
                await engine.checkpoints.finish(engine.capture(), "final")
            with engine.watchdog.phase("evaluation", marks=evaluations.marks):
                await evaluations.after()
            with engine.watchdog.phase("closing what the run had open"):
                await evaluations.__aexit__(None, None, None)
        finally:
            outcome.seconds = loop.time()
        outcome.whole = engine.step == 6 and engine.published == 6


async def in_this_thread(threads: object, call: Callable[[], T], name: str, timeout_s: float) -> workers.Outcome[T]:
    """In place of `Threads.run`: virtual time does not wait for threads."""
    return workers.Outcome.of(call)


def main() -> None:
    workers.Threads.run = in_this_thread  # type: ignore[method-assign, assignment]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    points = instrument(MODULES)
    for point in points:
        for at_call in (1, 4):
            outcome = hunt(point, at_call)
            print(json.dumps(asdict(outcome)), flush=True)
            if outcome.reached < 4:
                break


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
