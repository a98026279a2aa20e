"""Selection bias: what was trained, against everything that was rolled out.

Rollouts that are slow, long or bad may reach the trainer less often than others: their group is filtered, they time
out, or they are too old. The policy is then trained on a part of what it does. How large a part, and how unlike the
whole, is said here, with intervals; groups are what is counted, because the members of one are alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncrl.reports.page import Axis, Block, Column, Section, Series, chart, note, table
from asyncrl.reports.run_data import FATES, RunData
from asyncrl.storage.timeline import DONE, OUTCOMES

Measure = Literal["tokens", "seconds", "reward"]
ENOUGH_GROUPS = 30
"""Fewer trained groups, or groups, tell nothing about a difference."""
BINS = 30
FEW_BINS = 12
"""Drawn as bars."""
WORTH = 0.1
"""A length or duration that differs by more is worth a warning. That rewards differ is what a filter is for."""
Z = 1.96
"""Standard errors on either side of a 95 % interval."""
UNITS: dict[Measure, str] = {"tokens": "tokens", "seconds": "s", "reward": ""}
TITLES: dict[Measure, str] = {"tokens": "Length", "seconds": "Duration", "reward": "Reward"}


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The training rollouts of runs that have ended, and whose group is settled: arrays [A]."""

    group: np.ndarray
    """A number for each group, over all runs."""
    fate: np.ndarray
    """Of the group: index into `FATES`."""
    outcome: np.ndarray
    """Of the attempt: index into `OUTCOMES`."""
    tokens: np.ndarray
    """nan where the attempt gave no sample."""
    seconds: np.ndarray
    reward: np.ndarray
    """nan where the attempt gave none."""
    open: int
    """Rollouts that have ended, in groups of which is not known yet what becomes of them."""

    @property
    def trained(self) -> np.ndarray:
        chosen: np.ndarray = (self.fate == FATES.index("trained")) & (self.outcome == DONE)
        return chosen

    def __len__(self) -> int:
        return len(self.group)

    def of(self, measure: Measure) -> np.ndarray:
        values: np.ndarray = getattr(self, measure)
        return values


@dataclass(frozen=True, slots=True)
class Difference:
    """How the mean of what was trained differs from the mean of all, with the ends of a 95 % interval.

    For lengths and durations a share (-0.1: a tenth less), for rewards, which may be 0, a plain difference.
    """

    measure: Measure
    all: float
    trained: float
    value: float
    low: float
    high: float
    distance: float
    """Kolmogorov and Smirnov's: the largest difference between the two cumulative distributions, as a share."""

    @property
    def clear(self) -> bool:
        """The interval does not hold 0."""
        return self.low > 0 or self.high < 0


def rollouts_of(runs: Sequence[RunData]) -> Rollouts:
    """Of runs with a timeline and a ledger; what a resume took back is left out."""
    parts: list[np.ndarray] = []  # each [A_life, 6]
    pending = 0
    groups = 0
    for run in runs:
        for life in run.timeline:
            attempts = life.attempts[life.attempts["evaluation"] == 0]
            fates = run.fates.of(life.number, attempts["sequence"])
            settled = (fates >= 0) & (fates != FATES.index("pending"))
            pending += int(np.count_nonzero(fates == FATES.index("pending")))
            attempts, fates = attempts[settled], fates[settled]
            done = attempts["outcome"] == DONE
            tokens = np.where(done, attempts["tokens"], np.nan)
            reward = np.where(done, attempts["reward"], np.nan)
            seconds = attempts["ended"] - attempts["began"]
            parts.append(
                np.column_stack([attempts["sequence"] + groups, fates, attempts["outcome"], tokens, seconds, reward])
            )
            groups += int(attempts["sequence"].max(initial=-1)) + 1
    rows = np.concatenate(parts) if parts else np.zeros((0, 6))
    _, group = np.unique(rows[:, 0], return_inverse=True)
    fate, outcome, tokens, seconds, reward = rows[:, 1:].T
    return Rollouts(group, fate, outcome, tokens, seconds, reward, pending)


def difference(rollouts: Rollouts, measure: Measure) -> Difference | None:
    """None where there is too little to tell.

    The interval is that of a ratio estimator over groups drawn at random (Taylor's linearisation): rollouts of a group
    are not independent, so groups are what is counted.
    """
    values = rollouts.of(measure)
    known = np.isfinite(values)
    values, group, trained = values[known], rollouts.group[known], rollouts.trained[known]
    if min(len(np.unique(group)), len(np.unique(group[trained]))) < ENOUGH_GROUPS:
        return None
    all_mean, trained_mean = float(values.mean()), float(values[trained].mean())
    scale, ratio = (1.0, 1.0) if measure == "reward" else (all_mean, trained_mean / all_mean)
    # What each group adds to the difference of the two means, or to their ratio.
    influence = np.bincount(group, np.where(trained, values - trained_mean, 0.0)) / trained.sum()
    influence -= ratio * np.bincount(group, values - all_mean) / len(values)
    count = len(np.unique(group))
    error = math.sqrt(float(np.square(influence).sum()) * count / (count - 1)) / scale
    value = (trained_mean - all_mean) / scale
    distance = _distance(values, values[trained])
    return Difference(measure, all_mean, trained_mean, value, value - Z * error, value + Z * error, distance)


def sentence(rollouts: Rollouts) -> str:
    """In words, with numbers."""
    if not len(rollouts):
        return "The run kept no timeline, or no group has come to its end: what was selected cannot be told."
    trained = int(rollouts.trained.sum())
    begun = f"Of {len(rollouts):,} rollouts that ended, {trained:,} were trained ({trained / len(rollouts):.0%})."
    found = [difference(rollouts, measure) for measure in TITLES]
    known = [one for one in found if one is not None]
    if not known:
        return f"{begun} That is too few groups to say whether they are like the rest."
    clear = [_in_words(one) for one in known if one.clear]
    if not clear:
        return f"{begun} They do not differ clearly from the rest in length, duration or reward."
    same = [TITLES[one.measure].lower() for one in known if not one.clear]
    rest = f" No clear difference in {' or '.join(same)}." if same else ""
    return f"{begun} Against all of them, those trained {_listed(clear)}.{rest}"


def selection(runs: Sequence[RunData]) -> Section:
    """The section of one entry of a report."""
    rollouts = rollouts_of(runs)
    found = [one for measure in TITLES if (one := difference(rollouts, measure)) is not None]
    biased = any(one.clear and abs(one.value) > WORTH for one in found if one.measure != "reward")
    blocks: list[Block] = [note("selection-sentence", sentence(rollouts), "warn" if biased else "plain")]
    if len(rollouts):
        blocks += [block for measure in TITLES for block in _distribution(rollouts, measure)]
        if found:
            blocks.append(_differences(found))
        blocks.append(_ends(rollouts))
    return Section(
        "Selection",
        blocks,
        "What was trained against all that was rolled out. Rollouts that have not ended are not in it; the longest are "
        "among them, so a run that is cut short looks shorter than it is."
        + (f" {rollouts.open:,} rollouts wait in groups that are not settled yet." if rollouts.open else ""),
    )


def _distribution(rollouts: Rollouts, measure: Measure) -> Iterator[Block]:
    values = rollouts.of(measure)
    known = np.isfinite(values)
    values, trained = values[known], rollouts.trained[known]
    if not trained.any() or values.min() == values.max():
        return
    edges, log = _edges(values)
    middles = np.sqrt(edges[1:] * edges[:-1]) if log else (edges[1:] + edges[:-1]) / 2
    series = []
    for name, some in (("all", values), ("trained", values[trained])):
        share = np.histogram(np.clip(some, edges[0], edges[-1]), edges)[0] / len(some)
        series.append(Series(name, middles, share, kind="bars" if len(middles) <= FEW_BINS else "steps"))
    yield chart(
        f"selection-{measure}",
        f"{TITLES[measure]} of rollouts",
        x=Axis(TITLES[measure].lower(), UNITS[measure], log=log),
        y=Axis("share of rollouts", share=True, low=0.0, high=float(max(max(one.y) for one in series)) * 1.05),
        series=series,
    )


def _edges(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Of the bins, equal on a logarithmic scale where the values span much. What lies far out goes into the last."""
    low, high = np.quantile(values, (0.002, 0.998))
    log = bool(low > 0 and high > 12 * low)
    exact = np.unique(values)
    width = np.diff(exact).min()
    if not log and exact[-1] - exact[0] <= BINS * width * 1.01:  # few values, such as rewards of 0 and 1: a bin each
        return np.arange(exact[0] - width / 2, exact[-1] + width, width), False
    if low == high:
        low, high = values.min(), values.max()
    return (np.geomspace(low, high, BINS + 1), True) if log else (np.linspace(low, high, BINS + 1), False)


def _differences(found: Sequence[Difference]) -> Block:
    columns = [
        *(Column("", number=False), Column("mean of all"), Column("mean of trained"), Column("difference")),
        *(Column("95 % interval"), Column("largest distance")),
    ]
    rows = [
        [
            f"{TITLES[one.measure].lower()}" + (f" ({UNITS[one.measure]})" if UNITS[one.measure] else ""),
            *(one.all, one.trained, _signed(one, one.value)),
            f"{_signed(one, one.low)} to {_signed(one, one.high)}",
            f"{one.distance:.1%}",
        ]
        for one in found
    ]
    about = (
        "The interval counts groups, not rollouts. The largest distance is that between the two cumulative "
        "distributions (Kolmogorov-Smirnov)."
    )
    return table("selection-differences", "Trained against all", columns, rows, about=about)


def _ends(rollouts: Rollouts) -> Block:
    """What became of the rollouts: each attempt has one line that it counts in."""
    rows = []
    for fate, name in enumerate(FATES):
        chosen = (rollouts.fate == fate) & (rollouts.outcome == DONE)
        rows.append([f"group {name}" if name != "trained" else "trained", *_means(rollouts, chosen)])
    for outcome, ended in enumerate(OUTCOMES):
        if outcome != DONE:
            rows.append([ended, *_means(rollouts, rollouts.outcome == outcome)])
    columns = [
        *(Column("what became of them", number=False), Column("rollouts"), Column("share")),
        *(Column("mean length", "tokens"), Column("mean duration", "s"), Column("mean reward")),
    ]
    return table("selection-ends", "What became of the rollouts", columns, [row for row in rows if row[1]])


def _means(rollouts: Rollouts, chosen: np.ndarray) -> list[float | int | str | None]:
    count = int(chosen.sum())
    means = [_mean(rollouts.of(measure)[chosen]) for measure in TITLES]
    return [count, f"{count / len(rollouts):.1%}", *means]


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _distance(values: np.ndarray, others: np.ndarray) -> float:
    values, others = np.sort(values), np.sort(others)
    both = np.concatenate([values, others])
    gaps = np.searchsorted(values, both, "right") / len(values) - np.searchsorted(others, both, "right") / len(others)
    return float(np.abs(gaps).max())


def _in_words(one: Difference) -> str:
    interval = f"{_signed(one, one.low)} to {_signed(one, one.high)}"
    if one.measure == "reward":
        return f"have a mean reward {abs(one.value):.3g} {'higher' if one.value > 0 else 'lower'} ({interval})"
    if one.measure == "tokens":
        return f"are {abs(one.value):.1%} {'longer' if one.value > 0 else 'shorter'} ({interval})"
    return f"took {abs(one.value):.1%} {'more' if one.value > 0 else 'less'} time ({interval})"


def _signed(one: Difference, value: float) -> str:
    return f"{value:+.3g}" if one.measure == "reward" else f"{value:+.1%}"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
