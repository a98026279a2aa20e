"""What the live view says of a run, a line for each question. Pure: what is known of the run in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

from rich.text import Text

from asyncrl.metrics.progress import ERRORS, TRAINING, Progress, finite

BARS = "▁▂▃▄▅▆▇█"
SPARKS = 20
"""Bars of the reward's history."""
SHOWN_REPLICAS = 4
"""More are summed up."""
FORMS = (".0f", ".0f", ".0%")
NOT_YET = "-"


def reward(progress: Progress) -> Text:
    rewards = progress.history("reward_mean")
    if not rewards:
        return Text(NOT_YET)
    return Text.assemble(
        (f"{rewards[-1]:.3f} ", "bold green"),
        (sparkline(_thinned(rewards)), "green"),
        f" {_trend(progress)}best {max(rewards):.3f}",
    )


def _trend(progress: Progress) -> str:
    trend = progress.trend("reward_mean")
    if trend is None:
        return ""
    if not trend.certain:
        return f"no trend in {trend.steps} steps, "
    return f"{trend.change:+.3f} in {trend.steps} steps, "


def held_out(progress: Progress) -> str:
    """The last evaluation with its interval, the best, and what is measured now."""
    rewarded = [(mean, e) for e in progress.evaluations if (mean := finite(e.get("eval_reward"))) is not None]
    parts = []
    if rewarded:
        mean, last = rewarded[-1]
        low, high = finite(last.get("eval_reward_low")), finite(last.get("eval_reward_high"))
        interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"{mean:.3f}{interval} at step {last['eval_version']:.0f}")
        best, when = max(rewarded, key=lambda pair: pair[0])
        if best > mean:
            parts.append(f"best {best:.3f} at step {when['eval_version']:.0f}")
    elif progress.evaluations:
        parts.append(f"evaluated at step {progress.evaluations[-1]['eval_version']:.0f}")
    known = [evaluation["eval_version"] for evaluation in progress.evaluations]
    version = finite(progress.gauges.get("eval_version"))  # of a gauge that may be older than the last evaluation
    if version is not None and version not in known:
        parts.append(f"measuring step {version:.0f}: {progress.gauges['eval_done']:.0f} rollouts")
    return ", ".join(parts)


def staleness(progress: Progress) -> Text:
    """A bar for each staleness, by its share of the recent loss tokens."""
    mean = progress.last("staleness_mean")
    if mean is None:
        return Text(NOT_YET)
    shares = progress.staleness_shares()
    most = max((share for _, share in shares), default=0.0)
    bars = [
        part
        for name, share in shares
        for part in ((f"{name} ", "dim"), (_bar(share / most) if share else "·", "cyan"), "  ")
    ]
    said = (
        f"mean {mean:.1f}, max {shown(progress.last('staleness_max'), 0)}, worst so far {progress.worst_staleness:.0f}"
    )
    return Text.assemble(*bars, said)


def flow(progress: Progress) -> str:
    """Where groups are on their way: in flight, ready, and what the trainer does. Else what the run does instead."""
    if progress.doing != TRAINING:
        return progress.doing or "done"
    groups = progress.now("queue_groups")
    waiting = "" if groups is None else f"{groups:,.0f} ready"
    parts = [in_flight(progress), waiting, str(progress.gauges.get("phase", ""))]
    return " → ".join(part for part in parts if part) or NOT_YET


def in_flight(progress: Progress) -> str:
    running, size, evaluating = (progress.now(name) for name in ("in_flight", "window", "eval_in_flight"))
    if running is None:
        return ""
    said = f"{running:,.0f}" + (f" of {size:,.0f}" if size is not None else "") + " in flight"
    return said + (f" ({evaluating:,.0f} evaluating)" if evaluating else "")


def ready(progress: Progress) -> str:
    groups = progress.now("queue_groups")
    return "" if groups is None else f"{groups:,.0f} {'group' if groups == 1 else 'groups'} ready"


def window(progress: Progress) -> str:
    """The concurrency, and why it is what it is."""
    size, reason = progress.now("window"), progress.gauges.get("window_reason")
    if size is None:
        return NOT_YET
    return f"{size:,.0f} rollouts" + (f" ({reason})" if reason else "")


def sampler(progress: Progress) -> str:
    """While nothing is trained nobody asks it: only its pace until then is known."""
    asked = progress.doing == TRAINING
    running, waiting, kv = (
        progress.now(name) if asked else None for name in ("sampler_running", "sampler_waiting", "kv_use")
    )
    parts = []
    if (drawn := progress.drawn_per_s() if asked else progress.rate("tokens_generated")) is not None:
        parts.append(f"{rounded(drawn)} tokens/s")
    if running is not None and waiting is not None:
        parts.append(f"{running:,.0f} requests running, {waiting:,.0f} waiting")
    if kv:
        parts.append(f"KV {kv:.0%}")
    return ", ".join(parts) or NOT_YET


def replicas(progress: Progress) -> Iterator[tuple[str, str]]:
    """(name, requests and KV cache) of each; of many, the least, the median and the most."""
    columns = [progress.gauges.get(f"replica_{name}", ()) for name in ("running", "waiting", "kv", "up")]
    loads = [(run, wait, kv) if up else None for run, wait, kv, up in zip(*columns, strict=True)]
    if len(loads) <= SHOWN_REPLICAS:
        for number, load in enumerate(loads, 1):
            said = "down" if load is None else f"{load[0]:.0f} running, {load[1]:.0f} waiting, KV {load[2]:.0%}"
            yield f"replica {number}", said
        return
    served = [load for load in loads if load is not None]
    said = f"{len(served)}/{len(loads)} up"
    if served:
        spans = [_span(column, form) for column, form in zip(zip(*served, strict=True), FORMS, strict=True)]
        said += f", running {spans[0]}, waiting {spans[1]}, KV {spans[2]}"
    yield "replicas", said


def trainer(progress: Progress) -> str:
    tokens, samples, seconds = progress.rate("train_tokens"), progress.rate("samples"), progress.history("step_s")
    parts = [f"{rounded(tokens)} tokens/s"] if tokens is not None else []
    parts += [f"{rounded(samples)} samples/s"] if samples is not None else []
    parts += [f"{in_seconds(fmean(seconds))} a step"] if seconds else []
    return ", ".join(parts) or NOT_YET


def weights(progress: Progress) -> str:
    published = progress.now("published")
    parts = [f"version {published:,.0f} is live"] if published is not None else []
    if progress.hot_load_s is not None:
        parts.append(f"hot-load {in_seconds(progress.hot_load_s)}")
    if progress.checkpoint_s is not None:
        parts.append(f"checkpoint {in_seconds(progress.checkpoint_s)} (step {progress.checkpoint_step})")
    return ", ".join(parts) or NOT_YET


def errors(progress: Progress) -> str:
    """What went wrong since the start; '' where nothing did."""
    parts = [f"{progress.sums[name]:,} {said}" for name, said in ERRORS.items() if progress.sums[name]]
    if lost := progress.now("replicas_lost"):
        parts.append(f"a replica lost {lost:.0f} times" if lost > 1 else "a replica lost once")
    return ", ".join(parts)


def shares(progress: Progress) -> Text:
    found, _ = progress.told()
    if found is None:
        return Text(NOT_YET)
    parts = [
        (f"training {found.training:.0%}", "green"),
        (f"waiting for rollouts {found.waiting:.0%}", "yellow"),
        (f"publishing {found.publishing:.0%}", "blue"),
    ]
    if found.saving >= 0.005:
        parts.append((f"checkpoints {found.saving:.0%}", "magenta"))
    return Text(", ").join(Text(said, style=style) for said, style in parts)


def binding(progress: Progress) -> Text:
    """The plain sentence, and what to do."""
    _, found = progress.told()
    if found is None:
        return Text("What binds is known after the first step.", style="dim")
    return Text.assemble((found.sentence, "bold"), " ", found.advice)


# How things are written


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, from the smallest to the largest; a flat line when they are all equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low
    if span <= 0:
        return BARS[3] * len(values)
    return "".join(_bar((value - low) / span) for value in values)


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:04:05`."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def in_seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def rounded(value: float | None) -> str:
    if value is None:
        return NOT_YET
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def shown(value: float | None, digits: int = 3) -> str:
    return NOT_YET if value is None else f"{value:.{digits}f}"


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `SPARKS`: means of neighbours."""
    width = -(-len(values) // SPARKS)
    first = len(values) % width  # the newest bar is of as many as the others
    starts = ([0] if first else []) + list(range(first, len(values), width))
    return [fmean(values[start : (first if start < first else start + width)]) for start in starts]


def _bar(height: float) -> str:
    """From 0 to 1."""
    return BARS[min(len(BARS) - 1, int(height * len(BARS)))]


def _span(values: Sequence[Any], form: str) -> str:
    return f"{min(values):{form}}/{median(values):{form}}/{max(values):{form}}"
