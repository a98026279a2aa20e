"""What it costs to watch a run: timeline, records, trackers and the live view, at 10,000 rollouts/s.

    python benchmarks/insight_cost.py [--rounds 7] [--rollouts 20000] [--flat-out]

The engine is the real one, with its ledger; sampler and trainer are fakes that take no time, so that every microsecond
shows. A rollout calls the model once and sleeps for 0.1 s; 1,000 run at once; a step trains 512 (64 groups of 8). Each
part is switched on by itself, then all of them as a run has them, with the panel drawn in a terminal (a pty). Rounds
alternate, and the CPU time of a round is compared with that of the same round with everything off. Watching that
cannot be switched off (seconds in the model, what holds rollouts back) is measured by taking it out.

`loop` is CPU time of the event loop's thread; its share is what 10,000 rollouts and their steps take of a second.
`others` is that of all other threads: the panel, the tracker, the disk. They hold the interpreter now and then.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pty
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from rich.console import Console

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.collector import calm_collector
from asyncrl.engine import Engine
from asyncrl.metrics.live import LiveView
from asyncrl.metrics.producer import Producer
from asyncrl.metrics.report import Account
from asyncrl.metrics.sinks import SinkList, open_sinks
from asyncrl.rollout import scheduler
from asyncrl.rollout.batch import Batch
from asyncrl.step_record import Record
from asyncrl.storage.ledger_file import LedgerStore
from asyncrl.storage.timeline import Timeline
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import SamplingParams

RATE = 10_000
"""Rollouts a second that the shares are told for."""
GROUP, GROUPS_PER_STEP, IN_FLIGHT, ROLLOUT_S = 8, 64, 1000, 0.1
PARTS = ("timeline", "producer", "records", "tensorboard", "live view")
ALL = frozenset(PARTS)
OFF, TAKEN_OUT = frozenset[str](), frozenset({"taken out"})


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds, and seconds that passed."""

    loop: float
    others: float
    wall: float


class ForgetfulTrainer(CountingTrainer):
    """Counts steps and keeps nothing."""

    async def forward_backward(self, sequences) -> None:  # type: ignore[no-untyped-def]
        return None


def make_rollout(seconds: float):  # type: ignore[no-untyped-def]
    async def rollout(prompt: Prompt) -> RolloutSample:
        answer = await prompt.policy.generate([1, 2, 3])
        await asyncio.sleep(seconds)
        return RolloutSample.from_completion([1, 2, 3], answer, float(prompt.rollout_index % 2))

    return rollout


def make_engine(folder: Path, parts: Set[str], rollouts: int, seconds: float, stack: ExitStack) -> Engine:
    """An engine with these parts of what watches it, wired as `TrainingRun` does it."""
    config = Config(
        model="none",
        completions_per_prompt=GROUP,
        prompt_groups_per_step=GROUPS_PER_STEP,
        staleness={"max_staleness": 2 * IN_FLIGHT // (GROUP * GROUPS_PER_STEP) + 1},
        concurrency={"min_window": IN_FLIGHT, "max_window": IN_FLIGHT},
    )
    sampler, trainer = ScriptedSampler(), ForgetfulTrainer()
    context = PolicyContext(sampler, params=SamplingParams(4), max_seq_len=100, load_tokenizer=lambda: None)
    store = LedgerStore.open(folder / "ledger.db", resumed_at=None)
    trackers = ["tensorboard"] if "tensorboard" in parts else []
    sinks = stack.enter_context(_sinks(trackers, folder, config)) if parts & {"records", "tensorboard"} else None
    timeline = None
    if parts & {"timeline", "producer"}:
        timeline = Timeline(folder / "timeline" if "timeline" in parts else None)
        stack.callback(timeline.close)
    view = LiveView("benchmark", 1000, mode="live", console=_terminal(stack)) if "live view" in parts else None
    if view is not None:
        stack.enter_context(view)
    account = Account()

    def on_step(record: Record, batch: Batch) -> None:
        if sinks is not None:
            sinks.write(record)
        if view is not None:
            account.add(record)
            view.step(record)

    engine = assemble(
        config,
        make_rollout(seconds),
        [{"row": row} for row in range(rollouts // GROUP)],
        sampler=sampler,
        trainer=trainer,
        make_policy=lambda session, version: Policy(context, session, version),
        on_step=on_step,
        on_gauges=view.gauges if view is not None else lambda gauges: None,
        ledger_store=store,
        timeline=timeline,
    )
    if "producer" in parts:
        assert timeline is not None
        timeline.on_flush = Producer(
            groups=GROUPS_PER_STEP,
            counts=engine.scheduler.counts,
            gauges=engine.account.gauges,
            elapsed_s=engine.elapsed_s,
            write=sinks.produced if sinks is not None else lambda record: None,
        ).take
    return engine


@contextmanager
def _sinks(trackers: list[str], folder: Path, config: Config) -> Iterator[SinkList]:
    sinks = open_sinks(trackers, folder, config)
    try:
        yield sinks
    finally:
        sinks.close()


def _terminal(stack: ExitStack) -> Console:
    """A real terminal, 100 columns wide, that somebody reads."""
    reader, writer = pty.openpty()
    file = stack.enter_context(os.fdopen(writer, "w", encoding="utf-8"))

    def read() -> None:
        try:
            while os.read(reader, 1 << 16):
                pass
        except OSError:  # it was closed
            os.close(reader)

    threading.Thread(target=read, daemon=True).start()
    return Console(file=file, width=100, height=40, force_terminal=True)


@contextmanager
def without_what_cannot_be_switched_off() -> Iterator[None]:
    """Seconds of rollouts and in the model, and what holds rollouts back. Not: the two clocks of a call."""
    with (
        patch.object(scheduler, "record_attempt", lambda *args: None),
        patch.object(scheduler.Scheduler, "_held_by", lambda self: self.held.reason),
    ):
        yield


async def run(parts: Set[str], rollouts: int, seconds: float) -> Cost:
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        engine = make_engine(Path(name), parts, rollouts, seconds, stack)
        process, loop, wall = time.process_time(), time.thread_time(), time.perf_counter()
        await engine.run()
        wall, loop_until_the_end = time.perf_counter() - wall, time.thread_time() - loop
        stack.close()  # what the threads still have to do is theirs too
        engine.ledger.close()
        others = time.process_time() - process - (time.thread_time() - loop)
    return Cost(loop_until_the_end, others, wall)


def measure(parts: Set[str], rollouts: int, seconds: float) -> Cost:
    with ExitStack() as stack:
        stack.enter_context(calm_collector())
        if parts == TAKEN_OUT:
            stack.enter_context(without_what_cannot_be_switched_off())
        return asyncio.run(run(parts, rollouts, seconds))


def table(costs: dict[Set[str], list[Cost]], rollouts: int) -> Iterator[str]:
    off = costs[OFF]
    loop_us = [cost.loop / rollouts * 1e6 for cost in off]
    yield f"Everything off: {statistics.median(loop_us):.1f} µs of the loop a rollout, others "
    yield f"{statistics.median(100 * cost.others / cost.wall for cost in off):.1f} % of a core; "
    yield f"{rollouts / statistics.median(cost.wall for cost in off):,.0f} rollouts/s.\n\n"
    yield "| on | loop, µs a rollout | of the loop's time at 10,000/s | others, of a core |\n|---|---|---|---|\n"
    for parts, found in costs.items():
        if parts == OFF:
            continue
        sign = -1 if parts == TAKEN_OUT else 1
        loops = [sign * (on.loop - base.loop) / rollouts * 1e6 for on, base in zip(found, off, strict=True)]
        others = [
            sign * 100 * (on.others / on.wall - base.others / base.wall) for on, base in zip(found, off, strict=True)
        ]
        name = "all" if parts == ALL else "always on" if parts == TAKEN_OUT else ", ".join(parts)
        share = [us * RATE / 1e4 for us in loops]
        yield f"| {name} | {_spread(loops)} | {_spread(share)} % | {_spread(others)} % |\n"


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rollouts", type=int, default=20_000)
    parser.add_argument(
        "--flat-out", action="store_true", help="rollouts that do not sleep: as many a second as can be"
    )
    arguments = parser.parse_args()
    rollouts = arguments.rollouts // (GROUP * GROUPS_PER_STEP) * GROUP * GROUPS_PER_STEP
    seconds = 0.0 if arguments.flat_out else ROLLOUT_S
    costs: dict[Set[str], list[Cost]] = {OFF: [], TAKEN_OUT: []}
    costs |= {frozenset({part}): [] for part in PARTS} | {ALL: []}
    measure(ALL, rollouts, seconds)  # imports, and caches that fill
    for _ in range(arguments.rounds):
        for parts, found in costs.items():
            found.append(measure(parts, rollouts, seconds))
    print("".join(table(costs, rollouts)))


if __name__ == "__main__":
    main()
