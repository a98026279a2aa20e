"""What held rollouts back: the reasons share all of the time, and name what binds in the real engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl import Config
from asyncrl.rollout.held import REASONS, Held, between
from asyncrl.testing.simulation import Outcome, simulate

Durations = list[tuple[str, float]]


@given(st.lists(st.tuples(st.sampled_from(REASONS), st.floats(0, 10)), min_size=1, max_size=30))
def test_all_time_belongs_to_one_reason(changes: Durations) -> None:
    held, now = Held(), 0.0
    expected = dict.fromkeys(REASONS, 0.0)
    for reason, seconds in changes:
        held.by(reason, now)  # type: ignore[arg-type]
        expected[reason] += seconds
        now += seconds
        assert held.seconds(now) == pytest.approx(expected)
    assert sum(held.seconds(now).values()) == pytest.approx(now)


def run(**settings: Any) -> Outcome:
    durations = {name: settings.pop(name) for name in ("duration_s", "step_s", "publish_s") if name in settings}
    config = Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=4,
        max_steps=40,
        concurrency={"min_window": 64, "max_window": 64} | settings.pop("concurrency", {}),
        staleness={"max_staleness": 1} | settings.pop("staleness", {}),
        **settings,
    )
    return simulate(config, rows=400, **durations)


def share(outcome: Outcome, name: str) -> float:
    """Of the time in the middle of the run: at its ends nothing is left to begin."""
    records = outcome.records[5:-5]
    return sum(record[name] for record in records) / sum(record["step_s"] for record in records)


def test_a_full_window_is_named() -> None:
    outcome = run(concurrency={"min_window": 2, "max_window": 2}, step_s=lambda: 0.1)
    assert share(outcome, "held_slots_s") > 0.95
    assert share(outcome, "wait_slots_s") == pytest.approx(share(outcome, "wait_s"), rel=0.05)
    assert share(outcome, "wait_s") > 0.5


def test_a_staleness_budget_that_is_used_up_is_named() -> None:
    outcome = run(staleness={"max_staleness": 0}, step_s=lambda: 0.1)
    assert share(outcome, "wait_budget_s") == pytest.approx(share(outcome, "wait_s"))
    assert share(outcome, "wait_s") > 0.8


def test_weights_that_take_long_to_be_live_are_named() -> None:
    outcome = run(step_s=lambda: 0.1, publish_s=lambda: 3.0)
    assert share(outcome, "held_unpublished_s") > 0.5
    assert share(outcome, "wait_unpublished_s") > share(outcome, "wait_budget_s")


def test_a_straggler_is_named_only_where_groups_must_wait_for_it() -> None:
    def long_tail(rng: random.Random) -> float:
        return 20.0 if rng.random() < 0.02 else 0.1

    waits = run(staleness={"max_staleness": 4}, duration_s=long_tail, step_s=lambda: 0.1)
    paces = run(staleness={"max_staleness": 4, "policy": "pace"}, duration_s=long_tail, step_s=lambda: 0.1)
    assert share(waits, "wait_straggler_s") > 0.2
    assert share(paces, "wait_straggler_s") == 0.0


def test_the_parts_of_a_wait_add_up_to_it() -> None:
    for record in run(duration_s=lambda rng: rng.expovariate(1.0), step_s=lambda: 0.3).records:
        assert sum(record[f"wait_{reason}_s"] for reason in REASONS) == pytest.approx(record["wait_s"])
        assert record["wait_straggler_s"] <= record["wait_s"] + 1e-9
        assert record["model_s"] <= record["rollout_s"] + 1e-9


def test_differences_are_named() -> None:
    before, after = dict.fromkeys(REASONS, 1.0), dict.fromkeys(REASONS, 3.0)
    assert between(before, after, "wait_{}_s") == {f"wait_{reason}_s": 2.0 for reason in REASONS}
