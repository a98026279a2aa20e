"""A run folder as a real run leaves it, by modelled ends whose numbers are known."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.planning.predict import Machine
from asyncrl.planning.sampler_model import ModelledSampler
from asyncrl.planning.trainer_model import ModelledTrainer
from asyncrl.planning.workload import Attempt, Workload
from asyncrl.planning.world import World, run_in
from asyncrl.reports.run_data import RunData, load_run
from asyncrl.rollout.batch import Batch
from asyncrl.step_record import Record
from asyncrl.storage.folder import config_toml
from asyncrl.storage.timeline import Timeline
from asyncrl.types import SamplingParams

ROWS = 100_000


def pool(draw: Callable[[random.Random], Attempt], *, rows: int = 2000, members: int = 4) -> Workload:
    """`rows` groups of rollouts as `draw` makes them."""
    rng = random.Random(0)
    return Workload(tuple(tuple((draw(rng),) for _ in range(members)) for _ in range(rows)))


def signal_share(workload: Workload) -> float:
    """Share of the rows whose rollouts earned different rewards."""
    rewards = [{member[-1].reward for member in row if member[-1].outcome == "done"} for row in workload.rows]
    return sum(len(found) > 1 for found in rewards) / len(rewards)


def attempt_of(rng: random.Random) -> Attempt:
    """One turn of 10 prompt tokens, and a tool with a tail."""
    return Attempt.of_turns([(rng.uniform(0.0, 0.5), 10, rng.randint(5, 60))], after_s=rng.lognormvariate(0.0, 0.7))


def simulated_run(folder: Path, config: Config, machine: Machine) -> RunData:
    """`config.max_steps` steps of rollouts as `attempt_of` draws them, through the real policy and timeline."""
    folder.mkdir()
    (folder / "config.toml").write_text(config_toml(config))
    world = World()
    with (folder / "metrics.jsonl").open("w") as metrics:

        def on_step(record: Record, batch: Batch) -> None:
            metrics.write(json.dumps(record) + "\n")

        async def run() -> None:
            sampler = ModelledSampler(machine.sampler, world, random.Random(1))
            context = PolicyContext(
                sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=lambda: None
            )
            timeline = Timeline(folder / "timeline")
            engine = assemble(
                config,
                rollout,
                [{}] * ROWS,
                sampler=sampler,
                trainer=ModelledTrainer(machine.trainer, world, sampler),
                make_policy=lambda session, version: Policy(context, session, version),
                on_step=on_step,
                timeline=timeline,
            )
            await engine.run()
            engine.ledger.close()
            timeline.close()

        run_in(world, run())
    return load_run(folder)


async def rollout(prompt: Prompt) -> RolloutSample:
    attempt = attempt_of(prompt.rng)
    turn = attempt.turns[0]
    await asyncio.sleep(turn.gap_s)
    tokens = [0] * turn.calls[0].context
    completion = await prompt.policy.generate(tokens, max_tokens=turn.calls[0].drawn)
    await asyncio.sleep(attempt.after_s)
    return RolloutSample.from_completion(tokens, completion, prompt.rng.random())
