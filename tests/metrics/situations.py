"""A run of the real engine in virtual time, with one thing or another too slow: what the sentence must see through.

The scheduler, the queue, the budget, the publication, the evaluations and the loop are the real ones. Sampler,
trainer and checkpoints take the time that they are told to.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import anyio

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.checkpointing import Checkpointer
from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import RecoverableRolloutError
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.evaluation import Evaluator
from asyncrl.rollout.evaluations import Evaluation, Evaluations
from asyncrl.sampling.routing import Router
from asyncrl.step_record import Record
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import Completion, Load, RolloutSample, SampleRequest, SamplingParams, ServerLoad


@dataclass(frozen=True)
class Situation:
    """How long things take (s), and the settings that a user may change."""

    groups: int = 4
    """In a batch."""
    members: int = 4
    staleness: int = 3
    window: int = 64
    most: int | None = None
    """`concurrency.max_window`; None: the window is fixed."""
    turns: int = 2
    model_s: float = 0.5
    """Of one turn, on the mean, when nobody waits."""
    tool_s: float = 0.1
    tools_at_once: int = 1000
    tail: float = 0.3
    """Spread of both: sigma of a lognormal."""
    train_s: float = 1.0
    publish_s: float = 0.1
    sync: int = 1
    speeds: tuple[float, ...] = (1.0,)
    """Of the sampler's replicas."""
    outage_s: float = 0.0
    """Every sixth hot-load finds the servers lost for so long."""
    capacity: int = 64
    """Requests that one replica answers at once."""
    filtered: float = 0.0
    """Share of the groups whose rewards are all the same."""
    failing: float = 0.0
    """Share of the rollouts whose first attempt fails."""
    eval_every: int | None = None
    eval_rows: int = 40
    eval_at_once: int | None = None
    save_s: float = 0.0
    save_every: int = 1
    steps: int = 24
    rows: int = 3000
    seed: int = 0

    def but(self, **changed: Any) -> Situation:
        return replace(self, **changed)

    def slower(self, factor: float) -> Situation:
        """The same in another unit of time."""
        names = ("model_s", "tool_s", "train_s", "publish_s", "save_s", "outage_s")
        return self.but(**{name: factor * getattr(self, name) for name in names})

    def config(self) -> Config:
        return Config(
            model="none",
            seed=self.seed,
            max_steps=self.steps,
            prompt_groups_per_step=self.groups,
            completions_per_prompt=self.members,
            staleness={"max_staleness": self.staleness},
            concurrency={
                "min_window": 1 if self.most else self.window,
                "initial_window": self.window,
                "max_window": self.most or self.window,
            },
            publish={"weight_sync_interval": self.sync},
            rollout={"timeout_s": 1e6, "retries": 50},
            evaluation={"concurrency": self.eval_at_once},
            stall_timeout_s=1e8,
        )


@dataclass
class Told:
    """What a run told of itself, and how fast it was."""

    records: list[Record]
    groups_per_s: float
    """Trained, from the second quarter on: what is slow shows when the start is over."""


def run(situation: Situation) -> Told:
    """Train for `situation.steps` steps in virtual time."""
    records: list[Record] = []
    run_virtual(_run(situation, records))
    late = records[len(records) // 4 :]
    return Told(records, sum(r["groups_trained"] for r in late) / sum(r["step_s"] for r in late))


async def _run(situation: Situation, records: list[Record]) -> None:
    sampler = Fleet(situation)
    context = PolicyContext(sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=_none)
    tools = anyio.Semaphore(situation.tools_at_once)
    tried: set[tuple[int, int, bool]] = set()

    async def rollout(prompt: Prompt) -> RolloutSample:
        tokens, logprobs, mask, versions = [0], [0.0], [0], [0]
        for _ in range(situation.turns):
            drawn = await prompt.policy.generate(tokens, max_tokens=1)
            tokens += drawn.tokens
            logprobs += drawn.logprobs
            versions += drawn.versions
            mask += [1] * len(drawn.tokens)
            async with tools:
                await asyncio.sleep(situation.tool_s * prompt.rng.lognormvariate(0, situation.tail))
        me = (prompt.index, prompt.rollout_index, prompt.evaluation)
        if me not in tried and prompt.rng.random() < situation.failing:
            tried.add(me)
            raise RecoverableRolloutError("the tool was away")
        same = random.Random(prompt.index).random() < situation.filtered
        return RolloutSample(tokens, logprobs, mask, 1.0 if same else prompt.rng.random(), versions)

    def policy(session: str, version: int | None) -> Policy:
        return Policy(context, session, version)

    config = situation.config()
    async with CountingTrainer(step_s=lambda: situation.train_s) as trainer:
        engine = assemble(
            config,
            rollout,
            [{"row": row} for row in range(situation.rows)],
            sampler=sampler,
            trainer=trainer,
            make_policy=policy,
            on_step=lambda record, batch: records.append(record),
        )
        if situation.save_s:
            engine.checkpoints = cast(Checkpointer, Standstill(situation))

        async def held_out(evaluation: Evaluation) -> Any:
            return await evaluation.rollouts([{}] * situation.eval_rows)

        evaluations = Evaluations(
            function=held_out if situation.eval_every else None,
            evaluator=Evaluator(rollout, policy, Contract(), config.rollout, seed=1),
            sampler=sampler,
            guests=engine.scheduler.guests,
            interval=situation.eval_every,
            alone=64,
            limit_s=1e8,
            on_result=lambda evaluated: None,
            report=lambda text: None,
            fail=engine.scheduler.fail,
        )
        engine.on_published = evaluations.published
        async with evaluations:
            await engine.run()


def _none() -> None:
    return None


@dataclass
class Standstill:
    """Checkpoints for which training stands still."""

    situation: Situation

    def due(self, step: int) -> bool:
        return step % self.situation.save_every == 0

    async def save(self, state: Any) -> None:
        await asyncio.sleep(self.situation.save_s)

    def raise_failure(self) -> None:
        pass


class Fleet(ScriptedSampler):
    """Replicas with a speed and room for so many requests each; a rollout stays on one of them."""

    def __init__(self, situation: Situation) -> None:
        super().__init__(publish_s=self._hot_load_s)
        self._situation = situation
        self._hot_loads = 0
        self._back_at = 0.0
        self._random = random.Random(situation.seed)
        self._router = Router(len(situation.speeds))
        self._replicas = [
            ScriptedSampler(latency_s=self._latency(speed), capacity=situation.capacity) for speed in situation.speeds
        ]

    def _hot_load_s(self) -> float:
        self._hot_loads += 1
        lost_s = 0.0 if self._hot_loads % 6 else self._situation.outage_s
        self._back_at = asyncio.get_running_loop().time() + lost_s
        return lost_s + self._situation.publish_s

    def _latency(self, speed: float) -> Any:
        def seconds(request: SampleRequest) -> float:
            return self._situation.model_s / speed * self._random.lognormvariate(0, self._situation.tail)

        return seconds

    async def generate(self, request: SampleRequest) -> Completion:
        place = self._router.begin(request.session)
        replica = self._replicas[place]
        replica.version = self.version
        try:
            return await replica.generate(request)
        finally:
            self._router.end(place)

    async def load(self) -> Load:
        loads = [await replica.load() for replica in self._replicas]
        servers: Sequence[ServerLoad] = ()
        if len(loads) > 1:
            servers = [ServerLoad(str(i), load.running, load.waiting, 0.0, True) for i, load in enumerate(loads)]
        up = len(loads) if asyncio.get_running_loop().time() >= self._back_at else 0
        return Load(
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            generated_tokens=sum(load.generated_tokens for load in loads),
            replicas_up=up if servers or self._situation.outage_s else None,
            servers=tuple(servers),
        )
