"""A plan as one HTML page: the frontier, the recommended setting, and everything that was tried."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from textwrap import wrap

from asyncrl.config import Config
from asyncrl.planning.plan import FIXED, Plan, rate
from asyncrl.planning.setting import Point, Setting
from asyncrl.reports.page import Axis, Block, Column, Section, Series, Tile, chart, model, note, page, table, tiles
from asyncrl.reports.run_data import flat

MOST_LINES = 12
ROOM = 1.08
"""Of the axes, beyond the outermost point: for what is written beside it."""
SETTINGS = {
    "policy": "policy",
    "max_staleness": "max_staleness",
    "window": "window",
    "groups_per_step": "groups a step",
    "group_size": "rollouts a group",
    "sync_interval": "sync interval",
}


def frontier_page(plan: Plan) -> str:
    """The HTML. Raises `ConfigError` where plotly is not installed."""
    sections = [
        Section("Recommendation", list(_recommendation(plan))),
        Section(
            "Frontier", list(_frontiers(plan)), about="Up is faster, left is fresher. Hover a point for its numbers."
        ),
        Section("Windows and intervals", list(_sweeps(plan))),
        Section("All settings", [_all(plan)]),
        Section("What was simulated", list(_assumptions(plan))),
    ]
    shown = model(f"Plan for {plan.target}", [section for section in sections if section.blocks])
    return page(shown)


def _recommendation(plan: Plan) -> Iterator[Block]:
    point = plan.advice.point
    yield tiles(
        "recommended",
        [
            Tile("recommended", point.setting.name, "policy and `max_staleness`", "good"),
            Tile("of the ideal rate", f"{point.share:.0%}", f"{rate(point.samples_per_s)} samples/s"),
            Tile("mean staleness", f"{point.staleness_mean:.1f}", "steps, over the tokens that are trained"),
            Tile("worst staleness", f"{point.staleness_worst:.0f}", "steps, of the oldest token"),
            *(
                [Tile("tokens lost", f"{point.lost:.0%}", "drawn, never trained", "warn")]
                if point.lost >= 0.005
                else []
            ),
            *_now(plan),
        ],
    )
    for place, reason in enumerate(plan.advice.reasons):
        yield note(f"reason-{place}", reason, "good" if place == 0 else "plain")
    rows = [(f"`{name}`", old, new) for name, old, new in changes(plan.base, point.setting)]
    if rows:
        columns = [Column("setting", number=False), Column("now"), Column("recommended")]
        about = FIXED if plan.fixes_window else ""
        yield table("changes", "What to change in the config", columns, rows, about=about)
    else:
        yield note("changes", "The config has it already.")


def _now(plan: Plan) -> list[Tile]:
    if plan.now is None:
        return [Tile("as configured", "ends early", "What it would say is below.", "warn")]
    return [Tile("as configured", f"{plan.now.share:.0%}", f"{rate(plan.now.samples_per_s)} samples/s")]


def changes(base: Config, setting: Setting) -> list[tuple[str, str, str]]:
    """(`section.field`, as it is, as it should be) of everything that differs."""
    before, after = (dict(flat(config.model_dump())) for config in (base, setting.config(base)))
    return [(name, f"{old}", f"{after[name]}") for name, old in before.items() if old != after[name]]


def _frontiers(plan: Plan) -> Iterator[Block]:
    about = "One line per policy, beside its points their `max_staleness`. Bars: the uncertainty of the simulation."
    yield _frontier(plan, "mean", "Rate against mean staleness", about)
    about = "The same points, by the oldest token that is trained."
    yield _frontier(plan, "worst", "Rate against worst staleness", about)


def _frontier(plan: Plan, which: str, title: str, about: str) -> Block:
    def stale(point: Point) -> float:
        return point.staleness_mean if which == "mean" else point.staleness_worst

    lines = _lines(plan)
    texts = _Texts(1.0 + max(stale(point) for point in plan.search.points))
    series = [_line(name, points, stale, place, texts) for place, (name, points) in enumerate(lines.items())]
    now = [plan.now] if plan.now is not None else []
    for name, stars, color in (("recommended", [plan.advice.point], len(lines)), ("as configured", now, 7)):
        x, y = [stale(point) for point in stars], [point.share for point in stars]
        series.append(Series(name, x, y, "points", color=color, labels=list(map(hover, stars)), big=True))
    shown = [point for points in lines.values() for point in points] + now
    most = max(1.0, *map(stale, shown))  # a little is left before 0, for what is written beside a point there
    return chart(
        f"frontier-{which}",
        title,
        x=Axis(f"{which} staleness", "optimizer steps", low=-0.04 * most, high=ROOM * most),
        y=_shares(shown),
        series=series,
        about=about,
    )


def _line(name: str, points: Sequence[Point], stale: Callable[[Point], float], color: int, texts: _Texts) -> Series:
    return Series(
        name,
        [stale(point) for point in points],
        [point.share for point in points],
        kind="line+points",
        color=color,
        low=[point.share - 2 * point.error for point in points],
        high=[point.share + 2 * point.error for point in points],
        labels=[hover(point) for point in points],
        texts=[texts.at(stale(point), point.share, text) for point, text in zip(points, _bounds(points), strict=True)],
    )


class _Texts:
    """What is written on a chart: nothing over something else."""

    def __init__(self, width: float) -> None:
        self._width = width
        self._written: list[tuple[float, float]] = []

    def at(self, x: float, y: float, text: str) -> str:
        """The text, or nothing where its place is taken. `x` in steps, `y` in shares."""
        near = any(abs(x - other) < 0.03 * self._width and abs(y - above) < 0.06 for other, above in self._written)
        if near or not text:
            return ""
        self._written.append((x, y))
        return text


def _bounds(points: Sequence[Point]) -> list[str]:
    """What is written beside the points of a line: where larger bounds change nothing, `4-16` at the first of them."""
    texts = []
    for place, point in enumerate(points):
        bound = point.setting.max_staleness
        if place and _alike(points[place - 1], point):
            texts.append("")
            continue
        last = bound
        for before, after in pairwise(points[place:]):
            if not _alike(before, after):
                break
            last = after.setting.max_staleness
        texts.append(str(bound) if last == bound else f"{bound}-{last}")
    return texts


def _alike(point: Point, other: Point) -> bool:
    return abs(point.share - other.share) < 0.01 and abs(point.staleness_mean - other.staleness_mean) < 0.05


def _shares(points: Sequence[Point]) -> Axis:
    return Axis("of the ideal rate", low=0.0, high=ROOM * max(point.share for point in points), share=True)


def _lines(plan: Plan) -> dict[str, list[Point]]:
    """A line per policy, and per value of what else varies: that of the recommended setting alone, if they are many."""
    extra = [name for name in SETTINGS if name not in ("policy", "max_staleness") and plan.varies(name)]
    here = Setting.of(plan.base)

    def rest(point: Point) -> tuple[object, ...]:
        return tuple(getattr(point.setting, name) for name in extra)

    lines: dict[str, list[Point]] = {}
    keys = {(point.setting.policy, rest(point)) for point in plan.search.points}
    for point in sorted(plan.search.points, key=lambda point: point.setting.max_staleness):
        if len(keys) > MOST_LINES and rest(point) != rest(plan.advice.point):
            continue
        told = ", ".join(
            f"{SETTINGS[name]} {value}"
            for name, value in zip(extra, rest(point), strict=True)
            if name == "window" or value != getattr(here, name)
        )
        lines.setdefault(f"{point.setting.policy}, {told}" if told else point.setting.policy, []).append(point)
    order = list(dict.fromkeys(point.setting.policy for point in plan.search.points))
    return dict(sorted(lines.items(), key=lambda item: order.index(item[1][0].setting.policy)))


def hover(point: Point) -> str:
    """All that is known of a point."""
    setting = point.setting
    lines = [
        f"{setting.policy}, max_staleness {setting.max_staleness}",
        f"{rate(point.samples_per_s)} samples/s, a step takes {point.step_s:.3g} s",
        f"staleness mean {point.staleness_mean:.2f}, worst {point.staleness_worst:.0f} steps",
        *wrap(point.why, 64),
        f"window {setting.window or 'adaptive'}, {setting.groups_per_step} groups of {setting.group_size}, "
        f"sync interval {setting.sync_interval}",
    ]
    if point.lost >= 0.005:
        lines.append(f"tokens lost {point.lost:.0%}")
    return "\n".join(lines)


def _sweeps(plan: Plan) -> Iterator[Block]:
    windows = plan.search.windows
    if len(windows) > 1:
        yield chart(
            "windows",
            "Rate without a bound on staleness, by window",
            x=Axis("window", "rollouts at once", names=True),
            y=Axis("rate", "samples/s", low=0.0, high=ROOM * plan.search.ideal),
            series=[Series("rate", [f"{w:,}" for w, _ in windows], [found for _, found in windows], "line+points")],
            about="The smallest window that is nearly as fast as any is taken: more slots only make tokens older."
            + (" Where the rate is 0 the run would end early." if not all(found for _, found in windows) else ""),
        )
    for name in ("window", "sync_interval", "groups_per_step", "group_size"):
        if plan.varies(name):
            yield _sweep(plan, name)


def _sweep(plan: Plan, name: str) -> Block:
    """The share by one setting: a line for each bound of the recommended policy that was tried with several values."""
    advised = plan.advice.point.setting
    others = [other for other in SETTINGS if other not in (name, "max_staleness")]
    alike = [
        point
        for point in plan.search.points
        if all(getattr(point.setting, other) == getattr(advised, other) for other in others)
    ]
    bounds = sorted({point.setting.max_staleness for point in alike})
    series = []
    for place, bound in enumerate(bounds):
        points = sorted(
            (point for point in alike if point.setting.max_staleness == bound),
            key=lambda point: getattr(point.setting, name) or 0,
        )
        if len(points) > 1 or len(bounds) == 1:
            series.append(
                Series(
                    f"max_staleness {bound}",
                    [f"{getattr(point.setting, name)}" for point in points],
                    [point.share for point in points],
                    kind="line+points",
                    shade=(place + 0.5) / len(bounds),
                    labels=[hover(point) for point in points],
                )
            )
    title = f"Rate by {SETTINGS[name]}, with {advised.policy}"
    return chart(f"by-{name}", title, x=Axis(SETTINGS[name], names=True), y=_shares(alike), series=series)


def _all(plan: Plan) -> Block:
    shown = [name for name in SETTINGS if name in ("policy", "max_staleness", "window") or plan.varies(name)]
    columns = [
        Column("on the frontier", number=False),
        Column("policy", number=False),
        *(Column(SETTINGS[name]) for name in shown if name != "policy"),
        Column("rate", "samples/s"),
        Column("of ideal", "%"),
        Column("± of it", "%"),
        Column("mean staleness", "steps"),
        Column("worst", "steps"),
        Column("trainer waits", "%"),
        Column("tokens lost", "%"),
        Column("limited by", number=False),
    ]
    by_mean, by_worst = plan.by_mean, plan.by_worst

    def row(point: Point, mark: str) -> tuple[object, ...]:
        setting = point.setting
        return (
            mark,
            *(getattr(setting, name) if getattr(setting, name) is not None else "adaptive" for name in shown),
            point.samples_per_s,
            100 * point.share,
            200 * point.error,
            point.staleness_mean,
            point.staleness_worst,
            100 * point.wait_share,
            100 * point.lost,
            point.binds,
        )

    def mark(point: Point) -> str:
        marks = [name for name, edge in (("mean", by_mean), ("worst", by_worst)) if point in edge]
        return ", ".join(["recommended"] * (point is plan.advice.point) + marks)

    now = [row(plan.now, "as configured")] if plan.now is not None else []
    rows = [*now, *(row(point, mark(point)) for point in plan.ordered())]
    return table("points", "Everything that was tried", columns, rows, about="A click on a title sorts.")


def _assumptions(plan: Plan) -> Iterator[Block]:
    columns = [Column("what", number=False), Column("how", number=False)]
    yield table("said", "What it starts from", columns, plan.modelled.said)
    if (agreement := plan.agreement()) is not None:
        yield note("agreement", agreement, "plain" if plan.agrees else "warn")
    for place, text in enumerate(plan.notes):
        yield note(f"note-{place}", text, "warn")
    yield note(
        "model",
        "The scheduler, the queue, the staleness budget and the training loop are the real ones, in virtual time; how "
        "long the sampler, the tools and the trainer take is modelled. What staleness does to learning is not: "
        "see docs/staleness.md.",
    )
    for place, trouble in enumerate(plan.troubles()):
        yield note(f"trouble-{place}", trouble, "warn")
