"""Which setting to take, and why. Pure.

The rule: of the settings whose worst staleness is at most `worst`, the freshest one that keeps `1 - give` of the best
rate among them. Freshest is the least mean staleness of the tokens that are trained; of settings that are about as
fresh, one that loses no tokens, and whose bound is hard, is better.

Speed has an end and staleness has none: each further step of it buys less, and costs the objective as much as the one
before. So one does not ask for the fastest setting, but for the freshest that is nearly as fast. How stale is too stale
is a question about learning, which no simulation answers: docs/staleness.md has what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asyncrl.planning.setting import Point

GIVE = 0.10
"""Share of the best rate that one gives for freshness: the knee of most of these curves lies within it."""
WORST = 8
"""Steps. Published ablations lose no quality up to about here with a corrected objective (docs/staleness.md)."""
SAME_STEPS, SAME_SHARE = 0.2, 0.25
"""Two means that differ by so many steps, or by this share of the smaller one, are about as fresh."""
FASTER = 0.01
"""Of the ideal rate: less is no difference."""
BIASED = 0.05
"""Share of the tokens lost from which the reader is told whose they are."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommendation with its reasons."""

    point: Point
    reasons: tuple[str, ...]
    """Plain sentences."""
    fresher: Point | None
    """The next setting on the frontier that trains on fresher tokens, and is slower."""
    faster: Point | None
    """The next one that is faster, and staler."""


def frontier(points: Sequence[Point], *, by_worst: bool = False) -> list[Point]:
    """The points that no other beats in both rate and staleness, the freshest first, by the digits that are shown.

    `by_worst`: staleness is that of the oldest token, not the mean. Of points that are alike the plainest stays.
    """

    def order(point: Point) -> tuple[float, ...]:
        stale = point.staleness_worst if by_worst else point.staleness_mean
        return (round(stale, 1), -round(point.share, 2), *_plainness(point))

    kept: list[Point] = []
    for point in sorted(points, key=order):
        if not kept or round(point.share, 2) > round(kept[-1].share, 2):
            kept.append(point)
    return kept


def recommend(points: Sequence[Point], *, give: float = GIVE, worst: float = WORST) -> Advice:
    """The setting to take. `points` must not be empty."""
    allowed = [point for point in points if point.staleness_worst <= worst]
    within = bool(allowed)
    allowed = allowed or [min(points, key=lambda point: (point.staleness_worst, -point.share))]
    best = max(allowed, key=lambda point: point.share)
    enough = [point for point in allowed if point.share >= (1 - give) * best.share]
    freshest = min(point.staleness_mean for point in enough)
    as_fresh = max(freshest + SAME_STEPS, freshest * (1 + SAME_SHARE))
    alike = [point for point in enough if point.staleness_mean <= as_fresh]
    chosen = min(alike, key=_plainness)
    edge = [point for point in frontier(allowed) if point is not chosen]
    fresher = max(
        (point for point in edge if point.staleness_mean < min(chosen.staleness_mean - SAME_STEPS, freshest)),
        key=lambda point: point.share,
        default=None,
    )
    faster = min(
        (point for point in edge if point.share > chosen.share + FASTER),
        key=lambda point: point.staleness_mean,
        default=None,
    )
    reasons = [
        _why(chosen, best, give, worst, within),
        *([_biased(chosen)] if chosen.lost >= BIASED else []),
        *([_fresher(fresher, chosen)] if fresher else []),
        *([_faster(faster, chosen)] if faster else ["Nothing that was tried within that limit is faster."]),
        *_beyond(points, chosen, best, worst),
    ]
    return Advice(chosen, tuple(reasons), fresher, faster)


def _plainness(point: Point) -> tuple[float, ...]:
    """Of settings that are as fresh: nothing lost, the hard bound, the lower worst, fewer slots, then the faster."""
    setting = point.setting
    return (
        round(point.lost, 2),
        setting.policy != "wait",
        point.staleness_worst,
        setting.max_staleness,
        setting.sync_interval,
        setting.window or 0,
        -point.share,
    )


def _why(chosen: Point, best: Point, give: float, worst: float, within: bool) -> str:
    says = f"{said(chosen)} gives {chosen.share:.0%} of the ideal rate, {_staleness(chosen)}."
    if not within:
        return (
            f"{says} No setting that was tried keeps every token within {worst:g} steps (--worst); this one comes "
            "nearest."
        )
    if chosen.share >= best.share - FASTER:
        return (
            f"{says} Of the settings that keep every token within {worst:g} steps (--worst) none is faster, and none "
            f"that keeps {1 - give:.0%} of its rate (--give) is clearly fresher."
        )
    return (
        f"{says} None that is clearly fresher keeps {1 - give:.0%} (--give) of the rate of the fastest within "
        f"{worst:g} steps (--worst): {_difference(best, chosen)}, with {best.share:.0%}."
    )


def _biased(chosen: Point) -> str:
    whose = (
        "the early ones of the longest rollouts" if chosen.setting.policy == "mask" else "those of the slowest groups"
    )
    return f"The {chosen.lost:.0%} of the tokens that are lost are {whose}: what is trained leans towards short ones."


def _fresher(other: Point, chosen: Point) -> str:
    return (
        f"Fresher: {_difference(other, chosen)} gives {other.share:.0%} and lowers the mean staleness from "
        f"{chosen.staleness_mean:.1f} to {other.staleness_mean:.1f}."
    )


def _faster(other: Point, chosen: Point) -> str:
    before, after = chosen.staleness_mean, other.staleness_mean
    times = f" ({after / before:.1f} times)" if before >= 0.1 and after >= 1.2 * before else ""
    mean = f"raises the mean staleness from {before:.1f} to {after:.1f}{times}"
    if f"{before:.1f}" == f"{after:.1f}":
        mean = f"moves the mean staleness by less than 0.1 from {before:.1f}"
    old, new = chosen.staleness_worst, other.staleness_worst
    worst = "" if old == new else f", the worst from {old:.0f} to {new:.0f}"
    return f"Faster: {_difference(other, chosen)} gives {other.share:.0%} and {mean}{worst}."


def _beyond(points: Sequence[Point], chosen: Point, best: Point, worst: float) -> list[str]:
    """What the limit on the worst staleness costs, where that is much."""
    most = max(point.share for point in points)
    fastest = min(
        (point for point in points if point.share >= most - FASTER),
        key=lambda point: (point.staleness_worst, point.staleness_mean, *_plainness(point)),
    )
    if fastest.staleness_worst <= worst or fastest.share < best.share + 0.05:
        return []
    return [
        f"Beyond {worst:g} steps: {_difference(fastest, chosen)} would give {fastest.share:.0%}, {_staleness(fastest)}."
        " Whether the objective bears that is for an experiment to show (docs/staleness.md)."
    ]


def said(point: Point) -> str:
    """`max_staleness 4 with wait`."""
    setting = point.setting
    return f"max_staleness {setting.max_staleness} with {setting.policy}"


def _difference(other: Point, chosen: Point) -> str:
    """`other`, with everything in which it differs."""
    there, here = other.setting, chosen.setting
    named = {
        "a window of {}": (there.window, here.window),
        "{} groups a step": (there.groups_per_step, here.groups_per_step),
        "groups of {}": (there.group_size, here.group_size),
        "a sync interval of {}": (there.sync_interval, here.sync_interval),
    }
    extra = [
        text.format(new if new is not None else "the config's") for text, (new, old) in named.items() if new != old
    ]
    return ", ".join([said(other), *extra])


def _staleness(point: Point) -> str:
    lost = f", and {point.lost:.0%} of the tokens are never trained" if point.lost >= 0.005 else ""
    return (
        f"the tokens it trains are {point.staleness_mean:.1f} steps old on average and {point.staleness_worst:.0f} at "
        f"worst{lost}"
    )
