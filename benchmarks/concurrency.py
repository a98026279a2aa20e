"""The adaptive window from a cold start against fixed windows from 1 to 128.

    python benchmarks/concurrency.py [--vllm]

Simulated engines run in virtual time: continuous batching whose step takes longer the more requests it decodes, a
limit of requests that run at once, and a KV cache that throws the youngest request out when it is full, which then
starts again. `--vllm` measures real vLLM on this machine (docs/vllm.md) instead, about four minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.engine import Engine
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import Completion, Load, Sampler, SampleRequest, SamplingParams

FIXED = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
GROUP = 4


@dataclass
class Job:
    """One request in the simulated engine."""

    prompt: int
    left: int
    total: int
    done: asyncio.Future[None] = field(repr=False)

    @property
    def held(self) -> int:
        """Tokens in the KV cache."""
        return self.prompt + self.total - self.left


class SimulatedEngine(ScriptedSampler):
    """Decodes all running requests one token a step; a step of n requests takes `base_s + each_s * n`."""

    def __init__(self, base_s: float, each_s: float, most_running: int, kv_tokens: int) -> None:
        super().__init__()
        self.base_s, self.each_s, self.most_running, self.kv_tokens = base_s, each_s, most_running, kv_tokens
        self.jobs: list[Job] = []
        self.queue: deque[Job] = deque()
        self.preemptions = 0
        self.tokens = 0

    async def generate(self, request: SampleRequest) -> Completion:
        length = random.Random(request.session).randint(20, 180)
        job = Job(len(request.token_ids), length, length, asyncio.get_running_loop().create_future())
        self.queue.append(job)
        await job.done
        return Completion([1], [-0.5], [self.version], "length")

    async def run(self) -> None:
        while True:
            self._admit()
            await asyncio.sleep(self.base_s + self.each_s * len(self.jobs))
            for job in self.jobs:
                job.left -= 1
            self.tokens += len(self.jobs)
            for job in [job for job in self.jobs if job.left <= 0]:
                self.jobs.remove(job)
                if not job.done.cancelled():
                    job.done.set_result(None)
            while sum(job.held for job in self.jobs) > self.kv_tokens:
                thrown_out = self.jobs.pop()
                thrown_out.left = thrown_out.total
                self.queue.appendleft(thrown_out)
                self.preemptions += 1

    def _admit(self) -> None:
        while self.queue and len(self.jobs) < self.most_running:
            if sum(job.held for job in self.jobs) + self.queue[0].prompt > self.kv_tokens:
                return
            self.jobs.append(self.queue.popleft())

    async def load(self) -> Load:
        held = sum(job.held for job in self.jobs)
        return Load(
            len(self.jobs), len(self.queue), held / self.kv_tokens, self.preemptions, generated_tokens=self.tokens
        )


ENGINES = {
    "wide (512 at once, large KV)": lambda: SimulatedEngine(0.010, 0.0001, 512, 1_000_000),
    "48 at once": lambda: SimulatedEngine(0.010, 0.0001, 48, 1_000_000),
    "KV for about 40": lambda: SimulatedEngine(0.010, 0.0001, 512, 6_000),
    "KV for about 12, slow": lambda: SimulatedEngine(0.030, 0.001, 512, 1_800),
}


async def rollout(prompt: Prompt) -> RolloutSample:
    completion = await prompt.policy.generate([0] * 64, max_tokens=200)
    return RolloutSample.from_completion([0] * 64, completion, reward=prompt.rng.random())


def make_engine(sampler: Sampler, low: int, high: int, rows: int, windows: list[int], work=rollout) -> Engine:  # type: ignore[no-untyped-def]
    config = Config(
        model="none",
        completions_per_prompt=GROUP,
        prompt_groups_per_step=8,
        staleness={"policy": "pace", "max_staleness": 100},
        concurrency={"min_window": low, "max_window": high, "initial_window": 16},
    )
    context = PolicyContext(sampler, params=SamplingParams(200), max_seq_len=1024, load_tokenizer=lambda: None)
    return assemble(
        config,
        work,
        [{"row": row} for row in range(rows)],
        sampler=sampler,
        trainer=CountingTrainer(),
        make_policy=lambda session, version: Policy(context, session, version),
        on_step=lambda record, batch: None,
        on_gauges=lambda gauges: windows.append(int(gauges["window"])),
    )


def simulated_rate(engine_name: str, low: int, high: int, seconds: float = 240.0) -> tuple[float, list[int]]:
    """Rollouts per virtual second over `seconds` from a cold start, and the windows over time."""
    windows: list[int] = []

    async def main() -> float:
        sampler = ENGINES[engine_name]()
        stepping = asyncio.create_task(sampler.run())
        engine = make_engine(sampler, low, high, 1_000_000, windows)
        asyncio.get_running_loop().call_later(seconds, engine.stop)
        await engine.run()
        stepping.cancel()
        return engine.scheduler.finished_rollouts / seconds

    return run_virtual(main()), windows


def report(name: str, fixed: dict[int, float], adaptive: float, windows: Sequence[int]) -> None:
    best = max(fixed, key=lambda size: fixed[size])
    settled = windows[len(windows) // 2 :]
    swing = statistics.pstdev(settled) / statistics.mean(settled)
    cells = " ".join(f"{size}:{rate:.1f}" for size, rate in fixed.items())
    print(
        f"| {name} | {best} | {fixed[best]:.1f} | {adaptive:.1f} | {adaptive / fixed[best]:.2f} "
        f"| {min(settled)} to {max(settled)} ({swing:.0%}) | {cells} |",
        flush=True,
    )


def simulate_all() -> None:
    for name in ENGINES:
        fixed = {size: simulated_rate(name, size, size)[0] for size in FIXED}
        adaptive, windows = simulated_rate(name, 1, 128)
        report(name, fixed, adaptive, windows)


async def vllm_all() -> None:
    from asyncrl.sampling.vllm import VllmSampler
    from asyncrl.testing.models import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder) / "model", hidden=128, layers=4, max_seq_len=512)
        config = Config(model=str(model), max_seq_len=512, sampler={"kind": "vllm"})
        async with VllmSampler(config, run_dir=Path(folder), keep_versions=2) as sampler:
            await vllm_rate(sampler, 32, 32, 5.0)
            fixed = {size: (await vllm_rate(sampler, size, size))[0] for size in FIXED[3:]}
            adaptive, windows = await vllm_rate(sampler, 1, 128)
            report("vLLM on this CPU", fixed, adaptive, windows)


async def vllm_rate(sampler: Sampler, low: int, high: int, seconds: float = 20.0) -> tuple[float, list[int]]:
    windows: list[int] = []

    async def work(prompt: Prompt) -> RolloutSample:
        length = prompt.rng.randint(8, 56)
        tokens = prompt.rng.choices(range(200), k=64)
        completion = await prompt.policy.generate(tokens, max_tokens=length, stop_token_ids=[])
        return RolloutSample.from_completion(tokens, completion, reward=prompt.rng.random())

    engine = make_engine(sampler, low, high, 1_000_000, windows, work)
    engine.settings = type(engine.settings)(
        **{name: getattr(engine.settings, name) for name in engine.settings.__slots__} | {"sync_interval": 0}
    )
    asyncio.get_running_loop().call_later(seconds, engine.stop)
    began = time.monotonic()
    await engine.run()
    return engine.scheduler.finished_rollouts / (time.monotonic() - began), windows


def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", action="store_true")
    real = parser.parse_args().vllm
    print("| engine | best fixed | rollouts/s | adaptive | share | window, second half (sd) | fixed windows |")
    print("|---|---|---|---|---|---|---|")
    if real:
        asyncio.run(vllm_all())
    else:
        simulate_all()


if __name__ == "__main__":
    main()
