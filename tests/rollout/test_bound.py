"""The hard bound and the conservation laws, over random configurations, durations and failures, in virtual time.

In each run the version of every trained token is recorded where the trainer receives it, independently of the
engine's own assertion; the ledger and the slots check themselves on every change.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import BreakerOpen, ConfigError, RecoverableRolloutError, StallError
from asyncrl.rollout import concurrency, queue, staleness
from asyncrl.rollout.adaptive import AdaptiveStaleness, StepFacts
from asyncrl.rollout.batch import Batch, loss_versions
from asyncrl.storage import ledger
from asyncrl.testing.simulation import Outcome, simulate, timed_rollout
from asyncrl.types import Group, RolloutSample, TrainSequence


@st.composite
def configs(draw: st.DrawFn, moving: bool = False) -> Config:
    """Any configuration that is accepted, of those whose bound stays or of those whose bound moves."""
    groups = draw(st.integers(1, 6))
    bound = draw(st.integers(0, 5))
    members = draw(st.integers(2, 4))
    policy, on_stale = draw(
        st.sampled_from([("wait", "train"), ("pace", "mask"), ("pace", "requeue"), ("pace", "drop"), ("pace", "train")])
    )
    window = draw(st.integers(1, 12))
    least = draw(st.integers(0, bound)) if moving else None
    return Config(
        model="none",
        seed=draw(st.integers(0, 1000)),
        completions_per_prompt=members,
        prompt_groups_per_step=groups,
        pipeline_chunks_per_step=draw(st.integers(1, groups)),
        max_steps=draw(st.none() | st.integers(1, 8)),
        on_filtered=draw(st.sampled_from(["replace", "drop"])),
        data={"epochs": draw(st.integers(1, 2))},
        staleness={"policy": policy, "max_staleness": bound, "on_stale": on_stale, "min_staleness": least},
        publish={"weight_sync_interval": draw(st.integers(1, (bound if least is None else least) + 1))},
        rollout={
            "timeout_s": 20.0,
            "retries": draw(st.integers(0, 2)),
            "min_group_size": draw(st.integers(1, members)),
        },
        concurrency={
            "min_window": draw(st.integers(1, window)),
            "max_window": window,
            "initial_window": draw(st.integers(1, 12)),
        },
        stall_timeout_s=100.0,
    )


def troubled(outcome: Outcome, failure_rate: float, hang_rate: float, equal_rate: float, turns: int):  # type: ignore[no-untyped-def]
    """Rollouts that are slow, fail, hang, drop their draw, or bring a whole group without signal."""
    work = timed_rollout(outcome, lambda rng: min(15.0, rng.lognormvariate(-1, 1)), turns)

    async def rollout(prompt: Prompt) -> RolloutSample | None:
        sample = await work(prompt)
        dice = random.random()
        if dice < failure_rate:
            raise RecoverableRolloutError("bad luck")
        if dice < failure_rate + hang_rate:
            await asyncio.sleep(1e6)
        if dice < failure_rate + hang_rate + 0.02:
            return None
        if random.Random(prompt.index).random() < equal_rate:
            return RolloutSample(sample.tokens, sample.logprobs, sample.loss_mask, 1.0, sample.versions)
        return sample

    return rollout


@settings(max_examples=250, deadline=None)
@given(
    config=configs(),
    rows=st.integers(1, 40),
    failure_rate=st.sampled_from([0.0, 0.1, 0.2]),
    hang_rate=st.sampled_from([0.0, 0.02]),
    equal_rate=st.sampled_from([0.0, 0.3, 0.9]),
    turns=st.integers(1, 3),
    step_s=st.sampled_from([0.0, 0.1, 5.0]),
    publish_s=st.sampled_from([0.0, 0.1, 7.0]),
    chance=st.randoms(use_true_random=False),
)
def test_no_token_is_trained_beyond_the_bound(  # type: ignore[no-untyped-def]
    config, rows, failure_rate, hang_rate, equal_rate, turns, step_s, publish_s, chance
) -> None:
    random.seed(chance.random())
    outcome = Outcome()
    outcome = simulate(
        config,
        rows=rows,
        rollout=troubled(outcome, failure_rate, hang_rate, equal_rate, turns),
        step_s=lambda: chance.random() * step_s,
        publish_s=lambda: chance.random() * publish_s,
        keep_failure=True,
    )
    assert outcome.failure is None or isinstance(outcome.failure, BreakerOpen), outcome.failure
    if config.staleness.policy == "wait" or config.staleness.on_stale != "train":
        assert outcome.worst_staleness <= config.staleness.max_staleness
    assert outcome.peak_in_flight <= config.concurrency.max_window
    ledger = outcome.ledger
    assert ledger["admitted"] == sum(ledger[end] for end in ("trained", "filtered", "rejected", "pending"))
    if outcome.failure is None and config.max_steps is None:
        assert ledger["pending"] == 0
        assert ledger["admitted"] == rows * config.data.epochs
    if config.max_steps is not None:
        assert outcome.steps <= config.max_steps


@dataclass
class Witness:
    """Sees each group's bound where it is admitted, and its tokens where they go to the trainer."""

    now: int
    """The bound."""
    bounds: dict[int, int] = field(default_factory=dict)
    """By sequence."""
    moves: int = 0
    trained: int = 0

    def watch(self, patch: pytest.MonkeyPatch, chance: random.Random) -> None:
        """Let the bound and the hot-loads jump at each step, and look on."""

        def observe(controller: AdaptiveStaleness, facts: StepFacts) -> None:
            before = controller.bound
            controller.bound = chance.randint(controller._least, controller._most)
            controller._interval = chance.randint(1, 9)
            self.moves += controller.bound != before
            self.now = controller.bound

        admitted, add = queue.GroupOrder.admitted, Batch.add

        def admit(order: queue.GroupOrder, sequence: int, version: int) -> None:
            self.bounds[sequence] = self.now
            admitted(order, sequence, version)

        def train(batch: Batch, groups: list[Group]) -> list[TrainSequence]:
            for group in groups:
                oldest = min(min(loss_versions(sample)) for run in group.runs for sample in run.segments)
                assert batch.step - oldest <= self.bounds[group.sequence]
                self.trained += 1
            return add(batch, groups)

        patch.setattr(AdaptiveStaleness, "observe", observe)
        patch.setattr(queue.GroupOrder, "admitted", admit)
        patch.setattr(Batch, "add", train)


@settings(max_examples=60, deadline=None)
@given(
    config=configs(moving=True).filter(lambda config: config.staleness.policy == "wait"),
    rows=st.integers(1, 60),
    failure_rate=st.sampled_from([0.0, 0.1]),
    equal_rate=st.sampled_from([0.0, 0.3]),
    step_s=st.sampled_from([0.0, 0.1, 5.0]),
    publish_s=st.sampled_from([0.0, 0.1, 7.0]),
    chance=st.randoms(use_true_random=False),
)
def test_no_token_is_over_the_bound_of_its_group_while_the_bound_jumps(  # type: ignore[no-untyped-def]
    config, rows, failure_rate, equal_rate, step_s, publish_s, chance
) -> None:
    random.seed(chance.random())
    witness = Witness(config.staleness.min_staleness)
    with pytest.MonkeyPatch.context() as patch:
        witness.watch(patch, chance)
        outcome = simulate(
            config,
            rows=rows,
            rollout=troubled(Outcome(), failure_rate, 0.01, equal_rate, 2),
            step_s=lambda: chance.random() * step_s,
            publish_s=lambda: chance.random() * publish_s,
            keep_failure=True,
        )
    assert outcome.failure is None or isinstance(outcome.failure, BreakerOpen), outcome.failure
    assert outcome.worst_staleness <= config.staleness.max_staleness
    if outcome.failure is None and config.max_steps is None:
        assert outcome.ledger["pending"] == 0
        assert outcome.ledger["admitted"] == rows * config.data.epochs
    full = [record["groups_trained"] for record in outcome.records[:-1]]
    if config.on_filtered == "replace":
        assert full == [config.prompt_groups_per_step] * len(full)


@settings(max_examples=40, deadline=None)
@given(config=configs(moving=True), rows=st.integers(1, 60), step_s=st.floats(0.0, 1.0), publish_s=st.floats(0.0, 3.0))
def test_the_controller_keeps_its_limits(config: Config, rows: int, step_s: float, publish_s: float) -> None:
    outcome = simulate(
        config,
        rows=rows,
        duration_s=lambda rng: min(15.0, rng.lognormvariate(-1, 1)),
        step_s=lambda: step_s,
        publish_s=lambda: publish_s,
    )
    limits = config.staleness
    for record in outcome.records:
        assert limits.min_staleness <= record["staleness_bound"] <= limits.max_staleness
        assert config.publish.weight_sync_interval <= record["sync_interval"] <= record["staleness_bound"] + 1
    if limits.policy == "wait" or limits.on_stale != "train":
        assert outcome.worst_staleness <= limits.max_staleness


@settings(max_examples=40, deadline=None)
@given(config=configs(), rows=st.integers(1, 40), stop_after_s=st.floats(0.0, 20.0))
def test_a_stop_at_any_moment_accounts_for_every_prompt(config: Config, rows: int, stop_after_s: float) -> None:
    outcome = simulate(config, rows=rows, step_s=lambda: 0.3, publish_s=lambda: 0.4, stop_after_s=stop_after_s)
    ledger = outcome.ledger
    assert ledger["admitted"] == sum(ledger[end] for end in ("trained", "filtered", "rejected", "pending"))


def long_tail(policy: str, bound: int, **more: object) -> Outcome:
    config = Config(
        model="none",
        completions_per_prompt=4,
        prompt_groups_per_step=4,
        staleness={"policy": policy, "max_staleness": bound, **more},
        concurrency={"min_window": 32, "max_window": 32},
    )
    return simulate(
        config, rows=200, duration_s=lambda rng: min(5.0, rng.lognormvariate(-2, 1)), step_s=lambda: 0.05, turns=2
    )


def test_waiting_uses_the_whole_bound_and_pacing_passes_it() -> None:
    assert long_tail("wait", 3).worst_staleness == 3
    assert long_tail("pace", 3).worst_staleness > 3


@pytest.mark.parametrize("on_stale", ["mask", "requeue", "drop"])
def test_each_answer_to_stale_groups_is_really_given(on_stale: str) -> None:
    outcome = long_tail("pace", 1, on_stale=on_stale)
    assert outcome.worst_staleness <= 1
    if on_stale == "mask":
        assert sum(record["stale_masked_tokens"] for record in outcome.records) > 0
        assert outcome.ledger["trained"] + outcome.ledger["rejected"] == 200
    elif on_stale == "requeue":
        assert outcome.ledger["requeued"] == sum(record["stale_requeued"] for record in outcome.records) > 0
        assert outcome.ledger["trained"] == 200
    else:
        assert outcome.ledger["rejected"] == sum(record["stale_dropped"] for record in outcome.records) > 0
        assert outcome.ledger["trained"] + outcome.ledger["rejected"] == 200


def test_a_configuration_that_could_never_publish_is_refused() -> None:
    with pytest.raises(ConfigError, match="no step could ever be published: 3 steps of 8 groups are 24"):
        Config(model="none", staleness={"max_staleness": 1}, publish={"weight_sync_interval": 3})


class TestSeededFaults:
    """Each fault, put in by hand, must be seen by the checks above."""

    def test_a_budget_with_one_slot_too_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = staleness.StalenessBudget.__init__
        monkeypatch.setattr(
            staleness.StalenessBudget, "__init__", lambda self, slots, most=None: honest(self, slots + 4, most)
        )
        with pytest.raises(AssertionError):
            long_tail("wait", 1)

    def test_an_order_that_ignores_deadlines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(queue.GroupOrder, "_fits", lambda self, deadline: True)
        with pytest.raises(AssertionError):
            long_tail("wait", 1)

    def test_a_deadline_that_moves_with_the_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whose deadline is looked up when it is too late to keep another."""
        monkeypatch.setattr(
            queue.GroupOrder, "admitted", lambda self, sequence, version: self._expect(sequence, version + 6)
        )
        with pytest.raises(AssertionError):
            jumping()

    def test_a_budget_that_does_not_shrink(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def grow_only(self: staleness.StalenessBudget, slots: int) -> None:
            self.slots = max(self.slots, slots)

        monkeypatch.setattr(staleness.StalenessBudget, "resize", grow_only)
        with pytest.raises(AssertionError):
            jumping()

    def test_hot_loads_that_ignore_the_bound(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(AdaptiveStaleness, "sync_interval", property(lambda self: self._interval))
        with pytest.raises(StallError, match="0 finished groups, 0 unfinished"):
            jumping()

    def test_slots_given_back_before_the_weights_are_live(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def at_once(self: staleness.StalenessBudget, groups: int, step: int) -> None:
            self.in_use -= groups

        monkeypatch.setattr(staleness.StalenessBudget, "trained", at_once)
        config = Config(
            model="none",
            completions_per_prompt=2,
            prompt_groups_per_step=2,
            staleness={"max_staleness": 1},
            concurrency={"min_window": 64, "max_window": 64},
        )
        with pytest.raises(AssertionError):
            simulate(config, rows=200, duration_s=lambda rng: rng.random(), publish_s=lambda: 3.0)

    def test_a_filtered_group_that_keeps_its_slot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(staleness.StalenessBudget, "leave", lambda self: None)
        with pytest.raises(StallError, match=r"engine: waiting for group \d of step"):
            half_filtered()

    def test_a_filtered_group_that_the_ledger_forgets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ledger.Ledger, "filtered", lambda self, key: self.sequences.pop(key))
        with pytest.raises(AssertionError, match="the ledger lost a prompt"):
            half_filtered()

    def test_a_filtered_group_that_keeps_its_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(queue.GroupQueue, "gone", lambda self, sequence: None)
        with pytest.raises(StallError, match="3 finished groups, 0 unfinished"):
            half_filtered()

    def test_a_slot_that_is_given_back_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def twice(self: concurrency.FixedWindow) -> None:
            self._slots.release()
            self._slots.release()

        monkeypatch.setattr(concurrency.FixedWindow, "release", twice)
        with pytest.raises(AssertionError, match="given back twice"):
            half_filtered()


def jumping() -> Outcome:
    """A hard bound that jumps between 0 and 6 at every step."""
    config = Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=2,
        staleness={"max_staleness": 6, "min_staleness": 0},
        concurrency={"min_window": 64, "max_window": 64},
        rollout={"timeout_s": 20.0},
        stall_timeout_s=100.0,
    )
    chance = random.Random(0)
    with pytest.MonkeyPatch.context() as patch:
        witness = Witness(0)
        witness.watch(patch, chance)
        outcome = simulate(
            config,
            rows=400,
            duration_s=lambda rng: min(15.0, rng.lognormvariate(-1, 1.5)),
            step_s=lambda: chance.random(),
            publish_s=lambda: chance.random(),
        )
    assert witness.moves > 100
    assert witness.trained == 400
    return outcome


def test_a_bound_that_jumps_is_used_to_its_ends() -> None:
    assert jumping().worst_staleness == 6


def half_filtered() -> Outcome:
    config = Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=2,
        staleness={"max_staleness": 1},
        concurrency={"min_window": 4, "max_window": 4},
    )
    return simulate(config, rows=60, rollout=troubled(Outcome(), 0.0, 0.0, 0.5, 1))
