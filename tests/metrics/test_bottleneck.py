"""What is said to bind must be what binds: the advice is followed, and must pay; other advice is, and must not."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.metrics import bottleneck as module
from asyncrl.metrics.bottleneck import Kind, bottleneck, where_time_went
from asyncrl.metrics.report import Account
from tests.metrics.situations import Situation, run

PAYS = 1.25
"""The rate of trained groups after the advice was followed, over that before, ..."""
IN_VAIN = 1.1
"""... and after another one's was, or else what it brings is less than a fifth of what the right one does."""

Change = Callable[[Situation], Situation]
ADVICE: dict[str, Change] = {
    "trainer": lambda now: now.but(train_s=now.train_s / 2),
    "tools": lambda now: now.but(tool_s=now.tool_s / 2),
    "slots": lambda now: now.but(window=2 * now.window, most=now.most and 2 * now.most),
    "staleness": lambda now: now.but(staleness=2 * now.staleness + 1),
    "publish": lambda now: now.but(publish_s=now.publish_s / 2),
    "interval": lambda now: now.but(sync=2 * now.sync),
    "evaluation": lambda now: now.but(eval_every=None),
    "filter": lambda now: now.but(filtered=now.filtered / 2),
    "replicas": lambda now: now.but(speeds=(max(now.speeds),) * len(now.speeds)),
    "outages": lambda now: now.but(outage_s=0.0),
    "sampler": lambda now: now.but(capacity=2 * now.capacity),
    "checkpoint": lambda now: now.but(save_every=8 * now.save_every),
    "failures": lambda now: now.but(failing=0.0),
}


@dataclass(frozen=True)
class Case:
    kind: Kind
    situation: Situation
    pays: str
    in_vain: str
    """What has no effect. Where rollouts are wasted, more slots and a larger sampler help too: those are left out."""


CASES = {
    "slow trainer": Case("trainer", Situation(train_s=4.0), "trainer", "slots staleness sampler"),
    "slow tools": Case(
        "tools",
        Situation(tool_s=8.0, tools_at_once=12, window=512),
        "tools",
        "slots staleness trainer",
    ),
    "too few slots": Case("slots", Situation(window=8, train_s=0.3), "slots", "staleness sampler trainer"),
    "too few slots, tools": Case(
        "slots", Situation(window=8, train_s=0.3, tool_s=1.5), "slots", "staleness sampler trainer"
    ),
    "staleness bound": Case(
        "staleness", Situation(staleness=0, train_s=0.3, model_s=2.0, tail=0.1), "staleness", "slots sampler publish"
    ),
    "slow hot-loads": Case("publish", Situation(publish_s=4.0), "interval", "slots staleness trainer"),
    "slow hot-loads, on-policy": Case(
        "publish", Situation(publish_s=6.0, staleness=0), "publish", "slots sampler trainer"
    ),
    "heavy evaluation": Case(
        "evaluation",
        Situation(window=24, eval_every=1, eval_rows=200, eval_at_once=18, train_s=0.3),
        "evaluation",
        "staleness sampler trainer",
    ),
    "most is filtered": Case("filter", Situation(filtered=0.85, train_s=0.3, window=16), "filter", "staleness trainer"),
    "uneven replicas": Case(
        "replicas",
        Situation(speeds=(1.0, 1.0, 0.08), capacity=8, train_s=0.3, window=48),
        "replicas",
        "slots sampler trainer",
    ),
    "lost servers": Case("replicas", Situation(outage_s=30.0, publish_s=1.0), "outages", "slots trainer sampler"),
    "full sampler, full budget": Case(
        "sampler", Situation(capacity=6, train_s=0.3), "sampler", "slots staleness trainer publish"
    ),
    "full sampler, adaptive window": Case(
        "sampler",
        Situation(capacity=6, train_s=0.3, window=32, most=256, staleness=15, steps=40),
        "sampler",
        "slots staleness trainer publish",
    ),
    "checkpoints": Case("checkpoint", Situation(save_s=3.0), "checkpoint", "slots staleness trainer"),
    "failures": Case("failures", Situation(failing=0.8, train_s=0.3, window=16), "failures", "sampler trainer publish"),
}


def account(situation: Situation) -> tuple[Account, float]:
    told = run(situation)
    return Account(told.records), told.groups_per_s


@pytest.mark.parametrize(("factor", "seed", "members"), [(0.3, 1, 4), (1.5, 2, 2)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_advice_pays_and_no_other_does(case: Case, factor: float, seed: int, members: int) -> None:
    groups = case.situation.groups * case.situation.members // members  # as many rollouts in a batch
    situation = case.situation.but(seed=seed, members=members, groups=groups).slower(factor)
    found, rate = account(situation)
    said = bottleneck(found)
    assert said is not None
    assert said.kind == case.kind, said
    gain = account(ADVICE[case.pays](situation))[1] / rate
    assert gain > PAYS, f"{case.pays}: {gain:.2f}, after {said}"
    for other in case.in_vain.split():
        vain = account(ADVICE[other](situation))[1] / rate
        assert vain < max(IN_VAIN, 1 + (gain - 1) / 5), f"{other}: {vain:.2f}, and {case.pays}: {gain:.2f}"


# What no simulation shows, and how it is said


def record(**more: Any) -> dict[str, Any]:
    """A step of 10 s in which the trainer waited 8 s for rollouts that the staleness budget held back."""
    return {
        "step_s": 10.0,
        "wait_s": 8.0,
        "wait_budget_s": 8.0,
        "train_s": 2.0,
        "rollout_s": 300.0,
        "model_s": 250.0,
        "rollouts_finished": 64,
        "groups_trained": 8,
        "staleness_max": 1,
        "window": 64,
        "sampler_running": 30.0,
        **more,
    }


SLOTS = {"wait_budget_s": 0.0, "wait_slots_s": 8.0}


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("staleness", {}),
        ("loop", {"loop_blocked_s": 4.0}),
        ("balanced", {"wait_s": 1.8, "train_s": 3.0, "publish_wait_s": 1.8, "checkpoint_s": 1.0}),
        ("trainer", {"wait_s": 1.8, "train_s": 8.2}),
        ("data", {"wait_budget_s": 3.0, "wait_data_s": 5.0}),
        ("slots", SLOTS),
        ("sampler", SLOTS | {"window_congested": 1.0}),
        ("sampler", SLOTS | {"kv_use": 0.95}),
        ("sampler", {"sampler_full": 0.9, "sampler_waiting": 12.0}),
        ("tools", {"model_s": 20.0}),
        ("tools", {"sampler_full": 0.9, "sampler_waiting": 12.0, "model_s": 20.0}),  # the queue hardly costs anything
        ("evaluation", SLOTS | {"eval_in_flight": 30.0}),
        ("staleness", {"eval_in_flight": 30.0}),  # there were slots enough for both
        ("staleness", {"replica_spread": 2.0, "replicas_up": 4.0}),  # nobody knows that it was always the same one
        ("replicas", {"replica_spread": 2.0, "replicas_up": 4.0, "replica_busiest": 3.0}),
    ],
)
def test_what_tells_them_apart(kind: Kind, changed: dict[str, Any]) -> None:
    said = bottleneck(Account([record(**changed)] * 3))
    assert said is not None
    assert said.kind == kind, said


def test_another_replica_each_time_is_chance() -> None:
    uneven = [record(replica_spread=2.0, replicas_up=4.0, replica_busiest=float(number)) for number in (1, 2, 3, 4)]
    said = bottleneck(Account(uneven))
    assert said is not None
    assert said.kind == "staleness"


def test_replicas_that_are_down_are_named() -> None:
    said = where_time_went(Account([record(replicas_up=4.0), record(replicas_up=1.0)]))
    assert "of 4 vLLM replicas 2.5 were up on the mean" in said


def test_hot_load_that_waits_for_a_lost_replica_is_not_a_slow_one() -> None:
    slow = {"wait_s": 0.0, "publish_wait_s": 8.0}
    said = where_time_went(Account([record(replicas_up=1.0, **slow), record(replicas_up=0.0, **slow)]))
    assert "80% of the time for hot-loads: vLLM was up 50% of the time. The log says why it was lost." in said
    assert "Raise publish.weight_sync_interval" in where_time_went(Account([record(replicas_up=1.0, **slow)]))


def test_replicas_are_advised_only_where_there_are_some() -> None:
    full = {"sampler_full": 0.9, "sampler_waiting": 12.0}
    embedded, fleet = (where_time_went(Account([record(**full, **more)])) for more in ({}, {"replicas_up": 2.0}))
    assert "sampler.replicas" not in embedded
    assert "sampler.max_running" in embedded
    assert "sampler.replicas" in fleet


def test_the_staleness_that_would_do_is_told_where_it_is_no_folly() -> None:
    """A bound of 1 lets 2 batches be under way; where the trainer waits for 3/5 of the time, 5 would do."""
    assert "(4 would hide them" in where_time_went(Account([record(wait_s=6.0, wait_budget_s=6.0, train_s=4.0)]))
    assert "would hide them" not in where_time_went(Account([record(staleness_max=4)]))


@pytest.mark.parametrize("records", [[], [{"step_s": 0.0}], [{"step": 1}], [{"step_s": float("nan")}]])
def test_no_time_is_said_plainly(records: list[dict[str, Any]]) -> None:
    assert bottleneck(Account(records)) is None
    assert "no time to account for" in where_time_went(Account(records))


def test_every_setting_that_is_recommended_exists() -> None:
    sections = "|".join(Config.model_fields)
    found = re.findall(rf"\b({sections})\.(?!md)([a-z_]+)\b", inspect.getsource(module))
    assert len(found) > 10
    for section, name in found:
        assert name in Config.model_fields[section].annotation.model_fields, f"{section}.{name}"  # type: ignore[union-attr]
