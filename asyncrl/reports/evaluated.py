"""Evaluations as charts: rewards with their intervals, pass@k, and what an evaluation function measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from asyncrl.metrics.names import METRIC_BY_NAME
from asyncrl.reports.curves import Curve, Entry, filled, spread
from asyncrl.reports.page import Axis, Block, Series, chart

VERSION = Axis("optimizer step that was measured")
PASS = "eval_pass_at_"
MOST_NUMBERS = 12
"""Of an evaluation function that are drawn."""


def evaluations(entries: Sequence[Entry]) -> Iterator[Block]:
    """The charts of all evaluations; none where there were none."""
    yield from _rewards(entries)
    names = list(dict.fromkeys(name for entry in entries for run in entry.runs for name in run.evaluations.columns))
    ks = sorted((name for name in names if name.startswith(PASS)), key=_k)
    series = [one for place, name in enumerate(ks) for one in _numbers(entries, name, f"pass@{_k(name)}", place)]
    y = Axis("share of rows", share=True)
    yield from filled(chart("pass-at-k", "pass@k on held-out rows", x=VERSION, y=y, series=series))
    own = [name for name in names if name.startswith("eval_") and name not in METRIC_BY_NAME and name not in ks]
    for name in own[:MOST_NUMBERS]:
        title = name.removeprefix("eval_")
        yield from filled(chart(name, title, x=VERSION, y=Axis(title), series=_numbers(entries, name, title, 0)))


def _numbers(entries: Sequence[Entry], name: str, label: str, place: int) -> list[Series]:
    """One column of the evaluations: a colour for each entry, or of a single one for each column."""
    series = []
    for entry in entries:
        curve = _curve(entry, name)
        called, color, dash = (label, place, 0) if len(entries) == 1 else (entry.name, entry.color, place)
        if len(entries) > 1 and name.startswith(PASS):
            called = f"{entry.name} · {label}"
        series.append(Series(called, curve.x, curve.y, "line+points", color, dash=dash, low=curve.low, high=curve.high))
    return series


def _rewards(entries: Sequence[Entry]) -> list[Block]:
    """With intervals over rows; of runs shown as one, with the span of their means."""
    series = []
    for entry in entries:
        curve = _curve(entry, "eval_reward", "eval_reward_low", "eval_reward_high")
        name = entry.name if len(entries) > 1 else "held-out rows"
        series.append(Series(name, curve.x, curve.y, "line+points", entry.color, low=curve.low, high=curve.high))
    joined = any(len(entry.runs) > 1 for entry in entries)
    about = (
        "The bars are 95 % intervals, over rows." if not joined else "The bars go from the lowest run to the highest."
    )
    y = Axis("mean reward")
    return filled(chart("evaluation", "Reward on held-out rows", x=VERSION, y=y, series=series, about=about))


def _curve(entry: Entry, *names: str) -> Curve:
    """Of a metric by version, and of the ends of its interval where they are named."""
    curves = []
    for run in entry.runs:
        order = np.argsort(run.evaluations["eval_version"], kind="stable")
        curves.append(Curve(*(run.evaluations[name][order] for name in ("eval_version", *names))))
    return curves[0] if len(curves) == 1 else spread(curves)


def _k(name: str) -> int:
    end = name.removeprefix(PASS)
    return int(end) if end.isdecimal() else 0
