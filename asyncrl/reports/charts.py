"""The charts of a report: which metrics stand together, and how they are to be read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from asyncrl.metrics.names import METRIC_BY_NAME
from asyncrl.reports.curves import (
    SMOOTHED_FROM,
    Curve,
    Curves,
    Entry,
    Row,
    Wanted,
    filled,
    metric,
    moving_mean,
    per_step,
    ratio,
    spread,
)
from asyncrl.reports.page import Axis, Block, Section, Series, chart
from asyncrl.reports.run_data import Records, RunData
from asyncrl.rollout.held import REASONS
from asyncrl.storage.timeline import DONE

STALENESS = {"0": "0", "1": "1", "2": "2", "4": "3–4", "8": "5–8", "16": "9–16", "more": "over 16"}
HELD = {
    "slots": "waiting: window full",
    "budget": "waiting: staleness bound",
    "unpublished": "waiting: weights not live",
    "data": "waiting: end of data",
}
SHARE = Axis("share", share=True, low=0.0)
WINDOWS = 100
"""Points of a curve over time that is made from rollouts."""


def reward(curves: Curves) -> Section:
    """Training, evaluation, and both against the clock."""
    smoothed = max((entry.steps for entry in curves.entries), default=0) >= SMOOTHED_FROM
    thin = curves.bin_steps == 1 and all(len(entry.runs) == 1 for entry in curves.entries)
    mean = "" if not smoothed else "A thick line is the moving mean of the thin one." if thin else "Smoothed."
    lines = [Wanted("all rollouts", metric("reward_mean"))]
    if len(curves.entries) == 1:
        lines.append(Wanted("trained rollouts", metric("reward_trained_mean")))
    blocks = [
        *curves.chart("reward", "Reward in training", lines, Axis("reward"), smooth=True, about=mean),
        *_evaluations(curves.entries),
        *_over_time(curves.entries),
        *_pass_at_k(curves.entries),
        *_supervised(curves),
        *curves.stacked(
            "groups",
            "What became of the groups",
            [
                *(Wanted(name, metric(f"groups_{name}")) for name in ("trained", "filtered", "rejected")),
                Wanted("too old, dropped", metric("stale_dropped")),
            ],
            Axis("groups", "per step", low=0.0),
            about="A group is filtered when its rewards are all equal: it was paid for, and teaches nothing.",
        ),
    ]
    return Section("Reward", blocks, curves.binning())


def off_policy(curves: Curves) -> Section:
    """How old what was trained was, and what that did to the objective."""
    parts = [Wanted(name, metric(f"staleness_share_{end}")) for end, name in STALENESS.items()]
    loss_tokens = metric("loss_tokens")
    clipped = {"clip_frac_low": "low", "clip_frac_high": "high", "tis_clip_frac": "importance weight"}
    blocks = [
        *curves.stacked(
            "staleness-shares",
            "Staleness of the trained tokens",
            parts,
            Axis("share of loss tokens", share=True, low=0.0, high=1.0),
            shades=True,
            weights=loss_tokens,
            about="By how many optimizer steps the weights that drew a token were old when it was trained.",
        ),
        *curves.chart(
            "staleness",
            "Staleness, mean and worst",
            [Wanted("worst", metric("staleness_max"), "max"), Wanted("mean", metric("staleness_mean"))],
            Axis("staleness", "optimizer steps", low=0.0),
        ),
        *_metric(curves, "ess", Axis("effective sample size", share=True)),
        *_metric(curves, "behavior_kl", Axis("KL", "nats")),
        *curves.chart(
            "clipped",
            "Clipped tokens",
            [Wanted(name, metric(key)) for key, name in clipped.items()],
            Axis("share of loss tokens", share=True, low=0.0),
            about="Tokens whose ratio left the trust region, below or above, and those whose weight was capped.",
        ),
        *_metric(curves, "entropy", Axis("entropy", "nats per token")),
        *_metric(curves, "ref_kld", Axis("KL", "nats")),
        *_metric(curves, "grad_norm", Axis("gradient norm", log=True)),
        *_metric(curves, "loss", Axis("loss")),
    ]
    return Section("Off-policyness", blocks, "What staleness is, and what it costs, is told in docs/staleness.md.")


def speed(curves: Curves) -> Section:
    """Where the time went, and who was busy."""
    step_s = metric("step_s")
    parts = [Wanted("training", per_step("train_s", "step_s"))]
    parts += [Wanted(name, per_step(f"wait_{reason}_s", "step_s")) for reason, name in HELD.items()]
    parts += [
        Wanted("waiting for rollouts", _unexplained_wait),
        Wanted("waiting for a hot-load", per_step("publish_wait_s", "step_s")),
        Wanted("checkpoint", per_step("checkpoint_s", "step_s")),
        Wanted("rest", _rest),
    ]
    busy = {
        **{"window": "window", "in_flight_mean": "in flight", "in_flight": "in flight at the end of the step"},
        **{"sampler_running": "decoding", "sampler_waiting": "waiting in the sampler", "eval_in_flight": "evaluating"},
    }
    if any("in_flight_mean" in run.steps for entry in curves.entries for run in entry.runs):
        del busy["in_flight"]
    alone = len(curves.entries) == 1
    if not alone:
        busy = {name: called for name, called in busy.items() if name in ("window", "in_flight_mean", "in_flight")}
    replicas = {"replicas_up": "that serve", "replica_spread": "load of the busiest against the mean"}
    blocks = [
        *curves.stacked(
            "time",
            "Where the trainer's time went",
            parts,
            Axis("share of the time", share=True, low=0.0, high=1.0),
            weights=step_s,
            about="Waiting is told by what held rollouts back meanwhile.",
        ),
        *curves.chart(
            "tokens",
            "Throughput in tokens",
            [
                Wanted("drawn by the sampler", metric("tokens_per_s")),
                Wanted("through the trainer", per_step("train_tokens", "step_s")),
            ],
            Axis("throughput", "tokens/s", low=0.0),
            smooth=True,
        ),
        *curves.chart(
            "samples",
            "Throughput in samples",
            [Wanted("samples", metric("samples_per_s"))],
            Axis("throughput", "samples/s", low=0.0),
            smooth=True,
        ),
        *curves.chart(
            "concurrency",
            "Concurrency",
            [Wanted(called, metric(name)) for name, called in busy.items()],
            Axis("rollouts or requests", low=0.0),
            about="In flight below the window: the staleness bound holds back.",
        ),
        *_rollout_time(curves.entries),
        *_metric(curves, "kv_use", Axis("KV cache in use", share=True, low=0.0, high=1.0)),
        *curves.chart(
            "replicas",
            "Replicas",
            [Wanted(called, metric(name)) for name, called in replicas.items()],
            Axis("servers, and a ratio", low=0.0),
        ),
        *curves.chart(
            "publish",
            "Hot-loads and checkpoints",
            [
                Wanted("hot-load", _where_positive("publish_s")),
                Wanted("checkpoint", _where_positive("checkpoint_s")),
                *([Wanted("hot-load, waited for", _where_positive("publish_wait_s"))] if alone else []),
            ],
            Axis("duration", "s", low=0.0),
            about="A hot-load overlaps with training; a checkpoint is how long training stood still for it.",
        ),
        *_metric(curves, "loop_lag_s", Axis("delay", "s", low=0.0)),
    ]
    return Section("Speed", blocks)


def time_axis(seconds: float) -> tuple[Axis, float]:
    """For a span of so many seconds; and seconds of its unit."""
    unit, scale = ("s", 1.0) if seconds < 300 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)
    return Axis("time since the run began", unit, low=0.0), scale


def _metric(curves: Curves, name: str, y: Axis) -> list[Block]:
    """A chart of one metric, described by the table of metrics."""
    described = METRIC_BY_NAME[name]
    title = y.title[0].upper() + y.title[1:] if name != "behavior_kl" else "KL to the sampler"
    titles = {"ref_kld": "KL to the reference", "loop_lag_s": "Delay of the event loop"}
    row = _where_positive(name) if y.log else metric(name)
    known = any(np.nan_to_num(run.steps[name]).any() for entry in curves.entries for run in entry.runs)
    if not known:  # a sampler that cannot tell its cache says 0 all along
        return []
    return curves.chart(name, titles.get(name, title), [Wanted(name, row)], y, about=described.meaning)


def _supervised(curves: Curves) -> list[Block]:
    """What `asyncrl sft`, `dpo` and `orpo` record in place of rewards."""
    pairs = [Wanted(name.removeprefix("reward_"), metric(name)) for name in ("reward_chosen", "reward_rejected")]
    accuracy = [Wanted("accuracy", metric("reward_accuracy"))]
    return [
        *curves.chart("pairs", "Rewards of pairs", pairs, Axis("reward"), smooth=True),
        *curves.chart("accuracy", "Pairs ordered right", accuracy, Axis("share of pairs", share=True), smooth=True),
    ]


def _evaluations(entries: Sequence[Entry]) -> list[Block]:
    """With intervals over rows; of runs shown as one, with the span of their means."""
    series = []
    for entry in entries:
        found = [_evaluated(run) for run in entry.runs]
        curve = found[0] if len(found) == 1 else spread(found)
        name = entry.name if len(entries) > 1 else "held-out rows"
        series.append(Series(name, curve.x, curve.y, "line+points", entry.color, low=curve.low, high=curve.high))
    joined = any(len(entry.runs) > 1 for entry in entries)
    about = (
        "The bars are 95 % intervals, over rows." if not joined else "The bars go from the lowest run to the highest."
    )
    y = Axis("mean reward")
    return filled(chart("evaluation", "Reward on held-out rows", x=_VERSION, y=y, series=series, about=about))


def _evaluated(run: RunData) -> Curve:
    found = run.evaluations
    order = np.argsort(found["eval_version"], kind="stable")
    columns = (found[name][order] for name in ("eval_version", "eval_reward", "eval_reward_low", "eval_reward_high"))
    return Curve(*columns)


_VERSION = Axis("optimizer step that was measured", low=None)


def _pass_at_k(entries: Sequence[Entry]) -> list[Block]:
    series = []
    for entry in entries:
        for run in entry.runs:
            names = sorted((n for n in run.evaluations.columns if n.startswith("eval_pass_at_")), key=_k)
            for place, name in enumerate(names):
                color, dash = (entry.color, place) if len(entries) > 1 else (place, 0)
                label = f"pass@{_k(name)}"
                label = f"{entry.name} · {label}" if len(entries) > 1 else label
                x, y = run.evaluations["eval_version"], run.evaluations[name]
                order = np.argsort(x)
                series.append(Series(label, x[order], y[order], "line+points", color, dash=dash))
    return filled(
        chart("pass-at-k", "pass@k on held-out rows", x=_VERSION, y=Axis("share of rows", share=True), series=series)
    )


def _k(name: str) -> int:
    end = name.rpartition("_")[2]
    return int(end) if end.isdecimal() else 0


def _over_time(entries: Sequence[Entry]) -> list[Block]:
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
        series.append(Series(name, times / scale, rows.mean(axis=0), color=entry.color, low=low, high=high))
    about = "Smoothed." if series else ""
    return filled(chart("reward-time", "Reward over time", x=x, y=Axis("reward"), series=series, about=about))


def _at(run: RunData, times: np.ndarray) -> np.ndarray:
    rewards = run.steps["reward_mean"]
    known = np.isfinite(rewards)
    if not known.any():
        return np.full(len(times), np.nan)
    rewards = moving_mean(rewards[known]) if known.sum() >= SMOOTHED_FROM else rewards[known]
    found: np.ndarray = np.interp(times, run.steps["time_s"][known], rewards)
    return found


def _rollout_time(entries: Sequence[Entry]) -> list[Block]:
    """From the timeline: how long the rollouts that ended at a time had waited, drawn, and done other things."""
    series = []
    lives = [(entry, life) for entry in entries for run in entry.runs[:1] for life in run.timeline]
    longest = max((float(life.attempts["ended"].max(initial=0.0)) for _, life in lives), default=0.0)
    x, scale = time_axis(longest)
    for entry in entries:
        found = [life.attempts[life.attempts["evaluation"] == 0] for of, life in lives if of is entry]
        if not found or not sum(map(len, found)):
            continue
        attempts = np.concatenate(found)
        attempts = attempts[attempts["outcome"] == DONE]
        count = int(min(WINDOWS, max(1, len(attempts) // 20)))
        place = np.minimum((attempts["ended"] / max(longest, 1e-9) * count).astype(int), count - 1)
        seconds = {
            "waiting for a slot": attempts["began"] - attempts["admitted"],
            "in model calls": attempts["model_s"],
            "in tools and your code": attempts["ended"] - attempts["began"] - attempts["model_s"],
        }
        if len(entries) > 1:
            seconds = {"": attempts["ended"] - attempts["began"]}
        of_window = np.bincount(place, minlength=count)
        at = (np.arange(count) + 0.5) * longest / count / scale
        for number, (name, values) in enumerate(seconds.items()):
            mean = ratio(np.bincount(place, values, count), of_window)
            series.append(Series(name or entry.name, at, mean, color=entry.color if len(entries) > 1 else number))
    about = "Mean of those that ended at a time. Calls beside each other count each, so the rest may be below 0."
    return filled(
        chart("rollout-time", "How long a rollout took", x=x, y=Axis("mean duration", "s"), series=series, about=about)
    )


def _where_positive(name: str) -> Row:
    def row(records: Records) -> np.ndarray:
        values = records[name]
        return np.where(np.nan_to_num(values) > 0, values, np.nan)

    return row


def _unexplained_wait(records: Records) -> np.ndarray:
    """Of runs that do not say what held rollouts back; nan where they do."""
    known = [records[f"wait_{reason}_s"] for reason in REASONS if f"wait_{reason}_s" in records]
    return ratio(records["wait_s"], records["step_s"]) if not known else np.full(len(records), np.nan)


def _rest(records: Records) -> np.ndarray:
    told = sum(np.nan_to_num(records[name]) for name in ("wait_s", "train_s", "publish_wait_s", "checkpoint_s"))
    return ratio(np.maximum(records["step_s"] - told, 0.0), records["step_s"])
