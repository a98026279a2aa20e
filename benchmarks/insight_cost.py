"""What it costs to watch a run: timeline, records, trackers and the live view, at 10,000 rollouts/s.

    python benchmarks/insight_cost.py [--rounds 5] [--rollouts 20000]

The engine is the real one, with its ledger; sampler and trainer are fakes that take no time. A rollout calls the model
once and sleeps for 0.1 s, 1,000 run at once, a step trains 512 (64 groups of 8), and the panel is drawn in a terminal
(a pty). Two tables:

1. The time of each thing that watches, where it happens: the median of its calls, which a busy machine hardly moves,
   times how often it is called at 10,000 rollouts/s. What the panel, the tracker and the disk cost is in threads.
2. A check: rounds with everything off and with everything on take turns, and their CPU times are compared.
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
import timeit
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from overhead import ForgetfulTrainer
from rich.console import Console

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.collector import calm_collector
from asyncrl.engine import LOAD_EVERY_S, Engine
from asyncrl.metrics.live import LiveView
from asyncrl.metrics.producer import LEAST_S, Producer
from asyncrl.metrics.report import Account
from asyncrl.metrics.sinks import SinkList, open_sinks
from asyncrl.rollout import scheduler
from asyncrl.rollout.batch import Batch
from asyncrl.rollout.held import Held
from asyncrl.step_record import Record, StepAccount
from asyncrl.storage.ledger_file import LedgerStore
from asyncrl.storage.timeline import Timeline
from asyncrl.testing.fakes import ScriptedSampler
from asyncrl.types import SamplingParams

RATE = 10_000
"""Rollouts a second that the shares are told for."""
GROUP, GROUPS_PER_STEP, IN_FLIGHT, ROLLOUT_S = 8, 64, 1000, 0.1
PARTS = ("timeline", "producer", "records", "tensorboard", "live view")
ALL = frozenset(PARTS)
OFF = frozenset[str]()
WATCHES: dict[str, tuple[Any, str]] = {
    "attempt ends": (scheduler, "record_attempt"),
    "what holds rollouts back, changes": (Held, "by"),
    "timeline, hand over": (Timeline, "flush"),
    "producer record": (Producer, "_tell"),
    "step record": (StepAccount, "close"),
    "metrics.jsonl and tracker": (SinkList, "write"),
    "account of the time": (Account, "add"),
    "live view, step": (LiveView, "step"),
    "gauges": (StepAccount, "live"),
    "gauges, means": (StepAccount, "sampled"),
    "live view, gauges": (LiveView, "gauges"),
}
OF_EVERY_ROLLOUT = ("attempt ends", "what holds rollouts back, changes")
CALLS_A_SECOND = {
    **dict.fromkeys(("gauges", "gauges, means", "live view, gauges"), 1 / LOAD_EVERY_S),
    "timeline, hand over": 1 / LOAD_EVERY_S,
    "producer record": 1 / LEAST_S,
    "account of the time": RATE / (GROUP * GROUPS_PER_STEP),
}
"""On the loop, of what does not come with rollouts, or is called by the panel too."""


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU seconds, and seconds that passed."""

    loop: float
    others: float
    wall: float


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


class Stopwatch:
    """How long the calls of some functions took, in the run: CPU time of those that may wait for another thread, and
    for those of every rollout the clock, since asking for CPU time would cost more than they do."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._own: dict[Callable[[], float], float] = {}
        for clock in (time.perf_counter, time.thread_time):
            empty = self._around(taken := [], clock, lambda *args: None)
            for _ in range(10_000):
                empty(1, 2, 3, 4, 5, 6)
            self._own[clock] = statistics.median(taken)

    def _around(
        self, taken: list[float], clock: Callable[[], float], function: Callable[..., Any]
    ) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            try:
                return function(*args, **kwargs)
            finally:
                taken.append(clock() - began)

        return timed

    def median(self, name: str) -> float:
        """Of a call, s, without what the stopwatch takes itself."""
        return max(0.0, statistics.median(self.seconds[name]) - self._own[_clock(name)])

    def __enter__(self) -> Stopwatch:
        self._patches = ExitStack()
        for name, (owner, function) in WATCHES.items():
            timed = self._around(self.seconds.setdefault(name, []), _clock(name), getattr(owner, function))
            self._patches.enter_context(patch.object(owner, function, timed))
        return self

    def __exit__(self, *exc: object) -> None:
        self._patches.close()


def _clock(name: str) -> Callable[[], float]:
    return time.perf_counter if name in OF_EVERY_ROLLOUT else time.thread_time


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


def measure(parts: Set[str], rollouts: int) -> Cost:
    with calm_collector():
        return asyncio.run(run(parts, rollouts, ROLLOUT_S))


def parts_table(watch: Stopwatch, rollouts: int) -> Iterator[str]:
    yield "| what | µs a call | calls | of the loop's time at 10,000 rollouts/s |\n|---|---|---|---|\n"
    total = 0.0
    for name in WATCHES:
        each = watch.median(name)
        calls_a_second = CALLS_A_SECOND.get(name, RATE * len(watch.seconds[name]) / rollouts)
        share = each * calls_a_second
        total += share
        yield f"| {name} | {each * 1e6:,.2f} | {calls_a_second:,.0f}/s | {share:.2%} |\n"
    each = clocks_of_a_call()
    total += each * RATE
    yield f"| the clock around a call of the model | {each * 1e6:,.2f} | {RATE:,}/s | {each * RATE:.2%} |\n"
    yield f"| all | | | {total:.2%} |\n"


def clocks_of_a_call() -> float:
    """What `Policy.generate` does for the timeline, s."""

    async def timed() -> float:
        once = "calls = []; clock = running().time; began = clock(); calls += (began, clock(), 3, 4, 0)"
        known = {"running": asyncio.get_running_loop}
        return statistics.median(timeit.repeat(once, globals=known, number=1000, repeat=50)) / 1000

    return asyncio.run(timed())


def check(costs: dict[Set[str], list[Cost]], rollouts: int) -> Iterator[str]:
    off, on = costs[OFF], costs[ALL]
    pairs = list(zip(on, off, strict=True))
    loop_us = [cost.loop / rollouts * 1e6 for cost in off]
    yield f"Everything off: {_spread(loop_us)} µs of the loop a rollout, at "
    yield f"{rollouts / statistics.median(cost.wall for cost in off):,.0f} rollouts/s.\n"
    yield f"Everything on: {_spread([(a.loop - b.loop) / rollouts * 1e6 for a, b in pairs])} µs more, the least of all "
    yield f"rounds {(min(a.loop for a in on) - min(b.loop for b in off)) / rollouts * 1e6:.2f} µs more; other threads "
    yield f"{_spread([100 * (a.others / a.wall - b.others / b.wall) for a, b in pairs])} % of a core.\n"


def _spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--rollouts", type=int, default=20_000)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds {arguments.rounds}: a spread needs at least 2.")
    rollouts = arguments.rollouts // (GROUP * GROUPS_PER_STEP) * GROUP * GROUPS_PER_STEP
    measure(ALL, rollouts)  # imports, and caches that fill
    with Stopwatch() as watch:
        for _ in range(arguments.rounds):
            measure(ALL, rollouts)
    print("".join(parts_table(watch, rollouts * arguments.rounds)))
    costs: dict[Set[str], list[Cost]] = {OFF: [], ALL: []}
    for _ in range(arguments.rounds):
        for parts, found in costs.items():
            found.append(measure(parts, rollouts))
    print("".join(check(costs, rollouts)))


if __name__ == "__main__":
    main()
