"""The charts of a report: which metrics stand together, and how they are to be read."""

from __future__ import annotations

import numpy as np

from asyncrl.metrics.names import METRIC_BY_NAME
from asyncrl.metrics.report import PARTS
from asyncrl.reports.curves import SMOOTHED_FROM, Curves, Row, Wanted, metric, per_second, ratio
from asyncrl.reports.evaluated import evaluations
from asyncrl.reports.over_time import reward_over_time, rollout_time
from asyncrl.reports.page import Axis, Block, Section
from asyncrl.reports.run_data import Records

STALENESS = {"0": "0", "1": "1", "2": "2", "4": "3–4", "8": "5–8", "16": "9–16", "more": "over 16"}
HELD = {
    "slots": "waiting: window full",
    "budget": "waiting: staleness bound",
    "unpublished": "waiting: weights not live",
    "data": "waiting: end of data",
}


def reward(curves: Curves) -> Section:
    """Training, evaluation, and both against the clock."""
    smoothed = max((entry.steps for entry in curves.entries), default=0) >= SMOOTHED_FROM
    thin = curves.bin_steps == 1 and all(len(entry.runs) == 1 for entry in curves.entries)
    about = "" if not smoothed else "A thick line is the moving mean of the thin one." if thin else "Smoothed."
    lines = [Wanted("all rollouts", metric("reward_mean"))]
    if not curves.several:
        lines.append(Wanted("trained rollouts", metric("reward_trained_mean")))
    blocks = [
        *curves.chart("reward", "Reward in training", lines, Axis("reward"), smooth=True, about=about),
        *evaluations(curves.entries),
        *reward_over_time(curves.entries),
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
            [
                Wanted("worst", metric("staleness_max"), "max"),
                Wanted("mean", metric("staleness_mean")),
                *([] if curves.several else [Wanted("bound, as it moved", metric("staleness_bound"))]),
            ],
            Axis("staleness", "optimizer steps", low=0.0),
        ),
        *_metric(curves, "sync_interval", Axis("interval of hot-loads", "optimizer steps", low=0.0)),
        *_metric(curves, "ess", Axis("effective sample size", share=True)),
        *_metric(curves, "behavior_kl", Axis("KL", "nats"), "KL to the sampler"),
        *curves.chart(
            "clipped",
            "Clipped tokens",
            [Wanted(name, metric(key)) for key, name in clipped.items()],
            Axis("share of loss tokens", share=True, low=0.0),
            about="Tokens whose ratio left the trust region, below or above, and those whose weight was capped.",
        ),
        *_metric(curves, "entropy", Axis("entropy", "nats per token")),
        *_metric(curves, "ref_kld", Axis("KL", "nats"), "KL to the reference"),
        *_metric(curves, "grad_norm", Axis("gradient norm", log=True)),
        *_metric(curves, "loss", Axis("loss")),
    ]
    return Section("Off-policyness", blocks, "What staleness is, and what it costs, is told in docs/staleness.md.")


def speed(curves: Curves) -> Section:
    """Where the time went, and who was busy."""
    step_s = metric("step_s")
    blocks = [
        *curves.stacked(
            "time",
            "Where the trainer's time went",
            _time_parts(),
            Axis("share of the time", share=True, low=0.0, high=1.0),
            weights=step_s,
            about="Waiting is told by what held rollouts back meanwhile.",
        ),
        *_throughput(curves),
        *curves.chart(
            "concurrency",
            "Concurrency",
            [
                Wanted("window", metric("window")),
                Wanted("in flight", metric("in_flight")),
                *([] if curves.several else _in_sampler()),
            ],
            Axis("rollouts or requests", low=0.0),
            about="In flight below the window: the staleness bound holds back.",
        ),
        *rollout_time(curves.entries),
        *_metric(curves, "kv_use", Axis("KV cache in use", share=True, low=0.0, high=1.0)),
        *curves.chart(
            "replicas",
            "Replicas",
            [
                Wanted("that serve", metric("replicas_up")),
                Wanted("load of the busiest against the mean", metric("replica_spread"), "max"),
            ],
            Axis("servers, and a ratio", low=0.0),
        ),
        *curves.chart(
            "publish",
            "Hot-loads and checkpoints",
            [
                Wanted("hot-load", _where_positive("publish_s"), "max"),
                Wanted("checkpoint", _where_positive("checkpoint_s"), "max"),
                *([] if curves.several else [Wanted("hot-load, waited for", _where_positive("publish_wait_s"), "max")]),
            ],
            Axis("duration", "s", low=0.0),
            about="A hot-load overlaps with training; a checkpoint is how long training stood still for it.",
        ),
        *_metric(curves, "loop_lag_s", Axis("delay", "s", low=0.0), "Delay of the event loop"),
    ]
    return Section("Speed", blocks)


def _time_parts() -> list[Wanted]:
    """They add up to the whole."""
    return [
        Wanted("training", per_second("train_s")),
        *(Wanted(name, per_second(f"wait_{reason}_s")) for reason, name in HELD.items()),
        Wanted("waiting for a hot-load", per_second("publish_wait_s")),
        Wanted("checkpoint", per_second("checkpoint_s")),
        Wanted("rest", _rest),
    ]


def _throughput(curves: Curves) -> list[Block]:
    drawn = Wanted("drawn by the sampler", metric("tokens_per_s"))
    trained = Wanted("through the trainer", per_second("train_tokens"))
    samples = Wanted("samples", metric("samples_per_s"))
    y = "throughput"
    return [
        *curves.chart("tokens", "Throughput in tokens", [drawn, trained], Axis(y, "tokens/s", low=0.0), smooth=True),
        *curves.chart("samples", "Throughput in samples", [samples], Axis(y, "samples/s", low=0.0), smooth=True),
    ]


def _in_sampler() -> list[Wanted]:
    return [
        Wanted("decoding", metric("sampler_running")),
        Wanted("waiting in the sampler", metric("sampler_waiting")),
        Wanted("evaluating", metric("eval_in_flight")),
    ]


def _metric(curves: Curves, name: str, y: Axis, title: str = "") -> list[Block]:
    """A chart of one metric, described by the table of metrics. Its title is that of the axis, if it has no other."""
    row = _where_positive(name) if y.log else metric(name)
    known = any(np.nan_to_num(run.steps[name]).any() for entry in curves.entries for run in entry.runs)
    if not known:  # a sampler that cannot tell its cache says 0 all along
        return []
    title = title or y.title[0].upper() + y.title[1:]
    return curves.chart(name, title, [Wanted(name, row)], y, about=METRIC_BY_NAME[name].meaning)


def _supervised(curves: Curves) -> list[Block]:
    """What `asyncrl sft`, `dpo` and `orpo` record in place of rewards."""
    pairs = [Wanted(name.removeprefix("reward_"), metric(name)) for name in ("reward_chosen", "reward_rejected")]
    accuracy = [Wanted("accuracy", metric("reward_accuracy"))]
    return [
        *curves.chart("pairs", "Rewards of pairs", pairs, Axis("reward"), smooth=True),
        *curves.chart("accuracy", "Pairs ordered right", accuracy, Axis("share of pairs", share=True), smooth=True),
    ]


def _where_positive(name: str) -> Row:
    def row(records: Records) -> np.ndarray:
        values = records[name]
        return np.where(np.nan_to_num(values) > 0, values, np.nan)

    return row


def _rest(records: Records) -> np.ndarray:
    """nan where the run does not say what the trainer did: nothing is known, and not all of it is rest."""
    if "train_s" not in records:
        return np.full(len(records), np.nan)
    told = sum(np.nan_to_num(records[name]) for name in PARTS)
    return ratio(np.maximum(records["step_s"] - told, 0.0), records["step_s"])
