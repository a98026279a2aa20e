"""How fast a machine is, from a run on it: the sampler from its calls, the trainer from its steps.

A call of D tokens takes, of the sampler's working time,

    W = call_s + prompt_s F + D (token_s + (n - 1) running_s)

where F are its fresh prompt tokens and n the requests in its replica, averaged over its tokens; n is known from the
calls themselves, since all are recorded. Working time is the clock's time, less what hot-loads and a trainer on the
same device take away: W = integral of (1 - pause_share h) / (1 + slowdown u) over the call, h and u being 1 while a
hot-load, or the trainer, is at work. Of these two numbers those are taken under which calls agree best; the others
follow by least squares. What the prompts of others cost a call is in its n, and so in `running_s`: the part that
`prompt_s` explains is taken out of it, so that the engine's work stays what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from asyncrl.errors import DataError
from asyncrl.metrics.report import PARTS
from asyncrl.planning.sampler_model import SamplerModel
from asyncrl.planning.trainer_model import TrainerModel
from asyncrl.planning.workload import Workload
from asyncrl.reports.run_data import RunData
from asyncrl.storage.timeline import LifeTimes

LEAST_STEPS = 5
LEAST_CALLS = 20
FIRST_STEPS = 2
"""The first ones are slower than all others, with cold caches and threads: left out where there are enough others."""
MOST_CALLS = 50_000
ROUNDS = 4
"""Of n and t(n), each of which is needed for the other."""
SLOWDOWNS = np.concatenate([[0.0], np.geomspace(0.05, 4.0, 20)])
PAUSES = np.linspace(0.0, 1.0, 6)
WORTH = 0.02
"""Share by which the spread of the residuals must fall before a slowdown or a pause is believed."""
ON_CPU, ELSEWHERE = 64, 256
"""Rows that the embedded sampler decodes at once where `sampler.max_running` does not say."""
LEAST_TOKEN_S = 1e-6
"""Where all answers are of one length, the price of a token can all be found in that of a call."""
MOST_HOT_LOADS = 500
TRAINING = ("forward_backward", "optimizer")
"""Spans in which the trainer computes."""


@dataclass(frozen=True, slots=True)
class _Clock:
    """Integrals over the time of a life of what is constant between `edges` [E + 1]; all arrays are [E]."""

    edges: np.ndarray
    seconds: np.ndarray
    running: np.ndarray
    """Calls under way."""
    training: np.ndarray
    """1 while the trainer computes."""
    loading: np.ndarray
    """1 while a hot-load is under way."""

    @classmethod
    def of(cls, life: LifeTimes) -> _Clock:
        calls = life.calls
        train, load = _spans(life, "trainer", *TRAINING), _spans(life, "publish")
        edges = np.unique(np.concatenate([calls["began"], calls["ended"], train.ravel(), load.ravel()]))
        return cls(edges, np.diff(edges), *(_count(edges, of) for of in (_pairs(calls), train, load)))

    def between(self, values: np.ndarray, began: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """The integral of `values` from `began` to `ended`, for arrays of both."""
        total = np.concatenate([[0.0], np.cumsum(values * self.seconds)])
        return np.asarray(np.interp(ended, self.edges, total) - np.interp(began, self.edges, total))

    def busy(self, began: float, ended: float) -> float:
        """Seconds in which any call was under way."""
        return float(self.between(np.minimum(self.running, 1.0), np.array([began]), np.array([ended]))[0])


def _pairs(rows: np.ndarray) -> np.ndarray:
    return np.stack([rows["began"], rows["ended"]], axis=1)


def _spans(life: LifeTimes, track: str, *names: str) -> np.ndarray:
    """[N, 2] begin and end of the spans of a track, of all names or of these."""
    found = [
        (span["began"], span["ended"])
        for span in life.spans
        if span["track"] == track and (not names or span["name"] in names) and span["ended"] > span["began"]
    ]
    return np.array(found, dtype=float).reshape(-1, 2)


def _count(edges: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """How many of `pairs` cover each interval between `edges`."""
    change = np.zeros(len(edges))
    np.add.at(change, np.searchsorted(edges, pairs[:, 0]), 1)
    np.add.at(change, np.searchsorted(edges, pairs[:, 1]), -1)
    return np.asarray(np.cumsum(change)[:-1])


# The sampler


def fit_sampler(run: RunData) -> SamplerModel:
    """
    Raises:
        DataError: too few calls of the model have ended.
    """
    life = max(run.timeline, key=lambda life: len(life.calls), default=None)
    if life is None:
        raise DataError(f"{run.root} has no timeline, so nothing is known of its sampler.")
    settings, vllm = run.settings, "replicas_up" in run.steps
    replicas = max(len(settings.get("sampler.urls", ())), int(settings.get("sampler.replicas", 1))) if vllm else 1
    most = settings.get("sampler.max_running") or (None if vllm else _rows(run))
    adapters = bool(settings.get("lora.rank", 0))
    calls, fresh = _usable(life)
    if len(calls) < LEAST_CALLS:
        raise DataError(
            f"{len(calls)} calls of the model in {run.root} can be used to tell how fast its sampler is; expected at "
            f"least {LEAST_CALLS}. Let it run longer."
        )
    clock = _Clock.of(life)
    fits = _Fits(clock, calls, fresh, replicas, most)
    slowdown = _worth(SLOWDOWNS, lambda slowdown: fits.solve(slowdown, 0.0).spread)
    pauses = vllm and not adapters  # the embedded sampler swaps between two steps of its decoding
    pause = _worth(PAUSES, lambda pause: fits.solve(slowdown, pause).spread) if pauses else 0.0
    fit = fits.solve(slowdown, pause)
    share = float(fresh.sum() / calls["drawn_tokens"].sum())
    prompt_s = min(fit.prompt_s, fit.running_s / (1 + share))  # of the engine; a drawn token costs it as much, or more
    loads = np.diff(_spans(life, "publish"), axis=1)[:, 0][-MOST_HOT_LOADS:]
    return SamplerModel(
        replicas=replicas,
        token_s=fit.token_s,
        running_s=fit.running_s - prompt_s * share,
        prompt_s=prompt_s,
        call_s=fit.call_s + (fit.prompt_s - prompt_s) * float(fresh.mean()),
        max_running=most,
        hot_load_s=tuple(loads.tolist()) or (0.0,),
        pause_share=pause,
        side_by_side=adapters or settings.get("sampler.version_policy") == "per_rollout",
        drain=settings.get("sampler.in_flight") == "drain",
        slowdown=slowdown,
    )


def _rows(run: RunData) -> int:
    """Most that the embedded sampler decodes at once: by its device, or by what was seen where `auto` chose that."""
    seen = np.nan_to_num(run.steps["sampler_running"]).max(initial=0.0)
    return ELSEWHERE if run.settings.get("trainer.device") in ("cuda", "mps") or seen > ON_CPU else ON_CPU


def _usable(life: LifeTimes) -> tuple[np.ndarray, np.ndarray]:
    """Calls that drew something, after the start, [C]; and how many of their prompt tokens were fresh, [C]."""
    calls = life.calls
    owner = np.repeat(np.arange(len(life.attempts)), life.attempts["turns"].astype(int))
    calls = calls[: len(owner)]
    seen = np.concatenate([[0.0], (calls["prompt_tokens"] + calls["drawn_tokens"])[:-1]])
    seen[np.concatenate([[True], owner[1:] != owner[:-1]])] = 0.0
    fresh = np.where(calls["prompt_tokens"] >= seen, calls["prompt_tokens"] - seen, calls["prompt_tokens"])
    steps = _spans(life, "trainer", "optimizer")
    warm = steps[FIRST_STEPS - 1, 1] if len(steps) > 4 * FIRST_STEPS else -np.inf
    usable = (calls["drawn_tokens"] > 0) & (calls["began"] >= warm)
    places = np.flatnonzero(usable)[-MOST_CALLS:]
    return calls[places], fresh[places]


@dataclass(frozen=True, slots=True)
class _Fit:
    call_s: float
    prompt_s: float
    token_s: float
    running_s: float
    spread: float
    """Of the logarithm of measured over fitted."""


class _Fits:
    """Least squares for the calls of a life, under a given slowdown and pause."""

    def __init__(self, clock: _Clock, calls: np.ndarray, fresh: np.ndarray, replicas: int, most: int | None) -> None:
        self._clock, self._calls, self._fresh = clock, calls, fresh
        running = np.maximum(clock.running / replicas, 1.0)
        self._running = running if most is None else np.minimum(running, most)
        self._queued = running / self._running
        """How much longer a call takes because it waits for others to end, where there are more than `most`."""

    def solve(self, slowdown: float, pause: float) -> _Fit:
        clock, drawn = self._clock, self._calls["drawn_tokens"]
        began, ended = self._calls["began"], self._calls["ended"]
        speed = (1 - pause * clock.loading) / (1 + slowdown * clock.training)
        work = np.maximum(clock.between(speed / self._queued, began, ended), 1e-9)  # [C]
        pace = np.ones_like(self._running)  # t(n), up to a factor
        found = np.zeros(4)
        for _ in range(ROUNDS):
            tokens = clock.between(speed / pace, began, ended)
            others = clock.between(speed / pace * (self._running - 1), began, ended) / np.maximum(tokens, 1e-12)
            columns = np.stack([np.ones_like(work), self._fresh, drawn, drawn * others], axis=1)
            found = least_squares(columns / work[:, None], np.ones_like(work))
            pace = np.maximum(found[2] + found[3] * (self._running - 1), 1e-12)
        fitted = np.maximum(columns @ found, 1e-9)
        found = found * (work.sum() / fitted.sum())  # rates come from sums, which must agree
        call_s, prompt_s, token_s, running_s = (float(value) for value in found)
        token_s = max(token_s, LEAST_TOKEN_S)
        return _Fit(call_s, prompt_s, token_s, running_s, spread=float(np.std(np.log(work / fitted))))


def least_squares(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The best x >= 0 for `columns` [N, K] x = `values` [N], K small: the best of all choices of columns."""
    best, least = np.zeros(columns.shape[1]), float(values @ values)
    for count in range(1, columns.shape[1] + 1):
        for chosen in combinations(range(columns.shape[1]), count):
            some = columns[:, chosen]
            x = np.linalg.lstsq(some, values, rcond=None)[0]
            rest = float(np.square(some @ x - values).sum())
            if (x >= 0).all() and rest < least:
                best, least = np.zeros(columns.shape[1]), rest
                best[list(chosen)] = x
    return best


def _worth(choices: Iterable[float], spread: Callable[[float], float]) -> float:
    """The choice with the smallest spread; the first one, 0, unless another is clearly better."""
    spreads = {choice: spread(choice) for choice in choices}
    best = min(spreads, key=lambda choice: spreads[choice])
    return float(best) if spreads[best] < (1 - WORTH) * spreads[0.0] else 0.0


# The trainer


def fit_trainer(run: RunData, workload: Workload) -> TrainerModel:
    """
    Raises:
        DataError: the run has too few steps.
    """
    steps = run.steps
    count = len(steps)
    if count < LEAST_STEPS:
        raise DataError(f"{run.root} has {count} steps; expected at least {LEAST_STEPS}. Let it run longer.")
    later = slice(FIRST_STEPS if count >= LEAST_STEPS + FIRST_STEPS else 0, None)
    column = {name: np.nan_to_num(steps[name][later]) for name in _COLUMNS}
    busy = _busy_share(run, steps["step"][later])
    computed = column["train_tokens"] - column["shared_tokens"]
    slowdown = _worth(SLOWDOWNS, lambda slowdown: _fit_steps(column, computed, busy, slowdown)[2])
    step_s, token_s, _ = _fit_steps(column, computed, busy, slowdown)
    between_s = column["step_s"] - sum(column[name] for name in PARTS)
    prompts = np.mean([attempt.prompt for attempt in workload.attempts])
    shareable = prompts * np.maximum(column["samples"] - column["groups_trained"], 0).sum()
    return TrainerModel(
        step_s=step_s + max(0.0, float(np.mean(between_s) + np.mean(column["checkpoint_s"]))),
        token_s=token_s,
        shared=float(column["shared_tokens"].sum() / shareable) if shareable else 0.0,
        export_s=_export_s(run, slowdown),
        slowdown=slowdown,
    )


_COLUMNS = (*PARTS, "step_s", "optimizer_s", "train_tokens", "shared_tokens", "samples", "groups_trained")


def _fit_steps(
    column: Mapping[str, np.ndarray], computed: np.ndarray, busy: np.ndarray, slowdown: float
) -> tuple[float, float, float]:
    """Seconds of a step, seconds of a token, and the spread of the logarithm of measured over fitted."""
    alone = np.maximum(column["train_s"] / (1 + slowdown * busy), 1e-9)
    fixed_s = float(np.mean(column["optimizer_s"] / (1 + slowdown * busy)))
    token_s = max(0.0, float(np.sum(alone - fixed_s) / max(computed.sum(), 1.0)))
    fitted = np.maximum(fixed_s + token_s * computed, 1e-9)
    return fixed_s, token_s, float(np.std(np.log(alone / fitted)))


def _busy_share(run: RunData, steps: np.ndarray) -> np.ndarray:
    """[S] the share of each step's training in which the sampler had something to do. 0 where that is not known."""
    busy, whole = dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0.0)
    for life in run.timeline:
        clock = _Clock.of(life)
        for span in life.spans:
            if span["track"] == "trainer" and span["name"] in TRAINING and span["step"] in whole:
                busy[span["step"]] += clock.busy(span["began"], span["ended"])
                whole[span["step"]] += span["ended"] - span["began"]
    return np.array([busy[step] / whole[step] if whole[step] else 0.0 for step in steps])


def _export_s(run: RunData, slowdown: float) -> float:
    """Mean seconds of a snapshot of the weights, with the device to itself."""
    seconds = []
    for life in run.timeline:
        clock = _Clock.of(life)
        for began, ended in _spans(life, "trainer", "export"):
            busy = clock.busy(began, ended) / (ended - began)
            seconds.append((ended - began) / (1 + slowdown * busy))
    return float(np.mean(seconds)) if seconds else 0.0
