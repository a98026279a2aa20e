from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.planning.advice import BIASED, SAME_SHARE, SAME_STEPS, frontier, recommend
from asyncrl.planning.setting import Point, Policy, Setting


def point(
    policy: Policy,
    bound: int,
    share: float,
    mean: float,
    worst: float | None = None,
    *,
    lost: float = 0.0,
    window: int | None = 64,
    sync: int = 1,
) -> Point:
    return Point(
        setting=Setting(policy, bound, window, 8, 8, sync),
        samples_per_s=100 * share,
        share=share,
        error=0.005,
        staleness_mean=mean,
        staleness_worst=bound if worst is None else worst,
        lost=lost,
    )


DESIGN = [  # a table like that of the design: pace is fast and has stragglers, wait keeps its word
    *(point("wait", bound, share, mean) for bound, share, mean in
      ((0, 0.14, 0.0), (1, 0.26, 0.8), (2, 0.35, 1.6), (4, 0.51, 3.2), (8, 0.75, 6.0), (16, 0.89, 9.0))),
    *(point("pace", bound, share, mean, worst) for bound, share, mean, worst in
      ((1, 0.43, 1.0, 9), (2, 0.67, 1.9, 12), (4, 0.90, 3.4, 18), (8, 0.90, 3.4, 18))),
]  # fmt: skip


def test_the_freshest_that_keeps_nine_tenths_of_the_best_within_the_worst_that_is_borne() -> None:
    advice = recommend(DESIGN, worst=16)
    assert advice.point.setting.name == "wait 16"  # 0.75 is less than 0.9 x 0.89
    advice = recommend(DESIGN, worst=8)
    assert advice.point.setting.name == "wait 8"
    advice = recommend(DESIGN, worst=100)
    assert advice.point.setting.name == "pace 4"  # as fast as wait 16, and much fresher
    advice = recommend(DESIGN, give=0.35, worst=8)
    assert advice.point.setting.name == "wait 4"  # 0.51 is more than 0.65 x 0.75


def test_the_reasons_have_the_numbers_of_what_is_next() -> None:
    advice = recommend(DESIGN, give=0.35, worst=8)
    first, *rest = advice.reasons
    assert "max_staleness 4 with wait gives 51% of the ideal rate" in first
    assert "3.2 steps old on average and 4 at worst" in first
    assert "max_staleness 8 with wait, with 75%" in first
    assert advice.fresher is not None
    assert advice.fresher.setting.name == "wait 2"
    assert advice.faster is not None
    assert advice.faster.setting.name == "wait 8"
    assert rest[0] == ("Fresher: max_staleness 2 with wait gives 35% and lowers the mean staleness from 3.2 to 1.6.")
    assert rest[1] == (
        "Faster: max_staleness 8 with wait gives 75% and raises the mean staleness from 3.2 to 6.0 (1.9 times), the "
        "worst from 4 to 8."
    )
    assert rest[2].startswith("Beyond 8 steps: max_staleness 16 with wait would give 89%")


def test_of_settings_that_are_about_as_fresh_the_hard_bound_that_loses_nothing() -> None:
    masked = point("mask", 2, 0.90, 0.9, lost=0.05)
    paced = point("pace", 2, 0.98, 1.0, 4)
    hard = point("wait", 4, 0.98, 1.0)
    assert recommend([masked, paced, hard]).point is hard
    assert recommend([masked, paced]).point is paced
    assert recommend([masked]).point is masked


def test_bounds_that_never_bind_are_not_recommended() -> None:
    alike = [point("wait", bound, 0.97, 1.0, 3) for bound in (16, 8, 4)]
    assert recommend(alike).point.setting.max_staleness == 4


def test_a_reader_is_told_whose_tokens_are_lost() -> None:
    lossy = point("mask", 2, 0.9, 1.0, lost=BIASED)
    assert any("early ones of the longest rollouts" in reason for reason in recommend([lossy]).reasons)
    slow = recommend([point("drop", 2, 0.9, 1.0, lost=BIASED)])
    assert any("those of the slowest groups" in reason for reason in slow.reasons)
    hardly = point("mask", 2, 0.9, 1.0, lost=BIASED / 2)
    assert not any("longest rollouts" in reason for reason in recommend([hardly]).reasons)


def test_when_nothing_is_fresh_enough_the_nearest_is_named_and_it_is_said() -> None:
    advice = recommend([point("pace", 1, 0.5, 1.0, 12), point("pace", 2, 0.9, 2.0, 20)], worst=8)
    assert advice.point.setting.name == "pace 1"
    assert "No setting that was tried keeps every token within 8 steps" in advice.reasons[0]


def test_a_single_point() -> None:
    advice = recommend([point("wait", 0, 1.0, 0.0)])
    assert (advice.fresher, advice.faster) == (None, None)
    assert advice.reasons[-1] == "Nothing that was tried within that limit is faster."


def test_what_differs_besides_staleness_is_said() -> None:
    advice = recommend([point("wait", 4, 0.9, 3.0), point("wait", 4, 0.99, 4.0, sync=2, window=128)])
    assert "max_staleness 4 with wait, a window of 128, a sync interval of 2 gives 99%" in advice.reasons[1]


def test_the_frontier() -> None:
    assert [p.setting.name for p in frontier(DESIGN)] == ["wait 0", "wait 1", "pace 1", "pace 2", "pace 4"]
    by_worst = [p.setting.name for p in frontier(DESIGN, by_worst=True)]
    assert by_worst == ["wait 0", "wait 1", "wait 2", "wait 4", "wait 8", "wait 16", "pace 4"]


points = st.builds(
    point,
    st.sampled_from(["wait", "pace", "mask"]),
    st.integers(0, 16),
    st.floats(0.01, 1.0),
    st.floats(0.0, 20.0),
    st.integers(0, 60),
    lost=st.sampled_from([0.0, 0.1]),
)


@given(st.lists(points, min_size=1, max_size=30), st.floats(0, 0.5), st.integers(0, 30))
def test_the_rule_holds_for_any_points(found: list[Point], give: float, worst: int) -> None:
    advice = recommend(found, give=give, worst=worst)
    within = [p for p in found if p.staleness_worst <= worst]
    if within:
        best = max(p.share for p in within)
        assert advice.point in within
        assert advice.point.share >= (1 - give) * best
        enough = [p.staleness_mean for p in within if p.share >= (1 - give) * best]
        assert advice.point.staleness_mean <= max(min(enough) + SAME_STEPS, min(enough) * (1 + SAME_SHARE))
    if advice.faster is not None:
        assert advice.faster.share > advice.point.share
    if advice.fresher is not None:
        assert advice.fresher.staleness_mean < advice.point.staleness_mean
    assert all(reason.endswith(".") for reason in advice.reasons)


@given(st.lists(points, min_size=1, max_size=30))
def test_nothing_beats_what_is_on_the_frontier(found: list[Point]) -> None:
    edge = frontier(found)
    for p in edge:
        assert not [
            other
            for other in found
            if round(other.share, 2) > round(p.share, 2)
            and round(other.staleness_mean, 1) <= round(p.staleness_mean, 1)
        ]
    for p in found:
        assert [
            other
            for other in edge
            if round(other.share, 2) >= round(p.share, 2)
            and round(other.staleness_mean, 1) <= round(p.staleness_mean, 1)
        ]
    assert edge[0].share == pytest.approx(min(p.share for p in edge))


def test_settings_that_differ_in_more_than_the_bound_are_named_in_full() -> None:
    points = [
        point("mask", 8, 0.74, 3.0, 8),
        point("mask", 8, 0.78, 3.9, 8, sync=2),
        point("pace", 8, 1.0, 5.0, 21, sync=2),
    ]
    why, *_, beyond = recommend(points).reasons
    assert "max_staleness 8 with mask, a sync interval of 2, with 78%" in why
    assert beyond.startswith("Beyond 8 steps: max_staleness 8 with pace, a sync interval of 2 would give 100%")
