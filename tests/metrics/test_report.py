from __future__ import annotations

from typing import Any

import pytest

from asyncrl.metrics.report import Account


def record(
    wait: float = 0.0, train: float = 0.0, publish: float = 0.0, step: float = 10.0, **more: Any
) -> dict[str, Any]:
    return {"wait_s": wait, "train_s": train, "publish_wait_s": publish, "step_s": step, **more}


def test_shares_are_of_all_steps_together() -> None:
    shares = Account([record(wait=10, step=10), record(train=20, publish=5, step=30, checkpoint_s=2)]).shares()
    assert shares is not None
    assert (shares.waiting, shares.training, shares.publishing, shares.saving) == (0.25, 0.5, 0.125, 0.05)
    assert str(shares) == "waiting for rollouts 25%, training 50%, publishing 12%, checkpoints 5%"


def test_checkpoints_that_cost_nothing_are_not_spoken_of() -> None:
    shares = Account([record(wait=10, step=10, checkpoint_s=0.01)]).shares()
    assert str(shares) == "waiting for rollouts 100%, training 0%, publishing 0%"


def test_shares_never_exceed_the_whole_when_parts_are_longer_than_the_step() -> None:
    shares = Account([record(wait=6, train=6, step=10, checkpoint_s=8)]).shares()
    assert shares is not None
    assert shares.waiting + shares.training + shares.saving == 1.0


@pytest.mark.parametrize("records", [[], [record(step=0.0)], [{"step": 1}], [record(step=float("nan"))]])
def test_no_time_has_no_shares(records: list[dict[str, Any]]) -> None:
    assert Account(records).shares() is None
    assert Account(records).share("wait_s") == 0.0


def test_gauges_count_for_as_long_as_their_step_was() -> None:
    account = Account([record(step=1.0, sampler_waiting=12.0), record(step=3.0, sampler_waiting=0.0), record(step=9.0)])
    assert account.mean("sampler_waiting") == 3.0  # over the steps that know it
    assert account.most("sampler_waiting") == 12.0
    assert account.knows("sampler_waiting")
    assert (account.mean("kv_use"), account.most("kv_use"), account.knows("kv_use")) == (0.0, 0.0, False)


def test_the_busiest_replica_is_the_one_that_was_it_longest() -> None:
    account = Account([record(step=4.0, replica_busiest=2.0), record(step=3.0, replica_busiest=1.0), record(step=1.0)])
    assert account.busiest_replica() == (2, 0.5)
    assert Account([record()]).busiest_replica() == (0, 0.0)
