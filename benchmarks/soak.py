"""Does anything grow? The whole engine for an hour or a night, at a high rate, with a sampler and a trainer that cost
nothing.

    python benchmarks/soak.py --minutes 60 [--every 10] [--out FOLDER]

Real: scheduler, engine, publication, evaluations, chats with a tool, the ledger, recorded samples, checkpoints,
metrics, logs and the watchdog, all on a real disk in real time. Every tenth group is an agent's, and some rollouts
fail. Fake: who draws the tokens, and who trains on them.

Each line of the table is a sample of the process; then comes a verdict for each column. What counts as growth is what
is left between the second quarter of the time and the last: the first is warm-up. Ends with 1 when something grew, or
when `asyncrl audit` finds a prompt that is not accounted for.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import asyncrl
from asyncrl import Config, Prompt, RolloutSample
from asyncrl.interrupt import Interrupt
from asyncrl.run import train_async
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.types import Rollout, SampleRequest, StepResult

ROWS = 2_000
TURN_S = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")
CALL = '<tool_call>\n{"name": "double", "arguments": {"number": 4}}\n</tool_call><|im_end|>'
WORDS = {word: list(tiny_tokenizer().encode(word)) for word in (CALL, "8<|im_end|>")}
LAG_TICK_S = 0.01


# What runs


@asyncrl.tool
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


def speak(request: SampleRequest) -> list[int]:
    """An agent's first turn is a call, its second the answer; anything else is a few tokens."""
    prompt = request.token_ids
    if len(prompt) < 20:
        return [5, 6, 7, 8, 9, 10]
    return WORDS["8<|im_end|>" if prompt.count(WORDS[CALL][0]) > 1 else CALL]


class ForgetfulTrainer(CountingTrainer):
    """Counts steps and keeps nothing."""

    def __init__(self, config: Config, **options: Any) -> None:
        super().__init__(step_s=lambda: 0.005)

    async def optim_step(self) -> StepResult:
        result = await super().optim_step()
        self._loaded_step, self.batches = self.step, []
        return result


class ForgetfulSampler(ScriptedSampler):
    async def publish(self, weights: Any) -> None:
        await super().publish(weights)
        del self.published[:-16]


@asynccontextmanager
async def fake_sampler(*args: Any) -> AsyncIterator[ScriptedSampler]:
    async with ForgetfulSampler(speak, latency_s=lambda request: TURN_S, keep_versions=16) as sampler:
        yield sampler


async def rollout(prompt: Prompt) -> Rollout:
    if random.random() < 0.01:  # not prompt.rng: another try shall mend it
        raise asyncrl.RecoverableRolloutError("a sandbox that is gone")
    if prompt.index % 10 == 0:
        chat = prompt.policy.chat("Double 4.", tools=[double], max_turns=3)
        await chat.run()
        return chat.sample(reward=prompt.rng.random())
    tokens = [1, 2, 3]
    completion = await prompt.policy.generate(tokens, max_tokens=8)
    return RolloutSample.from_completion(tokens, completion, prompt.rng.random(), row=prompt.index)


# What is measured


@dataclass(frozen=True)
class Sample:
    """The process at one moment."""

    minutes: float
    rss_mb: float
    blocks_k: float
    """Thousands of blocks that Python has allocated: what leaks in Python shows here first."""
    files: float
    threads: float
    tasks: float
    """Those of rollouts are left out."""
    lag_ms: float
    """The longest that the event loop stood still since the sample before."""
    rollouts_per_s: float
    ledger_mb: float


@dataclass(frozen=True)
class Tolerance:
    """How much a column may grow (a share of what it was, and so many of its units)."""

    share: float
    units: float
    falls: bool = False
    """It is bad for it to fall."""


TOLERANCES = {
    "rss_mb": Tolerance(0.02, 8),
    "blocks_k": Tolerance(0.02, 20),
    "files": Tolerance(0, 2),
    "threads": Tolerance(0, 16),  # one for each tool that ran at once with others
    "tasks": Tolerance(0, 16),
    "lag_ms": Tolerance(0.5, 100),
    "rollouts_per_s": Tolerance(0.3, 0, falls=True),
}


def is_rollout(task: asyncio.Task[Any]) -> bool:
    return getattr(task.get_coro(), "__qualname__", "").startswith("Scheduler._run")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Meter:
    """Looks at this process every `every_s`."""

    def __init__(self, ledger: Path, every_s: float) -> None:
        self.samples: list[Sample] = []
        self.rollouts = 0
        self._ledger = ledger
        self._every_s = every_s
        self._lag_s = 0.0

    async def counted(self, prompt: Prompt) -> Rollout:
        self.rollouts += 1
        return await rollout(prompt)

    async def run(self) -> None:
        print("  ".join(f"{field.name:>14}" for field in fields(Sample)))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_lag())
            tasks.create_task(self._look())

    async def _watch_lag(self) -> None:
        while True:
            due = time.monotonic() + LAG_TICK_S
            await asyncio.sleep(LAG_TICK_S)
            self._lag_s = max(self._lag_s, time.monotonic() - due)

    async def _look(self) -> None:
        began = before = time.monotonic()
        seen = self.rollouts
        while True:
            await asyncio.sleep(self._every_s)
            now = time.monotonic()
            gc.collect(1)
            self.samples.append(
                Sample(
                    minutes=(now - began) / 60,
                    rss_mb=resident_bytes() / 1e6,
                    blocks_k=sys.getallocatedblocks() / 1e3,
                    files=len(os.listdir("/proc/self/fd")),
                    threads=threading.active_count(),
                    tasks=sum(not is_rollout(task) for task in asyncio.all_tasks()),
                    lag_ms=self._lag_s * 1e3,
                    rollouts_per_s=(self.rollouts - seen) / (now - before),
                    ledger_mb=sum(file.stat().st_size for file in self._ledger.parent.glob("ledger.db*")) / 1e6,
                )
            )
            before, seen, self._lag_s = now, self.rollouts, 0.0
            sample = self.samples[-1]
            print("  ".join(f"{getattr(sample, field.name):>14,.1f}" for field in fields(Sample)), flush=True)


def verdicts(samples: list[Sample]) -> list[str]:
    """One line per column that has a tolerance; those that begin with `GROWS` or `FALLS` are faults."""
    quarter = max(1, len(samples) // 4)
    earlier, later = samples[quarter : 2 * quarter], samples[-quarter:]
    hours = (later[-1].minutes + later[0].minutes - earlier[-1].minutes - earlier[0].minutes) / 2 / 60
    lines = []
    for name, tolerance in TOLERANCES.items():
        before, after = (median(getattr(sample, name) for sample in part) for part in (earlier, later))
        change = (before - after) if tolerance.falls else (after - before)
        bad = change > max(tolerance.units, tolerance.share * before)
        verdict = ("FALLS" if tolerance.falls else "GROWS") if bad else "flat"
        lines.append(
            f"{verdict:>6}  {name:<16}{before:>10,.1f} -> {after:,.1f}  ({(after - before) / hours:+,.1f} / h)"
        )
    return lines


# The run


async def soak(model: Path, run_dir: Path, minutes: float, every_s: float) -> list[Sample]:
    config = Config(
        model=str(model),
        run_dir=run_dir,
        completions_per_prompt=4,
        prompt_groups_per_step=8,
        max_seq_len=1024,
        data={"epochs": 1_000_000},
        sampling={"max_tokens": 128},
        sampler={"kind": "transformers"},
        staleness={"max_staleness": 4},
        concurrency={"min_window": 32, "max_window": 256},
        evaluation={"interval": 500, "concurrency": 4},
        rollout={"retries": 1},
        publish={"canary": False},
        save_model=False,
    )
    interrupt, meter = Interrupt(), Meter(run_dir / "ledger.db", every_s)
    measuring = asyncio.create_task(meter.run())
    asyncio.get_running_loop().call_later(minutes * 60, interrupt)
    rows = [{"row": row} for row in range(ROWS)]
    try:
        with (
            patch("asyncrl.training.thread.ThreadedTrainer", ForgetfulTrainer),
            patch("asyncrl.training_run.open_sampler", fake_sampler),
        ):
            result = await train_async(
                meter.counted, dataset=rows, config=config, evaluation=rows[:50], view="quiet", interrupt=interrupt
            )
    finally:
        measuring.cancel()
        await asyncio.wait([measuring])
    print(f"\n{result.steps:,} steps, {result.rollouts:,} rollouts, {len(result.evaluations):,} evaluations")
    return meter.samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=10, metavar="S", help="seconds between two samples")
    parser.add_argument("--out", type=Path, help="keep the run folder here (default: a temporary one)")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="asyncrl-soak-"))
    try:
        run_dir = arguments.out or scratch / "run"
        samples = asyncio.run(soak(tiny_model(scratch / "model"), run_dir, arguments.minutes, arguments.every))
        found = verdicts(samples)
        print("\n".join(found), flush=True)
        sizes = {path.name: sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
                 for path in sorted(run_dir.iterdir())}  # fmt: skip
        print("on the disk, MB: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items()))
        audit = subprocess.run([sys.executable, "-m", "asyncrl", "audit", str(run_dir)], check=False)
        return int(audit.returncode != 0 or any(line.strip().startswith(("GROWS", "FALLS")) for line in found))
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main())
