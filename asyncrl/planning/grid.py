"""Which settings to try: in stages, since most of a blind product would tell nothing.

1. *Window*, with no bound on staleness, so that nothing else holds rollouts back: the smallest one that is as fast as
   any. More slots than that only make rollouts, and so tokens, older. Its rate is the ideal one.
2. *Staleness and policy* in that window, all of them together.
3. *Sync interval*, where hot-loads cost time at the setting that the first two recommend.

An axis that the user gives is tried as given, with everything else. Batch and group are varied only if they are given:
they change what is learned from, so speed alone cannot choose them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Protocol

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.planning.advice import recommend
from asyncrl.planning.setting import Failure, Point, Policy, Setting

MAX_STALENESS = (0, 1, 2, 4, 8, 16)
POLICIES: tuple[Policy, ...] = ("wait", "pace", "mask")
AS_FAST = 0.98
"""Share of the best rate from which a window counts as saturated."""
SMALLEST_WINDOW = 1 / 64
"""Of the rollouts that the staleness budget lets be under way: the first window that is tried."""
HOT_LOADS_COST = 0.02
"""Share of the time that hot-loads must cost before other sync intervals are tried."""
SYNC = (2, 4)
MOST = 2000
"""Settings. Nobody reads more, and each takes about a second."""


class Oracle(Protocol):
    """Predicts settings, in their order."""

    def ideals(self, settings: Sequence[Setting]) -> list[float]:
        """Samples/s without a bound on staleness; 0 where the run would end early."""
        ...

    def points(self, settings: Sequence[Setting], ideal: float) -> list[Point | Failure]: ...


@dataclass(frozen=True, slots=True)
class Axes:
    """What the user wants to be tried. An empty axis is searched, or left as the config has it."""

    max_staleness: tuple[int, ...] = ()
    policy: tuple[Policy, ...] = ()
    window: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    sync: tuple[int, ...] = ()


@dataclass(slots=True)
class Search:
    """What was tried, and what came of it."""

    now: Point | None = None
    """The config as it is. None: the run would end early."""
    points: list[Point] = field(default_factory=list)
    """All others, in the order in which they were tried."""
    windows: list[tuple[int, float]] = field(default_factory=list)
    """Windows, and samples/s in them without a bound on staleness."""
    ideal: float = 0.0
    """Samples/s: the best of them."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Settings that cannot work, by the reason."""
    failures: list[Failure] = field(default_factory=list)
    """Those that could begin, and would end early."""


def search(base: Config, axes: Axes, oracle: Oracle, *, give: float, worst: float) -> Search:
    """Try settings around `base`. `give` and `worst` are those of `recommend`.

    Raises:
        ConfigError: too many settings are asked for, or none of them can work.
    """
    found, here = Search(), Setting.of(base)
    grid = _grid(base, axes, found)
    windows = _windows(base, axes, grid, oracle, found)
    settings = [setting.but(window=window) for window in windows for setting in grid]
    now, *rest = oracle.points([here, *settings], found.ideal)
    found.now = now if isinstance(now, Point) else None
    _keep(found, rest)
    if not axes.window:
        found.points = [_saturated(found, point) for point in found.points]
    if isinstance(now, Failure):
        found.failures.insert(0, now)
    if not found.points:
        raise ConfigError(f"every setting that was tried would end the run early. {found.failures[0].why}")
    if not axes.sync and here.sync_interval == 1:
        _keep(found, oracle.points(_other_intervals(base, found, give, worst), found.ideal))
    _rescale(found)
    return found


def _keep(found: Search, answers: Iterable[Point | Failure]) -> None:
    for answer in answers:
        if isinstance(answer, Point):
            found.points.append(answer)
        else:
            found.failures.append(answer)


def _grid(base: Config, axes: Axes, found: Search) -> list[Setting]:
    """All that is asked for, but for the window."""
    here = Setting.of(base)
    wanted = list(
        product(
            axes.max_staleness or MAX_STALENESS,
            axes.policy or POLICIES,
            axes.batch or (here.groups_per_step,),
            axes.group or (here.group_size,),
            axes.sync or (here.sync_interval,),
        )
    )
    count = len(wanted) * max(1, len(axes.window))
    if count > MOST:
        raise ConfigError(
            f"{count:,} settings are asked for, and at most {MOST:,} can be tried. Give fewer values for "
            "--max-staleness, --policy, --window, --batch, --group or --sync."
        )
    settings = (Setting(policy, bound, here.window, batch, size, sync) for bound, policy, batch, size, sync in wanted)
    grid = _possible(base, settings, found)
    if not grid:
        raise ConfigError("none of these settings can work.\n" + "\n".join(found.left_out))
    return grid


def _windows(base: Config, axes: Axes, grid: Sequence[Setting], oracle: Oracle, found: Search) -> Sequence[int]:
    """The windows to use, and the ideal rate."""
    hungriest = max(grid, key=lambda setting: setting.demand)
    windows = list(axes.window) or windows_to_try(base, hungriest.demand)
    rates = oracle.ideals([hungriest.but(window=window) for window in windows])
    found.windows, found.ideal = list(zip(windows, rates, strict=True)), max(rates)
    if not found.ideal:
        (failure,) = oracle.points([hungriest.but(window=windows[0])], 1.0)
        why = failure.why if isinstance(failure, Failure) else ""
        raise ConfigError(f"every window that was tried would end the run early. {why}")
    if axes.window:
        return axes.window
    return [min(window for window, rate in found.windows if rate >= AS_FAST * found.ideal)]


def windows_to_try(base: Config, demand: int) -> list[int]:
    """Doubling up to what the staleness budget can use, or up to the `max_window` that the user has set."""
    default = type(base.concurrency)().max_window
    limit = base.concurrency.max_window if base.concurrency.max_window != default else demand
    most = max(1, min(limit, demand))
    windows = [most]
    while windows[-1] > max(1.0, most * SMALLEST_WINDOW):
        windows.append(-(-windows[-1] // 2))
    return windows[::-1]


def _saturated(found: Search, point: Point) -> Point:
    """Where more slots were tried and brought nothing, full slots are not what limits: they share the sampler."""
    if point.binds != "window" or point.setting.window == found.windows[-1][0]:
        return point
    waits = f"The trainer waited {point.wait_share:.0%} of the time for rollouts"
    why = f"{waits}: the sampler is as fast as it gets with {point.setting.window} rollouts at once."
    return replace(point, binds="sampler", why=why)


def _other_intervals(base: Config, found: Search, give: float, worst: float) -> list[Setting]:
    """The settings near the recommended one with longer sync intervals, if hot-loads cost time there."""
    advice = recommend(found.points, give=give, worst=worst)
    if advice.point.publish_share < HOT_LOADS_COST:
        return []
    near = [point.setting for point in (advice.point, advice.faster) if point is not None]
    wanted = [setting.but(sync_interval=interval) for setting in dict.fromkeys(near) for interval in SYNC]
    return _possible(base, wanted, Search())


def _possible(base: Config, settings: Iterable[Setting], found: Search) -> list[Setting]:
    """Those that a config can have."""
    possible = []
    for setting in settings:
        try:
            setting.config(base)
        except ConfigError as error:
            found.left_out[str(error)] = found.left_out.get(str(error), 0) + 1
        else:
            possible.append(setting)
    return list(dict.fromkeys(possible))


def _rescale(found: Search) -> None:
    """Where trainer and sampler share a device, a bound can be faster than none. Then its rate is the ideal one."""
    now = [found.now] if found.now is not None else []
    found.ideal = max(found.ideal, max(point.samples_per_s for point in [*now, *found.points]))
    found.now = found.now.against(found.ideal) if found.now is not None else None
    found.points = [point.against(found.ideal) for point in found.points]
