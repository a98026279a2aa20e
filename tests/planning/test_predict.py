"""Predictions against what can be worked out by hand, and against the laws of the bound."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl import Config
from asyncrl.errors import BreakerOpen
from asyncrl.planning.predict import Machine, Prediction, predict, unbounded
from asyncrl.planning.sampler_model import SamplerModel
from asyncrl.planning.trainer_model import TrainerModel
from asyncrl.planning.workload import Attempt, Workload
from tests.planning.simulated_run import pool


def config_of(staleness: dict[str, object], window: int = 1000, **more: object) -> Config:
    return Config(
        **{
            "model": "none",
            "completions_per_prompt": 4,
            "prompt_groups_per_step": 4,
            "staleness": staleness,
            "concurrency": {"min_window": window, "max_window": window},
            **more,
        }
    )


def even(rng: random.Random) -> Attempt:
    """2 s in the sampler, alone or not, and 1 s in a tool."""
    return Attempt.of_turns([(0.0, 0, 20)], after_s=1.0, reward=rng.random())


def tailed(rng: random.Random) -> Attempt:
    return Attempt.of_turns([(0.0, 0, 20)], after_s=rng.lognormvariate(0, 1), reward=rng.random())


EVEN, TAILED = (pool(draw, rows=500) for draw in (even, tailed))
SAMPLER = SamplerModel(token_s=0.1)


def test_on_policy_is_one_after_the_other() -> None:
    """3 s of rollouts, 1 s of training, 0.5 s of export, 0.5 s of hot-load: 16 samples in 5 s."""
    machine = Machine(SamplerModel(token_s=0.1, hot_load_s=(0.5,)), TrainerModel(step_s=1.0, export_s=0.5))
    found = predict(config_of({"max_staleness": 0}), machine, EVEN, steps=20)
    assert found.samples_per_s == pytest.approx(16 / 5)
    assert found.rollouts_per_s == pytest.approx(16 / 5)
    assert found.steps_per_s == pytest.approx(1 / 5)
    assert (found.staleness_mean, found.staleness_worst) == (0, 0)
    assert found.wait_share == pytest.approx(0.7)  # 3 s of rollouts, and the 0.5 s that they wait for the hot-load
    assert found.train_share == pytest.approx(0.2)
    assert found.loss_tokens_per_s == pytest.approx(16 * 20 / 5)


def test_the_trainer_binds_where_it_is_slow() -> None:
    machine = Machine(SAMPLER, TrainerModel(step_s=5.0))
    found = predict(config_of({"max_staleness": 2}), machine, EVEN, steps=30)
    assert found.samples_per_s == pytest.approx(16 / 5)
    assert found.train_share == pytest.approx(1.0)


def test_tokens_cost_what_they_cost() -> None:
    """80 tokens of a group, of which 3 x 5 are shared; 4 groups; 10 ms each."""
    workload = pool(lambda rng: Attempt.of_turns([(0.0, 5, 15)], reward=rng.random()), rows=50)
    machine = Machine(SamplerModel(token_s=1e-4), TrainerModel(step_s=1.0, token_s=0.01, shared=1.0))
    found = predict(config_of({"max_staleness": 4}), machine, workload, steps=20)
    assert 1 / found.steps_per_s == pytest.approx(1.0 + 4 * 65 * 0.01, rel=0.01)


def test_slots_bind_where_they_are_few() -> None:
    """8 rollouts at once of 3 s each; a step of no time."""
    found = predict(config_of({"max_staleness": 8}, window=8), Machine(SAMPLER, TrainerModel()), EVEN, steps=100)
    assert found.samples_per_s == pytest.approx(8 / 3, rel=0.02)
    assert found.slots_bound_share > 0.9


def test_a_tail_costs_what_the_bound_says() -> None:
    """Of the ideal rate: more staleness, more of it; `pace` the most, and none of them more than all."""
    machine = Machine(SAMPLER, TrainerModel(step_s=0.7))
    most = predict(unbounded(config_of({}, window=64)), machine, TAILED, warm_up=10).samples_per_s
    shares = [
        predict(config_of(staleness, window=64), machine, TAILED, steps=100).samples_per_s / most
        for staleness in ({"max_staleness": 0}, {"max_staleness": 2}, {"max_staleness": 8}, {"max_staleness": 40})
    ]
    assert shares == sorted(shares)
    assert shares[0] < 0.3 < 0.9 < shares[-1] <= 1.05
    paced = predict(config_of({"max_staleness": 4, "policy": "pace"}, window=64), machine, TAILED, steps=100)
    assert paced.samples_per_s / most > shares[2]
    assert paced.staleness_worst > 4


def test_masked_tokens_are_counted_as_lost() -> None:
    machine = Machine(SAMPLER, TrainerModel(step_s=0.7))
    staleness = {"max_staleness": 1, "policy": "pace", "on_stale": "mask"}
    found = predict(config_of(staleness, window=64), machine, TAILED, steps=100)
    assert found.staleness_worst == 1
    assert found.loss_tokens_per_s < found.rollouts_per_s * 20


@pytest.mark.parametrize("on_stale", ["drop", "requeue"])
def test_groups_that_are_sent_away_are_counted_as_lost(on_stale: str) -> None:
    """Every rollout draws 20 tokens: what is finished and not trained has been lost."""
    machine = Machine(SAMPLER, TrainerModel(step_s=0.7))
    staleness = {"max_staleness": 1, "policy": "pace", "on_stale": on_stale}
    found = predict(config_of(staleness, window=64), machine, TAILED, steps=200)
    assert found.staleness_worst == 1
    lost = (found.rollouts_per_s - found.samples_per_s) * 20
    assert found.lost_tokens_per_s == pytest.approx(lost, rel=0.15) != 0


@given(st.integers(0, 4), st.integers(1, 3), st.sampled_from(["wait", "pace"]), st.integers(4, 64), st.integers(0, 9))
@settings(max_examples=12, deadline=None)
def test_a_hard_bound_is_kept(bound: int, interval: int, policy: str, window: int, seed: int) -> None:
    """Whatever the durations: the engine asserts it as well, and would end the simulation."""
    interval = min(interval, bound + 1)
    machine = Machine(SamplerModel(token_s=0.1, running_s=0.01, hot_load_s=(0.1, 2.0)), TrainerModel(step_s=0.5))
    config = config_of(
        {"max_staleness": bound, "policy": policy}, window=window, publish={"weight_sync_interval": interval}
    )
    found = predict(config, machine, TAILED, steps=20, warm_up=5, seed=seed)
    assert found.steps == 20
    assert found.staleness_worst <= bound or policy == "pace"
    assert found.wait_share + found.train_share + found.publish_wait_share == pytest.approx(1.0)


def test_groups_without_signal_and_failures_take_their_time() -> None:
    """Half of the rows teach nothing; of the others every rollout fails once, after 1 s."""
    failed = Attempt((), 1.0, "failed")
    silent = tuple((Attempt.of_turns([(0.0, 0, 20)], reward=1.0),) for _ in range(4))
    telling = tuple((failed, Attempt.of_turns([(0.0, 0, 20)], reward=float(index))) for index in range(4))
    config = config_of({"max_staleness": 2}, window=16)
    found = predict(config, Machine(SAMPLER, TrainerModel()), Workload((silent, telling)), steps=50)
    assert found.samples_per_s == pytest.approx(found.rollouts_per_s / 2, rel=0.05)
    assert found.samples_per_s == pytest.approx(
        16 / (2 + 1 + 2), rel=0.1
    )  # 16 slots; 5 s for a trained one and its twin


def test_a_workload_that_would_end_the_run_ends_the_simulation() -> None:
    workload = Workload((((Attempt((), 1.0, "failed"),),),))
    with pytest.raises(BreakerOpen):
        predict(config_of({"max_staleness": 1}), Machine(SAMPLER, TrainerModel()), workload, steps=5)


def test_time_limits_hold() -> None:
    """One in forty never ends; its slot is free after the limit, and its group goes on without it."""
    rows = tuple(
        tuple(
            (Attempt((), 1.0, "timed out" if row % 10 == index == 0 else "done", float(index)),) for index in range(4)
        )
        for row in range(20)
    )
    config = config_of({"max_staleness": 4}, rollout={"timeout_s": 3.0, "retries": 0}, stall_timeout_s=10.0)
    found = predict(config, Machine(SAMPLER, TrainerModel(step_s=0.1)), Workload(rows), steps=400)
    assert found.samples_per_s / found.rollouts_per_s == pytest.approx(1 - 1 / 40, rel=0.02)


def test_the_same_seed_predicts_the_same() -> None:
    def once(seed: int) -> Prediction:
        config = config_of({"max_staleness": 2}, window=32)
        return predict(config, Machine(SAMPLER, TrainerModel(step_s=0.5)), TAILED, steps=80, seed=seed)

    found, other = once(3), once(4)
    assert once(3) == found != other
    assert abs(found.samples_per_s - other.samples_per_s) < 6 * found.samples_per_s_error


def test_functions_of_the_run_are_not_looked_for() -> None:
    """A run that was started from a script names them by places that are nowhere else."""
    nowhere = {"group_filter": "__main__:worth_it", "advantage": "gone.py:best_of"}
    machine = Machine(SAMPLER, TrainerModel(step_s=1.0))
    found = predict(config_of({"max_staleness": 1}, **nowhere), machine, EVEN, steps=10)
    assert found.samples_per_s == predict(config_of({"max_staleness": 1}), machine, EVEN, steps=10).samples_per_s


def test_what_is_predicted_is_a_run_under_way() -> None:
    """A run begins with an empty queue and fresh weights; what a setting gives shows later."""
    config = config_of({"max_staleness": 16})
    machine = Machine(SAMPLER, TrainerModel(step_s=1.0))
    later = predict(config, machine, EVEN, steps=300).staleness_mean
    assert predict(config, machine, EVEN, steps=10).staleness_mean == pytest.approx(later, rel=0.05)
    assert predict(config, machine, EVEN, steps=10, warm_up=0).staleness_mean < 0.8 * later
