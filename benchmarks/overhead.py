"""What the engine itself costs: rollouts that do nothing, 64 to 65,536 of them in flight.

    python benchmarks/overhead.py [--rollouts 200000]

Prints rollouts per second of the whole loop (admission, task, contract check, advantages, queue, ledger, batch) on
one core, and the memory that one rollout in flight takes. Each rollout gives up control once, so that as many are
in flight as the window allows; sampler and trainer are fakes that take no time.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import time
import tracemalloc

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.collector import calm_collector
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import SamplingParams

GROUP = 8
GROUPS_PER_STEP = 8
TOKENS = [1, 2, 3, 4]
LOGPROBS = [0.0, -0.5, -0.5, -0.5]
MASK = [0, 1, 1, 1]


async def costs_nothing(prompt: Prompt) -> RolloutSample:
    await asyncio.sleep(0)
    return RolloutSample(TOKENS, LOGPROBS, MASK, float(prompt.rollout_index % 2))


class ForgetfulTrainer(CountingTrainer):
    """Counts steps and keeps nothing."""

    async def forward_backward(self, sequences) -> None:  # type: ignore[no-untyped-def]
        return None


def make_engine(in_flight: int, rollouts: int, rollout):  # type: ignore[no-untyped-def]
    config = Config(
        model="none",
        completions_per_prompt=GROUP,
        prompt_groups_per_step=GROUPS_PER_STEP,
        staleness={"max_staleness": 2 * in_flight // (GROUP * GROUPS_PER_STEP) + 1},
        concurrency={"min_window": in_flight, "max_window": in_flight},
    )
    sampler, trainer = ScriptedSampler(), ForgetfulTrainer()
    context = PolicyContext(sampler, params=SamplingParams(4), max_seq_len=100, load_tokenizer=lambda: None)
    return assemble(
        config,
        rollout,
        [{"row": row} for row in range(rollouts // GROUP)],
        sampler=sampler,
        trainer=trainer,
        make_policy=lambda session, version: Policy(context, session, version),
        on_step=lambda record, batch: None,
    )


async def rate(in_flight: int, rollouts: int) -> float:
    engine = make_engine(in_flight, rollouts, costs_nothing)
    with calm_collector():
        began = time.perf_counter()
        await engine.run()
        seconds = time.perf_counter() - began
    assert engine.ledger.ends["trained"] == rollouts // GROUP
    return rollouts / seconds


async def bytes_in_flight(in_flight: int) -> float:
    """Memory of rollouts that all wait for one event, per rollout."""
    release = asyncio.Event()

    async def waits(prompt: Prompt) -> RolloutSample:
        await release.wait()
        return await costs_nothing(prompt)

    engine = make_engine(in_flight, in_flight, waits)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    run = asyncio.create_task(engine.run())
    while engine.scheduler.in_flight < in_flight:  # noqa: ASYNC110 - counting is the point, not waiting
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    release.set()
    await run
    return used / in_flight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rollouts", type=int, default=200_000)
    rollouts = parser.parse_args().rollouts // GROUP * GROUP
    print("| in flight | rollouts/s | bytes a rollout in flight |")
    print("|---|---|---|")
    for in_flight in (64, 512, 4096, 65536):
        per_second = asyncio.run(rate(in_flight, rollouts))
        size = asyncio.run(bytes_in_flight(in_flight))
        print(f"| {in_flight:,} | {per_second:,.0f} | {size:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
