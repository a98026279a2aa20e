from __future__ import annotations

from typing import Any

import pytest

from asyncrl.metrics.report import Account, where_time_went


def record(
    wait: float = 0.0, train: float = 0.0, publish: float = 0.0, step: float = 10.0, **more: Any
) -> dict[str, Any]:
    return {"wait_s": wait, "train_s": train, "publish_wait_s": publish, "step_s": step, **more}


def test_shares_are_of_all_steps_together() -> None:
    shares = Account([record(wait=10, step=10), record(train=20, publish=5, step=30)]).shares()
    assert shares is not None
    assert (shares.waiting, shares.training, shares.publishing) == (0.25, 0.5, 0.125)
    assert str(shares) == "waiting for rollouts 25%, training 50%, publishing 12%"


def test_shares_never_exceed_the_whole_when_parts_are_longer_than_the_step() -> None:
    shares = Account([record(wait=6, train=6, step=10)]).shares()
    assert shares is not None
    assert shares.waiting + shares.training == 1.0


@pytest.mark.parametrize("records", [[], [record(step=0.0)], [{"step": 1}], [record(step=float("nan"))]])
def test_no_time_is_said_plainly(records: list[dict[str, Any]]) -> None:
    assert "no time to account for" in where_time_went(Account(records))


FULL_WINDOW = {"in_flight": 64, "window": 64, "budget_free": 3, "sampler_waiting": 0}


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([record(train=9)], "The trainer is the bottleneck"),
        ([record(publish=6, train=3)], "publish.weight_sync_interval"),
        ([record(wait=3, train=3, publish=1)], "in balance"),
        ([record(wait=8, sampler_waiting=5)], "sampler.replicas"),
        ([record(wait=8, kv_use=0.95)], "sampler.gpu_memory_utilization"),
        ([record(wait=8, **FULL_WINDOW)], "concurrency.initial_window"),
        ([record(wait=8, in_flight=20, window=64, budget_free=0)], "staleness.max_staleness"),
        ([record(wait=8, in_flight=20, window=64, budget_free=5)], "your rollout function is slow"),
        ([record(wait=8, groups_filtered=30, groups_trained=8)], "30 of 38 groups had equal rewards"),
    ],
)
def test_bottleneck_is_named_with_its_setting(records: list[dict[str, Any]], said: str) -> None:
    assert said in where_time_went(Account(records))


def test_every_setting_that_is_recommended_exists() -> None:
    import inspect
    import re

    from asyncrl.config import Config
    from asyncrl.metrics import report

    sections = "|".join(Config.model_fields)
    for section, name in re.findall(rf"\b({sections})\.([a-z_]+)\b", inspect.getsource(report)):
        assert name in Config.model_fields[section].annotation.model_fields, f"{section}.{name}"  # type: ignore[union-attr]
