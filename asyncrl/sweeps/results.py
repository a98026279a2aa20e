"""What the runs of a sweep came to: a result for each, and one for each group of repetitions."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.reports.run_data import Records, read_records
from asyncrl.storage.folder import RunFolder

NEARLY = 0.9
"""The reward that runs are timed to: so much of the way from where they began to the best that any of them reached."""
SMOOTH = 20
"""Without evaluations the training reward is a moving mean over this part of the steps."""
FEWEST = 3
"""Evaluations that make a curve."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one run came to. None: it cannot be said."""

    steps: int
    seconds: float
    """Of training."""
    held_out: bool
    """The rewards are those of evaluations; else the training's, before filtering and smoothed."""
    times: tuple[float, ...]
    """s; where the curve of the reward was measured."""
    rewards: tuple[float, ...]
    final: float | None
    best: float | None
    samples_per_s: float | None
    worst_staleness: int | None

    def seconds_to(self, reward: float) -> float | None:
        """Of training, until the reward was at least `reward`; None: never."""
        return next((time for time, found in zip(self.times, self.rewards, strict=True) if found >= reward), None)


def read_result(folder: Path) -> Result:
    """What a run has left, whatever state it is in. Raises `DataError` for a damaged file."""
    files = RunFolder(folder)
    steps, evaluations = read_records(files.metrics), read_records(files.evaluations)
    seconds = float(steps["time_s"][-1]) if len(steps) else 0.0
    times, rewards = _of_evaluations(steps, evaluations)
    held_out = len(rewards) >= FEWEST
    if not held_out:
        times, rewards = _of_training(steps)
    samples, staleness = steps["samples"].sum() if len(steps) else 0.0, steps["staleness_max"]
    final, best = (rewards[-1], max(rewards)) if rewards else (None, None)
    return Result(
        steps=len(steps),
        seconds=seconds,
        held_out=held_out,
        times=tuple(times),
        rewards=tuple(rewards),
        final=final,
        best=best,
        samples_per_s=float(samples) / seconds if seconds else None,
        worst_staleness=int(staleness.max()) if len(staleness) else None,
    )


def _of_evaluations(steps: Records, evaluations: Records) -> tuple[list[float], list[float]]:
    """Seconds of training behind each evaluated version, and what it was worth."""
    known = np.isfinite(evaluations["eval_reward"])
    versions, rewards = evaluations["eval_version"][known], evaluations["eval_reward"][known]
    behind = np.interp(versions, [0.0, *steps["step"]], [0.0, *steps["time_s"]])
    return behind.tolist(), rewards.tolist()


def _of_training(steps: Records) -> tuple[list[float], list[float]]:
    known = np.isfinite(steps["reward_mean"])
    times, rewards = steps["time_s"][known], steps["reward_mean"][known]
    if not len(rewards):
        return [], []
    width = max(1, len(rewards) // SMOOTH)
    means = np.convolve(rewards, np.full(width, 1 / width), mode="valid")
    return times[width - 1 :].tolist(), means.tolist()


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over repetitions."""

    values: tuple[float, ...]

    def __str__(self) -> str:
        """`0.562 ±0.088`, to three digits of the mean; nothing to tell of one or none."""
        if not self.values:
            return "-"
        mean = statistics.fmean(self.values)
        digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 3
        digits = min(digits, 3)
        spread = f" ±{statistics.stdev(self.values):.{digits}f}" if len(self.values) > 1 else ""
        return f"{mean:.{digits}f}{spread}"

    def as_json(self) -> dict[str, Any] | None:
        if not self.values:
            return None
        deviation = statistics.stdev(self.values) if len(self.values) > 1 else None
        return {"mean": statistics.fmean(self.values), "std": deviation, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: int
    """Those with a result; the others say nothing here."""
    final: Spread
    best: Spread
    seconds_to_target: Spread
    """Of those that reached it."""
    reached: int
    samples_per_s: Spread
    worst_staleness: int | None

    def as_json(self) -> dict[str, Any]:
        spreads = ("final", "best", "seconds_to_target", "samples_per_s")
        plain = ("name", "runs", "reached", "worst_staleness")
        return {name: getattr(self, name) for name in plain} | {name: getattr(self, name).as_json() for name in spreads}


def target_of(results: Sequence[Result]) -> float | None:
    """The reward that all are timed to; None where no run got better than it began."""
    curves = [result.rewards for result in results if len(result.rewards) > 1]
    if not curves:
        return None
    began, best = statistics.fmean(curve[0] for curve in curves), max(max(curve) for curve in curves)
    return began + NEARLY * (best - began) if best > began else None


def group_results(results: Mapping[str, Sequence[Result]], target: float | None) -> list[Group]:
    """One `Group` for each name, in their order."""
    return [_group(name, of_group, target) for name, of_group in results.items()]


def _group(name: str, results: Sequence[Result], target: float | None) -> Group:
    def spread(values: Sequence[float | None]) -> Spread:
        return Spread(tuple(value for value in values if value is not None and math.isfinite(value)))

    times = spread([] if target is None else [result.seconds_to(target) for result in results])
    staleness = [result.worst_staleness for result in results if result.worst_staleness is not None]
    return Group(
        name=name,
        runs=len(results),
        final=spread([result.final for result in results]),
        best=spread([result.best for result in results]),
        seconds_to_target=times,
        reached=len(times.values),
        samples_per_s=spread([result.samples_per_s for result in results]),
        worst_staleness=max(staleness, default=None),
    )


def has_finished(folder: Path) -> bool:
    """Whether the run in the folder came to its end: nothing of it is left to train."""
    try:
        summary = json.loads(RunFolder(folder).summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it goes on, was killed, or somebody else wrote it
        return False
    return isinstance(summary, dict) and "error" not in summary and not summary.get("interrupted")
