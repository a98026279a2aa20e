from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.planning.advice import recommend
from asyncrl.planning.described import Description, described
from asyncrl.planning.frontier_page import changes, frontier_page
from asyncrl.planning.grid import Search
from asyncrl.planning.plan import Measured, Plan
from asyncrl.planning.setting import Failure, Point, Setting
from asyncrl.reports.page import write_page


def point(policy: str, bound: int, share: float, *, sync: int = 1, lost: float = 0.0) -> Point:
    setting = Setting(policy, bound, 64, 8, 4, sync)  # type: ignore[arg-type]
    return Point(
        setting,
        40 * share,
        share,
        0.01,
        staleness_mean=0.8 * bound / sync,
        staleness_worst=bound * (3 if policy == "pace" else 1),
        lost=lost,
        step_s=2.0,
        binds="staleness",
        why="The staleness bound held rollouts back 40% of the time <b>and</b> that is </script> all.",
    )


@pytest.fixture
def plan() -> Plan:
    base = Config(model="m")
    modelled = described(base, Description(rollout="exponential(mean=2s)", step="2s"), 4)
    points = [point("wait", bound, share) for bound, share in ((0, 0.2), (1, 0.5), (2, 0.7), (4, 0.96), (8, 0.96))]
    points += [point("pace", bound, share) for bound, share in ((0, 0.2), (1, 0.7), (2, 0.9), (4, 1.0))]
    points += [point("mask", 2, 0.8, lost=0.1), point("wait", 4, 0.9, sync=2)]
    failed = Failure(Setting("drop", 1, 64, 8, 4, 1), "5 rollouts in a row failed")
    found = Search(
        point("wait", 4, 0.6), points, [(16, 10.0), (32, 30.0), (64, 40.0)], 40.0, {"it cannot be": 2}, [failed]
    )
    return Plan("runs/x", base, modelled, found, recommend(points), Measured(24.0, 3.0, 50), ("How sure: not very.",))


def test_a_model_that_misses_its_own_run_says_so(plan: Plan) -> None:
    assert "far apart" not in (plan.agreement() or "")
    missed = replace(plan, measured=Measured(16.0, 3.0, 50))
    assert "the run had 16 (+50%) and 3.0. They are far apart" in (missed.agreement() or "")
    assert not missed.agrees


@pytest.mark.parametrize(("width", "dark"), [(400, True), (1400, False)])
def test_the_page_opens_without_a_network_and_draws_everything(
    plan: Plan, tmp_path: Path, open_page: Callable[..., Any], width: int, dark: bool
) -> None:
    write_page(tmp_path / "tune.html", frontier_page(plan))
    tab = open_page(tmp_path / "tune.html", width=width, dark=dark)
    traces = tab.traces()
    assert {name: traces[name] for name in ("block-frontier-mean", "block-frontier-worst", "block-windows")} == {
        "block-frontier-mean": 6,  # wait, pace, mask, the other interval, the recommended one, the config's
        "block-frontier-worst": 6,
        "block-windows": 1,
    }
    assert (tab.requests, tab.errors) == ([], [])
    assert tab.overflow() <= 0
    assert tab.overlaps() == []
    text = tab.page.inner_text("main")
    for said in ("wait 4", "How sure: not very.", "5 rollouts in a row failed", "it cannot be", "the run had 24"):
        assert said in text
    rows = tab.page.evaluate("document.querySelectorAll('#block-points tbody tr').length")
    assert rows == 1 + len(plan.search.points)
    texts = tab.page.evaluate(
        "[...document.querySelectorAll('#block-frontier-mean .textpoint')].map(n => n.textContent).filter(Boolean)"
    )
    assert "4-8" in texts or "4" in texts
    assert texts.count("0") == 1, "bounds that lie on each other are written once"


def test_what_to_change() -> None:
    base = Config(model="m")
    found = changes(base, Setting("mask", 2, 64, 8, 4, 2))
    assert ("staleness.on_stale", "train", "mask") in found
    assert ("publish.weight_sync_interval", "1", "2") in found
    assert ("concurrency.max_window", "4096", "64") in found
    assert changes(base, Setting.of(base)) == []
