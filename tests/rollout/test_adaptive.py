"""The rules that move the bound, each by itself, and together in virtual time."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import ConfigError
from asyncrl.rollout.adaptive import (
    ESS_LOSS_LIMIT,
    KL_LIMIT,
    MEMORY,
    MOST_GROWTH,
    PATIENCE,
    SUSTAINED,
    AdaptiveStaleness,
    StepFacts,
    controller,
)
from asyncrl.rollout.queue import GroupOrder
from asyncrl.rollout.staleness import StalenessBudget
from asyncrl.testing.simulation import Outcome, simulate
from asyncrl.types import Group, RolloutSample

BATCH = 8


def facts(
    seconds: float = 1.0,
    starved_s: float = 0.0,
    ready: int = 0,
    hot_load_s: float = 0.0,
    staleness: float = 1.0,
    kl: float = 0.0,
    ess: float = 1.0,
) -> StepFacts:
    """Of a step whose groups were admitted when it was taken; `steps_until_moved` says when they were."""
    return StepFacts(0.0, 0.0, 0.0, seconds, starved_s, ready, hot_load_s, staleness, kl, ess)


def at(bound: int, least: int = 0, most: int = 16, interval: int = 1) -> AdaptiveStaleness:
    """A controller that has come to `bound`."""
    made = AdaptiveStaleness(least, most, BATCH, interval)
    made.go_on({"bound": bound, "interval": interval, "patience": PATIENCE})
    return made


CLOCK = itertools.count(1)


def steps_until_moved(made: AdaptiveStaleness, told: StepFacts, lag: int = 0, most: int = 300) -> int | None:
    """Steps are a second apart; the groups of each began `lag` s before it."""
    before = made.bound
    for step in range(1, most + 1):
        now = float(next(CLOCK))
        made.observe(replace(told, now=now, oldest_at=now - lag, newest_at=now - lag))
        if made.bound != before:
            return step
    return None


class TestRaising:
    def test_by_as_much_as_littles_law_says(self) -> None:
        made = at(3)
        assert steps_until_moved(made, facts(starved_s=0.5)) == 2  # one window
        assert made.bound == 7  # twice the budget for half of the time
        assert made.reason == "3 -> 7: the trainer waited 50% of 2 steps, and the bound held rollouts back"

    def test_from_nothing_and_at_most_to_four_times_the_budget(self) -> None:
        made = at(0)
        steps_until_moved(made, facts(starved_s=1.0))
        assert made.bound + 1 == MOST_GROWTH

    def test_never_above_its_limit(self) -> None:
        made = at(3, most=4)
        steps_until_moved(made, facts(starved_s=0.9))
        assert made.bound == 4
        assert steps_until_moved(made, facts(seconds=0.3, starved_s=0.2)) is None
        assert "but max_staleness" in made.reason

    def test_not_for_a_wait_that_the_bound_did_not_cause(self) -> None:
        assert steps_until_moved(at(3), facts(starved_s=0.04)) is None

    def test_only_as_far_as_tokens_bear(self) -> None:
        made = at(3)
        steps_until_moved(made, facts(starved_s=0.75, staleness=3.0, kl=KL_LIMIT * 0.65))
        assert made.bound == 5  # (3 + 1) / 0.65 - 1 = 5.2
        made = at(3)
        assert steps_until_moved(made, facts(starved_s=0.75, staleness=3.0, ess=1 - 0.9 * ESS_LOSS_LIMIT)) is None
        assert "but what tokens bear" in made.reason

    def test_a_raise_is_given_time_to_show(self) -> None:
        made = at(1)
        steps_until_moved(made, facts(starved_s=0.5))
        assert made.bound == 3
        faster = facts(seconds=0.6, starved_s=0.1)
        assert steps_until_moved(made, faster, lag=5) == 4 + 2  # until groups of its own are trained, and a window

    def test_a_raise_that_buys_nothing_is_taken_back_and_tried_again_later(self) -> None:
        made = at(1)
        same = facts(starved_s=0.5)
        steps_until_moved(made, same)
        assert made.bound == 3
        steps_until_moved(made, same)
        assert made.bound == 1
        assert "rollouts wait for something else" in made.reason
        seen, waited = [made.bound], 0
        while seen[-1] < 3:
            waited += steps_until_moved(made, same) or 300
            seen.append(made.bound)
        assert 2 * MEMORY < waited < 300
        assert set(seen) == {1, 2, 3}

    def test_a_tail_that_has_changed_since_is_no_failed_raise(self) -> None:
        made = at(1)
        steps_until_moved(made, facts(starved_s=0.5))
        assert made.bound == 3
        steps_until_moved(made, facts(seconds=4.0, starved_s=3.0))
        assert made.bound > 3

    def test_what_bought_nothing_is_tried_at_once_when_the_trainer_waits_for_longer(self) -> None:
        made = at(1)
        for _ in range(2):
            steps_until_moved(made, facts(starved_s=0.5))
        assert made.bound == 1
        assert steps_until_moved(made, facts(seconds=2.0, starved_s=1.5)) <= 2 + 4 + 2
        assert made.bound > 3


class TestLowering:
    def test_tokens_that_are_too_off_policy(self) -> None:
        made = at(8)
        strained = facts(staleness=8.0, kl=KL_LIMIT * 1.45)
        assert steps_until_moved(made, strained) == SUSTAINED
        assert made.bound == 5  # (8 + 1) / 1.45 - 1 = 5.2
        assert made.reason == "8 -> 5: tokens are too off-policy: KL to the sampler 0.145, ess 1.00"

    def test_at_most_by_half_and_not_again_before_it_shows(self) -> None:
        made = at(8)
        strained = facts(staleness=8.0, ess=0.2)
        steps_until_moved(made, strained)
        assert made.bound == 4
        assert steps_until_moved(made, strained, lag=9) == 9  # what was admitted under 8 is still being trained

    def test_one_odd_batch_is_nothing(self) -> None:
        made = at(8)
        for step in range(50):
            made.observe(facts(kl=1.0 if step % 2 else 0.0, starved_s=0.01))
        assert made.bound == 8

    def test_never_below_its_limit(self) -> None:
        made = at(3, least=2)
        strained = facts(staleness=3.0, kl=1.0)
        steps_until_moved(made, strained)
        assert made.bound == 2
        assert steps_until_moved(made, strained) is None

    def test_groups_that_always_wait_are_staleness_for_nothing(self) -> None:
        made = at(8)
        assert steps_until_moved(made, facts(ready=5 * BATCH)) == PATIENCE * 4  # windows of half of the budget
        assert made.bound == 4  # one batch stays as a margin
        assert steps_until_moved(made, facts(ready=BATCH)) is None

    def test_one_time_without_them_is_enough_to_stay(self) -> None:
        made = at(8)
        for step in range(200):
            made.observe(facts(ready=0 if step % 9 == 0 else 5 * BATCH))
        assert made.bound == 8

    def test_it_takes_longer_each_time_that_it_was_wrong(self) -> None:
        made = at(8)
        first = steps_until_moved(made, facts(ready=3 * BATCH))
        assert made.bound == 6
        steps_until_moved(made, facts(starved_s=0.2))
        assert made.bound == 8
        for _ in range(9):
            made.observe(facts(seconds=0.8))
        again = steps_until_moved(made, facts(seconds=0.8, ready=3 * BATCH))
        assert again is not None
        assert first is not None
        assert again >= 2 * first


class TestHotLoads:
    def test_a_slow_one_comes_less_often(self) -> None:
        made = at(8)
        for _ in range(9):
            made.observe(facts(seconds=1.0, hot_load_s=2.5, starved_s=0.02))
        assert made.sync_interval == 3
        assert made.reason == "8: a hot-load takes 2.5 steps, and comes every 3"

    def test_half_of_the_bound_is_left_to_rollouts(self) -> None:
        made = at(8)
        for _ in range(9):
            made.observe(facts(seconds=1.0, hot_load_s=30.0, starved_s=0.02))
        assert made.sync_interval == 4
        made.go_on({"bound": 0, "interval": 9, "patience": PATIENCE})
        assert made.sync_interval == 1

    def test_it_comes_as_often_again_when_it_is_quick(self) -> None:
        made = at(8)
        for _ in range(9):
            made.observe(facts(hot_load_s=3.0, starved_s=0.02))
        for _ in range(60):
            made.observe(facts(hot_load_s=0.1, starved_s=0.02))
        assert made.sync_interval == 1

    def test_never_more_often_than_was_set(self) -> None:
        made = at(8, least=3, interval=3)
        for _ in range(60):
            made.observe(facts(hot_load_s=0.1, starved_s=0.02))
        assert made.sync_interval == 3

    def test_steps_that_take_no_time(self) -> None:
        """A division by the least number there is."""
        made = at(8)
        for _ in range(9):
            made.observe(facts(seconds=5e-324, hot_load_s=3.0))
        assert made.sync_interval == 4


@given(
    limits=st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted),
    told=st.lists(
        st.builds(
            StepFacts,
            st.floats(0, 99),
            st.floats(0, 99),
            st.floats(0, 99),
            st.floats(0, 10),
            st.floats(0, 10),
            st.integers(0, 99),
            st.floats(0, 50),
            st.floats(0, 9),
            st.floats(0, 5) | st.just(float("nan")),
            st.floats(0.01, 1) | st.just(float("nan")),
        ),
        max_size=80,
    ),
)
def test_it_keeps_its_limits_whatever_it_is_told(limits: list[int], told: list[StepFacts]) -> None:
    made = AdaptiveStaleness(*limits, BATCH, 1)
    for step in told:
        made.observe(step)
        assert limits[0] <= made.bound <= limits[1]
        assert 1 <= made.sync_interval <= made.bound + 1
        assert made.reason.startswith((f"{made.bound}:", "0 ->", *(f"{n} -> {made.bound}:" for n in range(10))))


def test_a_resumed_run_goes_on_from_what_was_learned() -> None:
    before = at(1)
    steps_until_moved(before, facts(starved_s=0.5, hot_load_s=2.0))
    after = AdaptiveStaleness(0, 16, BATCH, 1)
    after.go_on(before.learned())
    assert (after.bound, after.sync_interval) == (before.bound, before.sync_interval) == (3, 2)
    narrower = AdaptiveStaleness(0, 2, BATCH, 1)
    narrower.go_on(before.learned())
    assert narrower.bound == 2
    fresh = AdaptiveStaleness(1, 2, BATCH, 1)
    fresh.go_on({})  # the run before had a bound that stayed
    assert fresh.bound == 1


class TestTheBudgetAndTheOrder:
    def test_a_budget_that_shrinks_admits_none_until_enough_have_come_back(self) -> None:
        budget = StalenessBudget(6)
        for _ in range(5):
            budget.admit()
        budget.resize(2)
        assert (budget.free, budget.can_admit()) == (0, False)
        for _ in range(3):
            budget.leave()
        assert (budget.free, budget.can_admit()) == (0, False)
        budget.leave()
        assert (budget.free, budget.can_admit()) == (1, True)

    def test_the_group_that_is_due_first_goes_first(self) -> None:
        """Or it waits behind an older one that must wait for it: a batch that is never filled."""
        order = GroupOrder(batch_groups=2, bound=6)
        order.begin_batch(0)
        old, due, passing = (group(sequence) for sequence in range(3))
        order.admitted(old.sequence, 0)  # may be trained up to step 6
        order.bound = 0
        order.admitted(due.sequence, 0)  # must be trained now
        order.bound = 6
        order.admitted(passing.sequence, 0)
        order.finished(passing)
        assert order.take() is passing
        order.finished(old)
        assert order.take() is None, "the last place is the one's that is due"
        order.finished(due)
        assert order.take() is due

    def test_a_restored_group_keeps_its_deadline(self) -> None:
        order = GroupOrder(batch_groups=1, bound=6)
        first, second = group(0), group(1)
        order.admitted(first.sequence, 0)
        order.bound = 2
        order.admitted(second.sequence, 0)
        again = GroupOrder(batch_groups=1, bound=6)
        for one in (first, second):
            again.admitted_before(one, order.deadline(one))
            again.finished(one)
        again.begin_batch(0)
        assert again.take() is second


def group(sequence: int) -> Group:
    return Group(sequence, row=sequence, epoch=0, version=0, runs=[], advantages=[], admitted_at=0.0, finished_at=0.0)


class TestSettings:
    def test_a_bound_that_stays_has_no_controller(self) -> None:
        assert controller(Config(model="none")) is None

    def test_it_starts_at_the_least(self) -> None:
        made = controller(Config(model="none", staleness={"min_staleness": 1, "max_staleness": 8}))
        assert made is not None
        assert (made.bound, made.sync_interval) == (1, 1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"staleness": {"min_staleness": 5}}, "min_staleness is 5 and max_staleness is 4"),
            (
                {"staleness": {"min_staleness": 1}, "publish": {"weight_sync_interval": 3}},
                "Raise it to at least 2, or lower publish.weight_sync_interval",
            ),
            (
                {"staleness": {"min_staleness": 1, "policy": "pace"}, "publish": {"weight_sync_interval": 0}},
                "no bound holds, wherever it moves",
            ),
            ({"staleness": {"min_staleness": 0}, "deterministic": True}, "Set staleness.max_staleness=0"),
        ],
    )
    def test_what_cannot_be_is_refused(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Config(model="none", **settings)


SWITCH = 25
STEPS = 100


def tail_comes(least: int | None, most: int, *, comes: bool = True) -> Outcome:
    """100 steps of 0.25 s; judges who take up to 0.3 s, and in one part of the run some who take 4 s."""

    async def rollout(prompt: Prompt) -> RolloutSample:
        drawn = await prompt.policy.generate([0], max_tokens=1)
        slow = (prompt.index >= SWITCH * BATCH) == comes and prompt.rng.random() < 0.3
        await asyncio.sleep(prompt.rng.uniform(3.0, 4.0) if slow else prompt.rng.uniform(0.1, 0.3))
        return RolloutSample(
            [0, *drawn.tokens], [0.0, *drawn.logprobs], [0, 1], prompt.rng.random(), [0, *drawn.versions]
        )

    config = Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=BATCH,
        data={"shuffle": False},
        staleness={"min_staleness": least, "max_staleness": most},
        concurrency={"min_window": 1024, "max_window": 1024},
    )
    return simulate(config, rows=STEPS * BATCH, rollout=rollout, step_s=lambda: 0.25, publish_s=lambda: 0.01)


def mean_staleness(outcome: Outcome, steps: slice) -> float:
    records = outcome.records[steps]
    return sum(record["staleness_mean"] for record in records) / len(records)


def test_a_tail_that_comes_in_the_middle() -> None:
    random.seed(0)
    moved, tight, loose = tail_comes(0, 16), tail_comes(None, 2), tail_comes(None, 16)
    begun = moved.records[: STEPS - 20]  # then the data ends
    bounds = [0, *(record["staleness_bound"] for record in begun)]
    raised = [record for record, before in zip(begun, bounds, strict=False) if record["staleness_bound"] > before]
    assert len(raised) > 2
    assert all(record["budget_free"] == 0 for record in raised), "groups begin at once"
    assert moved.seconds < 0.5 * tight.seconds
    assert moved.seconds < 1.6 * loose.seconds
    short = slice(5, SWITCH)
    assert mean_staleness(moved, short) < 3 < 0.3 * mean_staleness(loose, short)


def test_a_tail_that_goes_in_the_middle() -> None:
    random.seed(0)
    moved, loose = tail_comes(0, 16, comes=False), tail_comes(None, 16, comes=False)
    late = slice(STEPS - 8, STEPS)  # what was admitted under the larger bound has been trained
    assert mean_staleness(moved, late) < 4 < 0.3 * mean_staleness(loose, late)
    assert moved.records[-1]["time_s"] - moved.records[-9]["time_s"] < 1.1 * 8 * 0.25, "as fast as the trainer is"


def test_a_hot_load_that_takes_three_steps_is_not_waited_for() -> None:
    def run(least: int | None) -> Outcome:
        config = Config(
            model="none",
            completions_per_prompt=2,
            prompt_groups_per_step=4,
            staleness={"min_staleness": least, "max_staleness": 8},
            concurrency={"min_window": 256, "max_window": 256},
        )
        return simulate(config, rows=400, duration_s=lambda rng: 0.2, step_s=lambda: 0.5, publish_s=lambda: 1.5)

    moved, fixed = run(6), run(None)
    assert moved.records[-1]["sync_interval"] > 1
    assert moved.seconds < 0.6 * fixed.seconds
