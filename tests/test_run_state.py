"""A run that ends anywhere and goes on from its last checkpoint is the run that it would have been: in virtual time."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.engine import Engine
from asyncrl.errors import StepFailed
from asyncrl.run_state import RunState, restore
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.testing.simulation import Outcome, timed_rollout
from asyncrl.types import SamplingParams, StepResult, Weights


@dataclass
class Saved:
    """Keeps what a checkpoint would: as text, since what JSON cannot hold would be lost."""

    every: int
    states: list[RunState] = field(default_factory=list)

    def due(self, step: int) -> bool:
        return step % self.every == 0

    async def save(self, state: RunState) -> None:
        self.states.append(RunState(state.step, json.loads(json.dumps(state.loop)), list(state.groups)))

    def raise_failure(self) -> None:
        pass


class FailingTrainer(CountingTrainer):
    """Cannot take some steps."""

    def __init__(self, failing: frozenset[int], **settings: Any) -> None:
        super().__init__(**settings)
        self._failing = failing
        self._calls = 0

    async def optim_step(self) -> StepResult:
        self._calls += 1
        if self._calls in self._failing:
            self._batch = []
            raise StepFailed("not finite")
        return await super().optim_step()


@dataclass
class Lineage:
    """What was trained, life after life, as far as later lives stand on it."""

    trained: list[tuple[int, tuple[int, int], int]] = field(default_factory=list)
    """(step, draw, staleness of its oldest token)"""
    bounds: dict[int, float] = field(default_factory=dict)
    """After each step, where the bound moves."""
    finished: bool = False
    rollouts: int = 0

    def rewind(self, step: int) -> None:
        self.trained = [entry for entry in self.trained if entry[0] <= step]


def live(
    config: Config,
    rows: int,
    lineage: Lineage,
    state: RunState | None,
    stop_s: float | None,
    *,
    clean: bool = False,
    failing: frozenset[int] = frozenset(),
    pending: int = 0,
) -> Saved:
    """One life, from `state`, until its end or until `stop_s`: a `clean` end is saved, another is not.

    `failing`: calls of the optimizer, counted from 1, that cannot take their step. `pending`: draws that are so when
    the run has come to its end.
    """
    saved = Saved(every=2 * max(1, config.publish.weight_sync_interval))

    async def work() -> None:
        sampler = ScriptedSampler(publish_s=lambda: 0.3)
        context = PolicyContext(
            sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=lambda: None
        )

        def on_step(record: dict[str, float], batch: object) -> None:
            lineage.trained.extend(
                (
                    int(record["step"]),
                    (group.epoch, group.row),
                    batch.step - min(group.runs[0].segments[0].versions[1:]),
                )
                for group in batch.groups
            )
            if "staleness_bound" in record:
                lineage.bounds[batch.step + 1] = record["staleness_bound"]

        async with FailingTrainer(failing, step_s=lambda: 0.5) as trainer:
            engine: Engine = assemble(
                config,
                timed_rollout(Outcome(), lambda rng: 0.2 + 10.0 * rng.random() ** 4, turns=2),
                [{"row": row} for row in range(rows)],
                sampler=sampler,
                trainer=trainer,
                make_policy=lambda session, version: Policy(context, session, version),
                on_step=on_step,
            )
            engine.checkpoints = saved
            if state is not None:
                trainer.batches = [[] for _ in range(state.step)]
                await sampler.publish(Weights(state.step, adapter=False, tensors={}))
                restore(engine, state)
                if engine.adaptive is not None:
                    assert engine.adaptive.learned() == state.loop["adaptive"]
            if stop_s is not None:
                asyncio.get_running_loop().call_later(stop_s, engine.stop)
            await engine.run()
            if clean:
                await saved.save(engine.capture())
                kept = {(group.epoch, group.row) for group in saved.states[-1].groups}
                again = {tuple(key) for key in saved.states[-1].loop["unfinished"]}
                assert kept | again == engine.ledger.sequences.keys()
                assert not kept & again
                assert kept >= engine.ledger._finished, "what has finished is not rolled out again"
            lineage.finished = not engine.stopping
            lineage.rollouts = engine.scheduler.finished_rollouts
            engine.ledger.check()
            if lineage.finished:
                assert engine.ledger.pending == pending

    run_virtual(work())
    return saved


@settings(max_examples=60, deadline=None)
@given(
    staleness=st.integers(0, 3),
    least=st.none() | st.integers(0, 3),
    policy=st.sampled_from(["wait", "pace"]),
    batch=st.integers(1, 4),
    chunks=st.integers(1, 2),
    interval=st.integers(1, 2),
    epochs=st.integers(1, 2),
    filtered=st.sampled_from(["replace", "drop"]),
    stops=st.lists(st.tuples(st.floats(0.1, 60.0), st.booleans()), max_size=6),
    seed=st.integers(0, 1000),
    most=st.sampled_from([None, 3, 7]),
)
def test_every_prompt_is_trained_once_whenever_the_process_ends(
    staleness: int,
    least: int | None,
    policy: str,
    batch: int,
    chunks: int,
    interval: int,
    epochs: int,
    filtered: str,
    stops: list[tuple[float, bool]],
    seed: int,
    most: int | None,
) -> None:
    rows = 23
    least = None if least is None else min(least, staleness)
    interval = min(interval, (staleness if least is None else least) + 1)
    config = Config(
        model="none",
        seed=seed,
        completions_per_prompt=2,
        prompt_groups_per_step=batch,
        pipeline_chunks_per_step=min(chunks, batch),
        on_filtered=filtered,
        max_steps=most,
        data={"epochs": epochs},
        staleness={"policy": policy, "max_staleness": staleness, "min_staleness": least},
        publish={"weight_sync_interval": interval},
        concurrency={"min_window": 8, "max_window": 8},
    )
    lineage, state = Lineage(), None
    for stop_s, clean in [*stops, (None, False)]:
        lineage.rewind(state.step if state is not None else 0)
        saved = live(config, rows, lineage, state, stop_s, clean=clean)
        state = saved.states[-1] if saved.states else state
        if lineage.finished:
            break
    assert lineage.finished
    steps = min(-(-rows * epochs // batch), most or rows * epochs)
    assert sorted({step for step, _, _ in lineage.trained}) == list(range(1, steps + 1))
    times = Counter(draw for _, draw, _ in lineage.trained)
    assert set(times.values()) == {1}
    assert len(times) == min(rows * epochs, steps * batch)
    if most is None:
        assert times.keys() == {(epoch, row) for epoch in range(epochs) for row in range(rows)}
    if policy == "wait":
        assert max(old for _, _, old in lineage.trained) <= staleness


def pairs(max_staleness: int, min_staleness: int | None = None) -> Config:
    """Steps of two groups of one rollout each."""
    return Config(
        model="none",
        completions_per_prompt=1,
        advantage="reinforce",
        prompt_groups_per_step=2,
        staleness={"max_staleness": max_staleness, "min_staleness": min_staleness},
        concurrency={"min_window": 8, "max_window": 8},
    )


def test_a_bound_that_has_moved_goes_on_from_there() -> None:
    """And the finished groups have the deadlines that they had, of the bounds under which they began."""
    config = pairs(max_staleness=4, min_staleness=0)
    lineage = Lineage()
    saved = live(config, 60, lineage, None, None)
    assert all(state.loop["adaptive"]["bound"] == lineage.bounds[state.step] for state in saved.states)
    state = next(state for state in saved.states if state.loop["adaptive"]["bound"] > 1 and state.groups)
    assert len(state.loop["deadlines"]) == len(state.groups)
    lineage.rewind(state.step)
    live(config, 60, lineage, state, None)  # looks that the bound is the same
    assert {draw for _, draw, _ in lineage.trained} == {(0, row) for row in range(60)}


def test_finished_groups_are_trained_and_not_rolled_out_again() -> None:
    """A slow prompt of the first batch holds a step up while many others finish."""
    config = pairs(max_staleness=4)
    lineage = Lineage()
    saved = live(config, 40, lineage, None, 30.0)
    state = next(state for state in saved.states if len(state.groups) > 1)
    waiting = {(group.epoch, group.row) for group in state.groups}
    unfinished = {tuple(key) for key in state.loop["unfinished"]}
    assert not waiting & unfinished
    lineage.rewind(state.step)

    live(config, 40, lineage, state, None)
    assert {draw for _, draw, _ in lineage.trained} == {(0, row) for row in range(40)}
    left = 40 - 2 * state.step - len(waiting)
    assert lineage.rollouts == state.loop["rollouts"] + left, "what was finished was not rolled out again"


def test_the_budget_of_steps_that_failed_comes_back() -> None:
    """On-policy there is room for one batch: if it did not come back, nothing could ever be begun again."""
    config = pairs(max_staleness=0)
    lineage = Lineage()
    live(config, 20, lineage, None, None, failing=frozenset({2, 3, 6}))
    assert lineage.finished
    assert sorted(step for step, _, _ in lineage.trained) == sorted([*range(1, 8)] * 2), "14 of 20 groups"


def test_a_run_that_gets_fewer_steps_ends_there() -> None:
    """More groups are finished than the steps that are left can train."""
    config = pairs(max_staleness=4)
    lineage = Lineage()
    saved = live(config, 60, lineage, None, 30.0)
    state = next(state for state in saved.states if len(state.groups) > 3)
    lineage.rewind(state.step)
    fewer = config.model_copy(update={"max_steps": state.step + 1})
    begun = state.loop["ledger"]["counts"]["admitted"]
    live(fewer, 60, lineage, state, None, pending=begun - 2 * (state.step + 1))
    assert lineage.finished
    assert Counter(step for step, _, _ in lineage.trained) == dict.fromkeys(range(1, state.step + 2), 2)


def test_a_run_that_gets_another_batch_takes_all_of_its_steps() -> None:
    config = pairs(max_staleness=2).model_copy(update={"max_steps": 12})
    lineage = Lineage()
    state = live(config, 60, lineage, None, 15.0, clean=True).states[-1]
    assert 0 < state.step < 12
    lineage.rewind(state.step)
    live(config.model_copy(update={"prompt_groups_per_step": 1}), 60, lineage, state, None)
    assert lineage.finished
    assert max(step for step, _, _ in lineage.trained) == 12
    assert set(Counter(draw for _, draw, _ in lineage.trained).values()) == {1}
