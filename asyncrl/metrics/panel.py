"""How the live view looks: numbers in, text out. No clock and no terminal here."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from asyncrl.metrics.report import Account

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 100
"""Widest panel, in columns."""


@dataclass(slots=True)
class Progress:
    """What the view knows of the run."""

    title: str
    total_steps: int | None
    started_at: float
    recent: deque[Mapping[str, Any]]
    """The last step records."""
    gauges: dict[str, Any] = field(default_factory=dict)
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    step: int = 0
    worst_staleness: float = 0.0
    failed: int = 0
    retried: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        self.recent.append(record)
        self.step = int(record.get("step", self.step + 1))
        self.worst_staleness = max(self.worst_staleness, _finite(record.get("staleness_max")) or 0.0)
        self.failed += int(record.get("members_failed", 0))
        self.retried += int(record.get("members_retried", 0))

    def now(self, name: str) -> float | None:
        """A gauge, else the same metric of the last step."""
        value = _finite(self.gauges.get(name))
        return value if value is not None else self.last(name)

    def last(self, name: str) -> float | None:
        return _finite(self.recent[-1].get(name)) if self.recent else None

    def history(self, name: str) -> list[float]:
        values = (_finite(record.get(name)) for record in list(self.recent))
        return [value for value in values if value is not None]

    def rate(self, name: str) -> float | None:
        """Mean of a rate over the time of the recent steps: a single step is too noisy to read."""
        pairs = [(_finite(record.get(name)), _finite(record.get("step_s"))) for record in list(self.recent)]
        known = [(rate, seconds) for rate, seconds in pairs if rate is not None and seconds]
        total = sum(seconds for _, seconds in known)
        return sum(rate * seconds for rate, seconds in known) / total if total > 0 else None

    def remaining_s(self, now: float) -> float | None:
        """At the pace of the recent steps, less what the running step has already taken."""
        seconds = self.history("step_s")
        if self.total_steps is None or not seconds:
            return None
        ended = _finite(self.recent[-1].get("time_s"))
        running = 0.0 if ended is None else max(0.0, now - self.started_at - ended)
        return max(0.0, (self.total_steps - self.step) * sum(seconds) / len(seconds) - running)


def panel(progress: Progress, now: float) -> RenderableType:
    """The whole view: a headline with a bar, and one row per question."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_row("reward", _reward(progress))
    if progress.evaluations:
        rows.add_row("held-out", held_out(progress))
    rows.add_row("staleness", staleness(progress))
    rows.add_row("rollouts", rollouts(progress))
    rows.add_row("speed", speed(progress))
    rows.add_row("time", time_sentence(progress))
    framed = Panel(
        Group(_headline(progress, now), Text(), rows),
        title=Text(progress.title, style="bold"),
        title_align="left",
        border_style="dim",
        padding=(0, 1),
    )
    return Constrain(framed, WIDTH)


def plain_line(progress: Progress, now: float) -> str:
    """One step as one line, for logs."""
    reward = progress.last("reward_mean")
    parts = [
        _steps(progress),
        f"reward {_show(reward)}",
        f"staleness {_show(progress.last('staleness_mean'), 1)} (worst {progress.worst_staleness:.0f})",
        rollouts(progress),
        speed(progress),
        time_sentence(progress),
        _clock(progress, now),
    ]
    return " | ".join(part for part in parts if part)


def sparkline(values: Sequence[float]) -> str:
    """One bar per value, from the smallest to the largest; a flat line when they are all equal."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    span = high - low
    if span <= 0:
        return BARS[3] * len(values)
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))] for value in values)


def staleness(progress: Progress) -> str:
    mean = progress.last("staleness_mean")
    if mean is None:
        return "no step yet"
    oldest = _show(progress.last("staleness_max"), 0)
    return f"mean {mean:.1f}, max {oldest}, worst so far {progress.worst_staleness:.0f}"


def held_out(progress: Progress) -> str:
    """The last evaluation with its interval, the best, and what is measured now."""
    rewarded = [(reward, e) for e in progress.evaluations if (reward := _finite(e.get("eval_reward"))) is not None]
    parts = []
    if rewarded:
        reward, last = rewarded[-1]
        low, high = _finite(last.get("eval_reward_low")), _finite(last.get("eval_reward_high"))
        interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
        parts.append(f"{reward:.3f}{interval} at step {last['eval_version']:.0f}")
        best, when = max(rewarded, key=lambda pair: pair[0])
        if best > reward:
            parts.append(f"best {best:.3f} at step {when['eval_version']:.0f}")
    else:
        parts.append(f"evaluated at step {progress.evaluations[-1]['eval_version']:.0f}")
    if (version := _finite(progress.gauges.get("eval_version"))) is not None:
        parts.append(f"measuring step {version:.0f}: {progress.gauges['eval_done']:.0f} rollouts")
    return ", ".join(parts)


def rollouts(progress: Progress) -> str:
    in_flight, window, queue = (progress.now(name) for name in ("in_flight", "window", "queue_groups"))
    parts = []
    if in_flight is not None:
        parts.append(f"{in_flight:,.0f} in flight" + (f" of {window:,.0f}" if window is not None else ""))
    if queue is not None:
        parts.append(f"{queue:,.0f} {'group' if queue == 1 else 'groups'} ready")
    if progress.retried:
        parts.append(f"{progress.retried:,} retried")
    if progress.failed:
        parts.append(f"{progress.failed:,} failed")
    return ", ".join(parts) or "none yet"


def speed(progress: Progress) -> str:
    tokens, samples = progress.rate("tokens_per_s"), progress.rate("samples_per_s")
    if tokens is None or samples is None:
        return "no step yet"
    return f"{_rounded(tokens)} tokens/s, {_rounded(samples)} samples/s"


def time_sentence(progress: Progress) -> str:
    shares = Account(list(progress.recent)).shares()
    return str(shares) if shares is not None else "waiting for the first batch"


def _headline(progress: Progress, now: float) -> RenderableType:
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    bar: RenderableType = Text()
    if progress.total_steps:
        bar = ProgressBar(total=progress.total_steps, completed=progress.step, complete_style="green", style="dim")
    line.add_row(Text(_steps(progress), style="bold"), bar, Text(_clock(progress, now), style="dim"))
    return line


def _reward(progress: Progress) -> Text:
    rewards = progress.history("reward_mean")
    if not rewards:
        return Text("no step yet")
    return Text.assemble(
        (f"{rewards[-1]:.3f} ", "bold green"), (sparkline(rewards), "green"), (f" best {max(rewards):.3f}", "dim")
    )


def _steps(progress: Progress) -> str:
    return f"step {progress.step}" + (f"/{progress.total_steps}" if progress.total_steps else "")


def _clock(progress: Progress, now: float) -> str:
    remaining = progress.remaining_s(now)
    return duration(now - progress.started_at) + (f", {duration(remaining)} left" if remaining is not None else "")


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:04:05`."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
