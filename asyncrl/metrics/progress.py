"""What the live view knows of a run: the last step records, the gauges of now, and sums since the start. No clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncrl.metrics.bottleneck import Bottleneck, bottleneck
from asyncrl.metrics.report import Account, TimeShares

RECENT_STEPS = 40
"""Steps in the sparkline, in the shares of time and in what is said to bind."""
RECENT_GAUGES = 60
"""15 seconds of them: what a rate of now is measured over."""
CERTAIN = 2.0
"""Standard errors from which a trend is one."""
FEWEST = 4
"""Points without which nobody can tell."""
TRAINING = "training"
"""The phase in which gauges are taken."""
ERRORS = {
    "members_retried": "retried",
    "members_failed": "failed",
    "members_dropped": "dropped",
    "groups_rejected": "groups rejected",
}
"""What is summed up since the start, and how it is shown."""
STALENESS = (("0", "0"), ("1", "1"), ("2", "2"), ("4", "3-4"), ("8", "5-8"), ("16", "9-16"), ("more", ">16"))
"""(ending of the metric's name, as it is shown)."""


@dataclass(frozen=True, slots=True)
class Trend:
    """A straight line through the recent steps."""

    change: float
    """From its first step to its last."""
    steps: int
    certain: bool
    """Beyond what chance would make of as many unrelated values."""


@dataclass(slots=True)
class Progress:
    """Owns what is shown."""

    title: str
    total_steps: int | None
    started_at: float
    recent: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    gauges: Mapping[str, Any] = field(default_factory=dict)
    evaluations: list[Mapping[str, Any]] = field(default_factory=list)
    doing: str = TRAINING
    step: int = 0
    steps_seen: int = 0
    worst_staleness: float = 0.0
    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ERRORS, 0))
    hot_load_s: float | None = None
    """How long the last one took."""
    checkpoint_s: float | None = None
    """How long training stood still for the last one, and ..."""
    checkpoint_step: int = 0
    """... the step that it holds."""
    _drawn: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT_GAUGES))
    _told: tuple[int, TimeShares | None, Bottleneck | None] = (0, None, None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the record of an optimizer step."""
        before = self.step
        self.recent.append(record)
        self.steps_seen += 1
        self.step = int(record.get("step", self.step + 1))
        self.worst_staleness = max(self.worst_staleness, finite(record.get("staleness_max")) or 0.0)
        for name in ERRORS:
            self.sums[name] += int(finite(record.get(name)) or 0)
        if hot_load_s := finite(record.get("publish_s")):
            self.hot_load_s = hot_load_s
        if checkpoint_s := finite(record.get("checkpoint_s")):  # after the step before this record
            self.checkpoint_s, self.checkpoint_step = checkpoint_s, before

    def observe(self, gauges: Mapping[str, Any], now: float) -> None:
        """Take how things stand at time `now` (s)."""
        self.gauges = gauges
        drawn = finite(gauges.get("tokens_generated"))
        if drawn is not None:
            self._drawn.append((now, drawn))

    def now(self, name: str) -> float | None:
        """A gauge, else the same metric of the last step."""
        value = finite(self.gauges.get(name))
        return value if value is not None else self.last(name)

    def last(self, name: str) -> float | None:
        return finite(self.recent[-1].get(name)) if self.recent else None

    def history(self, name: str) -> list[float]:
        values = (finite(record.get(name)) for record in list(self.recent))
        return [value for value in values if value is not None]

    def rate(self, name: str) -> float | None:
        """Of a count or a sum, per second of the recent steps: a single step is too noisy to read."""
        pairs = [(finite(record.get(name)), finite(record.get("step_s"))) for record in list(self.recent)]
        known = [(amount, seconds) for amount, seconds in pairs if amount is not None and seconds]
        total = sum(seconds for _, seconds in known)
        return sum(amount for amount, _ in known) / total if total > 0 else None

    def drawn_per_s(self) -> float | None:
        """Tokens that the sampler draws, now; else over the recent steps."""
        drawn = list(self._drawn)
        if len(drawn) >= FEWEST and drawn[-1][0] > drawn[0][0]:
            return max(0.0, drawn[-1][1] - drawn[0][1]) / (drawn[-1][0] - drawn[0][0])
        return self.rate("tokens_generated")

    def trend(self, name: str) -> Trend | None:
        """None with too few steps."""
        values = self.history(name)
        count = len(values)
        if count < FEWEST:
            return None
        middle, mean = (count - 1) / 2, sum(values) / count
        spread = sum((place - middle) ** 2 for place in range(count))
        slope = sum((place - middle) * value for place, value in enumerate(values)) / spread
        errors = [value - mean - slope * (place - middle) for place, value in enumerate(values)]
        deviation = math.sqrt(sum(error * error for error in errors) / (count - 2) / spread)
        return Trend(slope * (count - 1), count, certain=abs(slope) > CERTAIN * deviation)

    def staleness_shares(self) -> list[tuple[str, float]]:
        """(staleness, share of the loss tokens of the recent steps), up to the oldest that there was."""
        pairs = [(name, self.history(f"staleness_share_{end}")) for end, name in STALENESS]
        shares = [(name, sum(values) / len(values) if values else 0.0) for name, values in pairs]
        last = max((place for place, (_, share) in enumerate(shares) if share > 0), default=-1)
        return shares[: last + 1]

    def told(self) -> tuple[TimeShares | None, Bottleneck | None]:
        """Where the time of the recent steps went, and what binds. Worked out once for each step."""
        seen, shares, found = self._told
        if seen != self.steps_seen:
            account, seen = Account(list(self.recent)), self.steps_seen
            shares, found = account.shares(), bottleneck(account)
            self._told = (seen, shares, found)
        return shares, found

    def remaining_s(self, now: float) -> float | None:
        """At the pace of the recent steps, less what the running step has already taken."""
        seconds = self.history("step_s")
        if self.total_steps is None or not seconds:
            return None
        ended = finite(self.recent[-1].get("time_s"))
        running = 0.0 if ended is None else max(0.0, now - self.started_at - ended)
        return max(0.0, (self.total_steps - self.step) * sum(seconds) / len(seconds) - running)


def finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
