"""Metrics as curves: of one run, or of several with other seeds as one, in as many points as a screen shows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncrl.reports.page import Axis, Block, Kind, Series, chart
from asyncrl.reports.run_data import Records, RunData

MOST_POINTS = 500
"""Of one curve. A longer run is cut into so many bins of equally many steps."""
SMOOTHED_FROM, SMOOTHED_OVER = 30, 20
"""Points from which a noisy curve gets a moving mean, and the part of them that it is over."""
STEP = Axis("optimizer step")

How = Literal["mean", "max"]
Row = Callable[[Records], np.ndarray]
"""Records -> a value for each [N]."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One colour of the page: a run, or runs that differ in their seed alone."""

    name: str
    color: int
    runs: Sequence[RunData]

    @property
    def steps(self) -> int:
        return max((len(run.steps) for run in self.runs), default=0)


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric of an entry: arrays [P], `low` and `high` are the ends of a band."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A line of a chart: what it is called there, and how it is made from step records."""

    name: str
    row: Row
    how: How = "mean"
    """What stands for the steps of a bin."""


@dataclass(frozen=True, slots=True)
class Curves:
    """Makes the charts over steps of a page, alike for one entry and for several.

    One entry: each line has a colour. Several: each entry has, and the lines of a chart differ in their dashes.
    """

    entries: Sequence[Entry]

    @property
    def bin_steps(self) -> int:
        longest = max((entry.steps for entry in self.entries), default=0)
        return max(1, -(-longest // MOST_POINTS))

    @property
    def several(self) -> bool:
        return len(self.entries) > 1

    def chart(
        self, key: str, title: str, lines: Sequence[Wanted], y: Axis, *, about: str = "", smooth: bool = False
    ) -> list[Block]:
        """A chart of `lines` over optimizer steps; none where no run has any of them."""
        series: list[Series] = []
        for entry in self.entries:
            for place, line in enumerate(lines):
                curve = self.curve(entry, line)
                name = self._name(entry, line, alone=len(lines) == 1)
                color, dash = (entry.color, place) if self.several else (place, 0)
                series += _drawn(name, color, dash, curve, smooth=smooth)
        return filled(chart(key, title, x=STEP, y=y, series=series, about=about))

    def curve(self, entry: Entry, line: Wanted) -> Curve:
        """Binned where the page's longest run has more than `MOST_POINTS` steps."""
        columns = [(run.steps["step"], line.row(run.steps)) for run in entry.runs if len(run.steps)]
        if not columns:
            return Curve(np.zeros(0), np.zeros(0))
        if len(columns) == 1:
            return binned(*columns[0], self.bin_steps, line.how)
        return spread([binned(*column, self.bin_steps, line.how) for column in columns])

    def stacked(
        self,
        key: str,
        title: str,
        parts: Sequence[Wanted],
        y: Axis,
        *,
        about: str = "",
        shades: bool = False,
        weights: Row | None = None,
    ) -> list[Block]:
        """Shares: of one run over its steps, of several one bar each, over the whole run.

        `weights`: of a step in a mean over several; None: all weigh the same.
        """
        runs = [run for entry in self.entries for run in entry.runs]
        series: list[Series] = []
        for place, part in enumerate(parts):
            shade = place / max(1, len(parts) - 1) if shades else None
            if len(runs) == 1:
                curve = _weighted(runs[0].steps, part.row(runs[0].steps), weights, self.bin_steps)
            else:
                shares = [_overall(entry, part, weights) for entry in self.entries]
                curve = Curve(np.array([entry.name for entry in self.entries]), np.array(shares))
            if np.any(np.nan_to_num(curve.y) > 0):
                series.append(Series(part.name, curve.x, curve.y, kind="bars", color=len(series), shade=shade))
        over = STEP if len(runs) == 1 else Axis("run", names=True)
        return filled(chart(key, title, x=over, y=y, series=series, about=about, stacked=True))

    def binning(self) -> str:
        """A sentence on it; empty where each point is a step."""
        if self.bin_steps == 1:
            return ""
        return (
            f"The run is long, so a point stands for {self.bin_steps} steps: their mean, in a band from the lowest to "
            "the highest."
        )

    def _name(self, entry: Entry, line: Wanted, *, alone: bool) -> str:
        if len(self.entries) == 1:
            return line.name
        return entry.name if alone else f"{entry.name} · {line.name}"


def metric(name: str) -> Row:
    """A row that is in the records as it is."""
    return lambda records: records[name]


def per_second(name: str) -> Row:
    """A metric over the seconds of its step; nan where that took none."""
    return lambda records: ratio(records[name], records["step_s"])


def ratio(values: np.ndarray, by: np.ndarray) -> np.ndarray:
    quotients = np.full(len(values), np.nan)
    np.divide(values, by, out=quotients, where=by > 0)
    return quotients


def filled(block: Block) -> list[Block]:
    """The chart, or nothing where it has nothing to show."""
    return [block] if block["series"] else []


def binned(steps: np.ndarray, values: np.ndarray, bin_steps: int, how: How = "mean") -> Curve:
    """Values by step [N] -> a curve of a point for each `bin_steps` steps, in a band from the lowest to the highest."""
    if bin_steps == 1:
        return Curve(steps, values)
    known = np.isfinite(values)
    place = ((steps[known] - 1) // bin_steps).astype(np.int64)
    values, count = values[known], int(place[-1]) + 1 if len(place) else 0
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, place, values)
    np.maximum.at(high, place, values)
    found = np.bincount(place, minlength=count)
    there = found > 0
    mean = ratio(np.bincount(place, values, count), found)
    x = np.arange(count) * bin_steps + (bin_steps + 1) / 2
    y = high if how == "max" else mean
    return Curve(x[there], y[there], low[there], high[there])


def moving_mean(values: np.ndarray) -> np.ndarray:
    """Over a window around each point, cut off at the ends."""
    half = max(2, len(values) // SMOOTHED_OVER // 2)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    ends = np.minimum(np.arange(len(values)) + half + 1, len(values))
    starts = np.maximum(np.arange(len(values)) - half, 0)
    return ratio(sums[ends] - sums[starts], (counts[ends] - counts[starts]).astype(float))


def _drawn(name: str, color: int, dash: int, curve: Curve, *, smooth: bool) -> list[Series]:
    """A short curve is drawn with its points, a noisy one behind its mean."""
    kind: Kind = "line+points" if len(curve.x) <= 3 else "line"
    if smooth and len(curve.x) >= SMOOTHED_FROM:
        if curve.low is not None and curve.high is not None:
            ends = moving_mean(curve.low), moving_mean(curve.high)
            return [
                Series(name, curve.x, moving_mean(curve.y), color=color, dash=dash, low=ends[0], high=ends[1]),
            ]
        raw = Series(name, curve.x, curve.y, color=color, dash=dash, faint=True)
        mean = Series(name, curve.x, moving_mean(curve.y), color=color, dash=dash)
        return [raw, mean]
    return [Series(name, curve.x, curve.y, kind, color, dash=dash, low=curve.low, high=curve.high)]


def spread(curves: Sequence[Curve]) -> Curve:
    """The mean over runs and the band that they span, at each x that any of them has."""
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    rows = np.full((len(curves), len(x)), np.nan)  # [runs, P]
    for row, curve in zip(rows, curves, strict=True):
        row[np.searchsorted(x, curve.x)] = curve.y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an x where no run has a number: it stays nan
        return Curve(x, np.nanmean(rows, axis=0), np.nanmin(rows, axis=0), np.nanmax(rows, axis=0))


def _weighted(steps: Records, values: np.ndarray, weights: Row | None, bin_steps: int) -> Curve:
    """The mean of each bin; without what cannot be told."""
    by = weights(steps) if weights is not None else np.ones(len(steps))
    known = np.isfinite(values) & np.isfinite(by)
    place = ((steps["step"] - 1) // bin_steps).astype(np.int64)
    count = int(place[-1]) + 1 if len(place) else 0
    sums = np.bincount(place, np.where(known, values * by, 0.0), count)
    x = np.arange(count) * bin_steps + (bin_steps + 1) / 2
    return Curve(x, ratio(sums, np.bincount(place, np.where(known, by, 0.0), count)))


def _overall(entry: Entry, part: Wanted, weights: Row | None) -> float:
    """The mean over all steps of all runs of an entry."""
    total = weight = 0.0
    for run in entry.runs:
        values, by = part.row(run.steps), weights(run.steps) if weights is not None else np.ones(len(run.steps))
        known = np.isfinite(values) & np.isfinite(by)
        total, weight = total + float((values * by)[known].sum()), weight + float(by[known].sum())
    return total / weight if weight else float("nan")
