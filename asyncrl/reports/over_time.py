"""Curves against the clock: what a run costs, and what its rollouts took."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncrl.reports.curves import SMOOTHED_FROM, Entry, filled, moving_mean, ratio
from asyncrl.reports.page import Axis, Block, Kind, Series, chart
from asyncrl.reports.run_data import RunData
from asyncrl.storage.timeline import ATTEMPT_TYPE, DONE

WINDOWS, ROLLOUTS_PER_WINDOW = 100, 20
"""Most points of a curve over time, and fewest rollouts behind each, where it is made from rollouts."""


def reward_over_time(entries: Sequence[Entry]) -> list[Block]:
    """What a user pays for is time: the curve by which settings are compared."""
    longest = max((float(np.nanmax(run.steps["time_s"], initial=0.0)) for e in entries for run in e.runs), default=0.0)
    x, scale = time_axis(longest)
    series = []
    for entry in entries:
        runs = [run for run in entry.runs if len(run.steps) and np.isfinite(run.steps["time_s"]).all()]
        if not runs:
            continue
        ends = [float(run.steps["time_s"][-1]) for run in runs]
        times = (
            np.linspace(0, min(ends), WINDOWS) if len(runs) > 1 or entry.steps > WINDOWS else runs[0].steps["time_s"]
        )
        rows = np.array([_at(run, times) for run in runs])  # [runs, T]
        low, high = (rows.min(axis=0), rows.max(axis=0)) if len(runs) > 1 else (None, None)
        name = entry.name if len(entries) > 1 else "all rollouts"
        kind: Kind = "line+points" if len(times) <= 3 else "line"
        series.append(Series(name, times / scale, rows.mean(axis=0), kind, entry.color, low=low, high=high))
    about = "Smoothed." if max((entry.steps for entry in entries), default=0) >= SMOOTHED_FROM else ""
    return filled(chart("reward-time", "Reward over time", x=x, y=Axis("reward"), series=series, about=about))


def _at(run: RunData, times: np.ndarray) -> np.ndarray:
    rewards = run.steps["reward_mean"]
    known = np.isfinite(rewards)
    if not known.any():
        return np.full(len(times), np.nan)
    rewards = moving_mean(rewards[known]) if known.sum() >= SMOOTHED_FROM else rewards[known]
    found: np.ndarray = np.interp(times, run.steps["time_s"][known], rewards)
    return found


def rollout_time(entries: Sequence[Entry]) -> list[Block]:
    """From the timeline: how long the rollouts that ended at a time had waited, drawn, and done other things."""
    found = [_attempts(entry) for entry in entries]
    longest = max((float(attempts["ended"].max(initial=0.0)) for attempts in found), default=0.0)
    if not longest:
        return []
    x, scale = time_axis(longest)
    series = []
    for entry, attempts in zip(entries, found, strict=True):
        whole = attempts["ended"] - attempts["began"]
        parts = {entry.name: whole}
        if len(entries) == 1:
            queued, drawn = attempts["began"] - attempts["admitted"], attempts["model_s"]
            parts = {"waiting for a slot": queued, "in model calls": drawn, "in tools and your code": whole - drawn}
        count = min(WINDOWS, max(1, len(attempts) // ROLLOUTS_PER_WINDOW))
        place = np.minimum((attempts["ended"] / longest * count).astype(np.int64), count - 1)
        at = (np.arange(count) + 0.5) * longest / count / scale
        for number, (name, seconds) in enumerate(parts.items()):
            mean = ratio(np.bincount(place, seconds, count), np.bincount(place, minlength=count))
            series.append(Series(name, at, mean, color=entry.color if len(entries) > 1 else number))
    about = "Mean of those that ended at a time. Calls beside each other count each, so the rest may be below 0."
    y = Axis("mean duration", "s")
    return filled(chart("rollout-time", "How long a rollout took", x=x, y=y, series=series, about=about))


def _attempts(entry: Entry) -> np.ndarray:
    """Training rollouts that gave a sample, of all runs; without those that a resume took back."""
    parts = [np.zeros(0, ATTEMPT_TYPE)]
    for run in entry.runs:
        for life in run.timeline:
            chosen = (life.attempts["evaluation"] == 0) & (life.attempts["outcome"] == DONE)
            if run.ledger:
                chosen &= run.fates.of(life.number, life.attempts["sequence"]) >= 0
            parts.append(life.attempts[chosen])
    return np.concatenate(parts)


def time_axis(seconds: float) -> tuple[Axis, float]:
    """For a span of so many seconds; and seconds of its unit."""
    unit, scale = ("s", 1.0) if seconds < 300 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)
    return Axis("time since the run began", unit, low=0.0), scale
