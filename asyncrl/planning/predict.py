"""What rate and staleness a setting would give: the real scheduler, queue, budget and loop, with modelled ends.

    run = load_run("runs/first")
    workload = workload_of(run)
    machine = Machine.of_run(run, workload)
    prediction = predict(config, machine, workload)
    most = predict(unbounded(config), machine, workload)

`prediction.samples_per_s / most.samples_per_s` is the share of what any bound of staleness could give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np

from asyncrl.assemble import assemble
from asyncrl.collector import calm_collector
from asyncrl.config import Config, DataConfig, StalenessConfig
from asyncrl.data import Prompt
from asyncrl.engine import LOAD_EVERY_S, Engine
from asyncrl.errors import RecoverableRolloutError
from asyncrl.planning.fit import fit_sampler, fit_trainer
from asyncrl.planning.replica_model import Drawn
from asyncrl.planning.sampler_model import ModelledSampler, SamplerModel
from asyncrl.planning.trainer_model import ModelledTrainer, TrainerModel
from asyncrl.planning.workload import Workload
from asyncrl.planning.world import World, run_in
from asyncrl.reports.run_data import RunData
from asyncrl.rollout.batch import Batch
from asyncrl.rollout.concurrency import STALE_AFTER_S
from asyncrl.rollout.contract import Contract
from asyncrl.step_record import Record
from asyncrl.types import RolloutRun, RolloutSample

FOR_EVER_S = 1e9
"""Longer than any simulation."""
UNBOUNDED = 1000
"""Steps of staleness that no run reaches: the trainer never waits for the budget, nor the rollouts."""
ENDLESS = 1 << 40
"""Rows."""
LOOKS_A_ROLLOUT = 20
"""Of an adaptive window at the sampler's load."""
BLOCKS = 10
"""Parts of a run that are compared to tell how sure a mean is."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run runs on."""

    sampler: SamplerModel
    trainer: TrainerModel

    @classmethod
    def of_run(cls, run: RunData, workload: Workload) -> Machine:
        """As fast as that of a run, whose workload is `workload`.

        Raises:
            DataError: the run is too short, or recorded no timeline.
        """
        return cls(fit_sampler(run), fit_trainer(run, workload))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a setting gives, once it is under way. Rates are per second."""

    steps: int
    """That were measured."""
    seconds: float
    """They took, in virtual time."""
    samples_per_s: float
    """Trained."""
    samples_per_s_error: float
    """Standard error of it, from how much parts of the simulation differ."""
    rollouts_per_s: float
    """Finished, trained or not."""
    loss_tokens_per_s: float
    """Trained: without those that are masked because of their age."""
    lost_tokens_per_s: float
    """Drawn for nothing: masked, or of groups that were dropped or sent back because of their age (by the mean of a
    group's tokens)."""
    steps_per_s: float
    staleness_mean: float
    """Over the loss tokens."""
    staleness_worst: float
    wait_share: float
    """Of the trainer's time, waiting for rollouts."""
    train_share: float
    """Of the trainer's time, computing."""
    publish_wait_share: float
    in_flight: float
    """Rollouts, on average over the steps."""
    window: float
    slots_bound_share: float
    """Of the time, rollouts could not begin because the window was full."""


def predict(
    config: Config,
    machine: Machine,
    workload: Workload,
    *,
    steps: int = 300,
    warm_up: int | None = None,
    seed: int = 0,
    on_step: Callable[[Record], None] = lambda record: None,
) -> Prediction:
    """Simulate `steps` optimizer steps after `warm_up` others, and say how they went.

    Args:
        config: Its data, evaluation, checkpoints and trackers do not matter, nor does its model.
        warm_up: Steps until it is under way. None: enough for the queue and the window to settle.
        on_step: Takes the step records that are measured.

    Raises:
        AsyncRLError: what would end such a run, a bound that is never kept, say.
    """
    if warm_up is None:
        warm_up = 10 + 4 * min(config.staleness.max_staleness, 16)
    simulation = _Simulation(_bare(config), machine, workload, warm_up, warm_up + steps, seed, on_step)
    return simulation.run()


def unbounded(config: Config) -> Config:
    """With staleness of any size: what the sampler, the trainer and the window allow together."""
    return config.model_copy(update={"staleness": StalenessConfig(policy="pace", max_staleness=UNBOUNDED)})


def _bare(config: Config) -> Config:
    """Only what the loop itself looks at. Nothing in virtual time stalls, and the user's functions, which may be
    anywhere, have no rewards to judge here."""
    return config.model_copy(
        update={
            "max_steps": None,
            "data": DataConfig(shuffle=False),
            "stall_timeout_s": FOR_EVER_S,
            "group_filter": None,
            "advantage": "grpo",
        }
    )


class _Rows:
    """As many empty rows as anybody wants."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return {}


class _Trusted(Contract):
    """Simulated samples are what they should be."""

    def check(self, result: object, *, oldest: int, newest: int) -> RolloutRun:
        assert isinstance(result, RolloutSample)
        return RolloutRun((result,))


class _Session:
    """The `prompt.policy` of a simulated rollout: which attempt it is, and what it is pinned to."""

    __slots__ = ("attempt", "calls", "oldest_version", "pinned")

    def __init__(self, session: str, pinned: int | None) -> None:
        self.attempt = int(session.rpartition(".")[2])
        self.pinned = pinned
        self.calls: Sequence[float] = ()
        """As of a single call, which took as long as all of them together."""
        self.oldest_version: int | None = None

    def close(self) -> None:
        """It holds nothing."""


@dataclass(slots=True)
class _Steps:
    """One entry per measured step."""

    time: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    rollouts: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    staleness: list[float] = field(default_factory=list)
    """Summed over `tokens`."""
    lost: list[int] = field(default_factory=list)
    parts: list[tuple[float, ...]] = field(default_factory=list)
    """Of the step's record, as `_PARTS` names them."""
    worst: int = 0


_PARTS = ("wait_s", "train_s", "publish_wait_s", "held_slots_s", "in_flight", "window")


class _Simulation:
    """One run in virtual time. Owns what was measured."""

    def __init__(
        self,
        config: Config,
        machine: Machine,
        workload: Workload,
        warm_up: int,
        last: int,
        seed: int,
        on_step: Callable[[Record], None],
    ) -> None:
        self._config, self._machine, self._workload = config, machine, workload
        self._warm_up, self._last, self._on_step = warm_up, last, on_step
        self._order = workload.order(seed)
        self._drawn = workload.mean_drawn
        self._rng = random.Random(seed)
        self._world = World()
        self._sampler = ModelledSampler(machine.sampler, self._world, self._rng)
        self._trainer = ModelledTrainer(machine.trainer, self._world, self._sampler)
        self._steps = _Steps()

    def run(self) -> Prediction:
        with calm_collector():
            run_in(self._world, self._run())
        return self._prediction()

    async def _run(self) -> None:
        self._engine: Engine = assemble(
            self._config,
            self._rollout,
            _Rows(),
            sampler=self._sampler,
            trainer=self._trainer,
            make_policy=_Session,
            on_step=self._step,
            contract=_Trusted(),
        )
        self._engine.load_every_s = self._load_every_s()
        await self._engine.run()
        self._engine.ledger.close()

    def _load_every_s(self) -> float:
        """Often enough for an adaptive window, which takes a look that is too late for none; no more than is of use."""
        rollout_s = self._workload.mean_idle_s + self._drawn * self._machine.sampler.token_s
        fixed = self._config.concurrency.min_window == self._config.concurrency.max_window
        return max(LOAD_EVERY_S, rollout_s / 4 if fixed else min(rollout_s / LOOKS_A_ROLLOUT, STALE_AFTER_S / 2))

    async def _rollout(self, prompt: Prompt) -> RolloutSample | None:
        index, session = prompt.index, cast(_Session, prompt.policy)
        order = self._order
        turn, place = divmod(index, len(order))
        member = self._workload.member(order[place], turn, prompt.rollout_index)
        attempt = member[min(session.attempt, len(member) - 1)]
        version = self._sampler.version
        drawn, model_s = await self._sampler.play(attempt, session.pinned)
        session.calls = (0.0, model_s, 0.0, 0.0, 0.0)
        if attempt.outcome == "done":
            shared = self._machine.trainer.shared * attempt.prompt if prompt.rollout_index else 0.0
            return _sample(
                max(1, round(attempt.tokens - shared)), drawn or [(version, attempt.loss_tokens)], attempt.reward
            )
        if attempt.outcome == "timed out":
            await self._world.sleep(FOR_EVER_S)  # until its time limit cancels it
        if attempt.outcome == "dropped":
            return None
        raise RecoverableRolloutError("as it did in the run that this one is simulated from")

    def _step(self, record: Record, batch: Batch) -> None:
        step = self._engine.step
        if step >= self._last:
            self._engine.stop()
        if step < self._warm_up:
            return
        steps = self._steps
        tokens, staleness, masked, worst = _tokens(batch)
        steps.time.append(self._world.now)
        steps.samples.append(batch.sequences)
        steps.rollouts.append(record["rollouts_finished"])
        steps.tokens.append(tokens)
        steps.staleness.append(staleness)
        sent_away = record["stale_dropped"] + record["stale_requeued"]
        steps.lost.append(masked + round(sent_away * self._config.completions_per_prompt * self._drawn))
        steps.parts.append(tuple(record.get(name, 0.0) for name in _PARTS))
        steps.worst = max(steps.worst, worst)
        self._on_step(record)

    def _prediction(self) -> Prediction:
        """The first entry only marks the time from which is measured."""
        steps = self._steps
        seconds = steps.time[-1] - steps.time[0]
        samples, tokens = sum(steps.samples[1:]), sum(steps.tokens[1:])
        parts = dict(zip(_PARTS, np.array(steps.parts[1:]).T, strict=True))
        shares = {name: float(column.sum()) / seconds for name, column in parts.items()}
        means = {name: float(column.mean()) for name, column in parts.items()}
        return Prediction(
            steps=len(steps.time) - 1,
            seconds=seconds,
            samples_per_s=samples / seconds,
            samples_per_s_error=standard_error(np.array(steps.time), np.array(steps.samples[1:])),
            rollouts_per_s=sum(steps.rollouts[1:]) / seconds,
            loss_tokens_per_s=tokens / seconds,
            lost_tokens_per_s=sum(steps.lost[1:]) / seconds,
            steps_per_s=(len(steps.time) - 1) / seconds,
            staleness_mean=sum(steps.staleness[1:]) / max(tokens, 1),
            staleness_worst=steps.worst,
            wait_share=shares["wait_s"],
            train_share=shares["train_s"],
            publish_wait_share=shares["publish_wait_s"],
            in_flight=means["in_flight"],
            window=means["window"],
            slots_bound_share=shares["held_slots_s"],
        )


def _sample(tokens: int, drawn: Drawn, reward: float) -> RolloutSample:
    """A sample of so many tokens. Its mask and versions have an entry for each part of `drawn`, not for each token."""
    return RolloutSample(
        tokens=range(tokens),
        logprobs=(),
        loss_mask=[1] * len(drawn),
        reward=reward,
        versions=[version for version, _ in drawn],
        info={"drawn": drawn},
    )


def _tokens(batch: Batch) -> tuple[int, int, int, int]:
    """Loss tokens of the batch, their staleness summed, those that were masked, and the worst staleness."""
    oldest = batch.step - batch.max_staleness if batch.on_stale == "mask" else -1
    tokens = total = masked = worst = 0
    for run in chain.from_iterable(group.runs for group in batch.trained):
        for version, count in run.segments[0].info["drawn"]:
            if version < oldest:
                masked += count
                continue
            staleness = batch.step - version
            tokens += count
            total += count * staleness
            if staleness > worst:
                worst = staleness
    return tokens, total, masked, worst


def standard_error(time: np.ndarray, samples: np.ndarray) -> float:
    """Of the rate of `samples` [S], between the times [S + 1]; nan for a handful.

    From how much blocks of steps differ: steps that follow each other are not independent.
    """
    blocks = min(BLOCKS, len(samples) // 2)
    if blocks < 2:
        return float("nan")
    ends = np.linspace(0, len(samples), blocks + 1).astype(int)
    rates = np.array([samples[a:b].sum() / (time[b] - time[a]) for a, b in pairwise(ends)])
    return float(rates.std(ddof=1) / np.sqrt(blocks))
