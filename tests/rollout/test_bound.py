"""The hard bound and the conservation laws, over random configurations, durations and failures, in virtual time.

In each run the version of every trained token is recorded where the trainer receives it, independently of the
engine's own assertion; the ledger and the slots check themselves on every change.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import BreakerOpen, ConfigError, RecoverableRolloutError, StallError
from asyncrl.rollout import concurrency, queue, staleness
from asyncrl.storage import ledger
from asyncrl.testing.simulation import Outcome, simulate, timed_rollout
from asyncrl.types import RolloutSample


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any configuration that is accepted."""
    groups = draw(st.integers(1, 6))
    bound = draw(st.integers(0, 5))
    members = draw(st.integers(2, 4))
    policy, on_stale = draw(
        st.sampled_from([("wait", "train"), ("pace", "mask"), ("pace", "requeue"), ("pace", "drop"), ("pace", "train")])
    )
    window = draw(st.integers(1, 12))
    return Config(
        model="none",
        seed=draw(st.integers(0, 1000)),
        completions_per_prompt=members,
        prompt_groups_per_step=groups,
        pipeline_chunks_per_step=draw(st.integers(1, groups)),
        max_steps=draw(st.none() | st.integers(1, 8)),
        on_filtered=draw(st.sampled_from(["replace", "drop"])),
        data={"epochs": draw(st.integers(1, 2))},
        staleness={"policy": policy, "max_staleness": bound, "on_stale": on_stale},
        publish={"weight_sync_interval": draw(st.integers(1, bound + 1))},
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

    def test_slots_given_back_before_the_weights_are_live(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def at_once(self: staleness.StalenessBudget, groups: int, step: int) -> None:
            self.free += groups

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


def half_filtered() -> Outcome:
    config = Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=2,
        staleness={"max_staleness": 1},
        concurrency={"min_window": 4, "max_window": 4},
    )
    return simulate(config, rows=60, rollout=troubled(Outcome(), 0.0, 0.0, 0.5, 1))
