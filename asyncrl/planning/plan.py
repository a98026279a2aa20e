"""What `asyncrl tune` has found out, for the terminal, for a page, and for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from asyncrl.config import Config
from asyncrl.metrics.jsonl import encode
from asyncrl.planning.advice import Advice, frontier
from asyncrl.planning.described import Modelled
from asyncrl.planning.grid import Search
from asyncrl.planning.setting import Point, Setting

AGREE = 0.15
"""Share by which the model may miss the run that it is made of before the reader is warned."""
FIXED = (
    "The window is fixed there, as it was simulated (min_window = max_window). Leave [concurrency] out, and the run "
    "finds its own."
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the run that durations are learned from really did."""

    samples_per_s: float
    staleness_mean: float
    steps: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A question and its answer."""

    target: str
    """The run or config file, as the user named it."""
    base: Config
    modelled: Modelled
    search: Search
    advice: Advice
    measured: Measured | None = None
    notes: tuple[str, ...] = ()
    """What the reader must know before believing it."""

    @property
    def now(self) -> Point | None:
        """The config as it is. None: the run would end early."""
        return self.search.now

    @property
    def toml(self) -> str:
        """To paste into the config. Empty: it is the recommended one already."""
        return self.advice.point.setting.toml(self.base)

    @property
    def fixes_window(self) -> bool:
        """Whether `toml` takes the window away from the run's own controller."""
        return "min_window" in self.toml

    @property
    def by_mean(self) -> list[Point]:
        return frontier(self.search.points)

    @property
    def by_worst(self) -> list[Point]:
        return frontier(self.search.points, by_worst=True)

    def ordered(self) -> list[Point]:
        """All that was tried: by policy, then by bound."""
        policies = list(dict.fromkeys(point.setting.policy for point in self.search.points))
        return sorted(
            self.search.points, key=lambda point: (policies.index(point.setting.policy), _order(point.setting))
        )

    def troubles(self) -> list[str]:
        """What cannot be done, in sentences."""
        told = [f"Left out, {count} x: {reason}" for reason, count in self.search.left_out.items()]
        failures = self.search.failures
        if failures and self.now is None:
            told.append(f"The config as it is would end the run early: {failures[0].why}")
            failures = failures[1:]
        if failures:
            names = ", ".join(dict.fromkeys(failure.setting.name for failure in failures))
            told.append(f"These would end the run early: {names}. The first of them: {failures[0].why}")
        return told

    def varies(self, name: str) -> bool:
        """Whether settings that were tried differ in this."""
        return len({getattr(point.setting, name) for point in self.search.points}) > 1

    def agreement(self) -> str | None:
        """How the model compares with the run that it is made of."""
        if self.measured is None or self.now is None or not self.measured.samples_per_s:
            return None
        found, real = self.now, self.measured
        doubt = (
            ""
            if self.agrees
            else " They are far apart: rollouts or their rewards changed in the course of the run, or the machine had "
            "other work. Trust the order of the rows more than their numbers, or ask again of a steadier run."
        )
        return (
            f"For the run's own setting the model gives {rate(found.samples_per_s)} samples/s and a mean staleness of "
            f"{found.staleness_mean:.1f}; the run had {rate(real.samples_per_s)} ({self._off:+.0%}) and "
            f"{real.staleness_mean:.1f}.{doubt}"
        )

    @property
    def agrees(self) -> bool:
        return abs(self._off) <= AGREE

    @property
    def _off(self) -> float:
        """By which share the model's rate is above the run's own."""
        if self.measured is None or self.now is None or not self.measured.samples_per_s:
            return 0.0
        return self.now.samples_per_s / self.measured.samples_per_s - 1

    def as_json(self) -> dict[str, Any]:
        """Plain values; None for what is not finite."""
        by_mean, by_worst = ({point.setting for point in edge} for edge in (self.by_mean, self.by_worst))

        def told(point: Point | None) -> dict[str, Any] | None:
            if point is None:
                return None
            edges = {"on_frontier": point.setting in by_mean, "on_frontier_by_worst": point.setting in by_worst}
            return {**asdict(point), **edges}

        found = {
            "target": self.target,
            "assumptions": [{"what": what, "how": how} for what, how in self.modelled.said],
            "notes": self.notes,
            "measured": None if self.measured is None else asdict(self.measured),
            "ideal_samples_per_s": self.search.ideal,
            "windows": [{"window": window, "samples_per_s": rate} for window, rate in self.search.windows],
            "now": told(self.search.now),
            "recommended": told(self.advice.point),
            "fresher": told(self.advice.fresher),
            "faster": told(self.advice.faster),
            "reasons": self.advice.reasons,
            "toml": self.toml,
            "points": [told(point) for point in self.search.points],
            "left_out": self.search.left_out,
            "failures": [asdict(failure) for failure in self.search.failures],
        }
        finite: dict[str, Any] = json.loads(encode(found))
        return finite


def _order(setting: Setting) -> tuple[int, ...]:
    window = setting.window or 0
    return (setting.max_staleness, window, setting.groups_per_step, setting.group_size, setting.sync_interval)


def rate(value: float) -> str:
    """Three digits: `3.14`, `31.4`, `3,140`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
