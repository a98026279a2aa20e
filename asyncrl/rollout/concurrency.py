"""How many rollouts run at once. Pure state machines: no clock, no task; time is an argument.

Both controllers are used alike:

    if controller.try_acquire(): start a rollout
    ...
    controller.release()
    controller.observe(load, now)        # now and then, with what the sampler reports

The adaptive one is additive increase, multiplicative decrease, with three refinements. It grows only while its
own limit is what holds rollouts back. It tapers off near a full KV cache. After a congestion it remembers the
size that was too large and comes back to it slowly, so that it settles instead of swinging.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from asyncrl.config import ConcurrencyConfig
from asyncrl.types import Load

START_GROWTH = 1.0
"""Until the first congestion the window doubles per turnover (as many completions as its size)."""
GROWTH = 0.05
"""Afterwards it grows by this share per turnover."""
SLACK = 0.05
"""A queue of up to this share of the window only keeps the engine fed: neither growth nor congestion."""
MIN_SLACK = 2
SUSTAINED = 2
"""Observations in a row that must see a queue: requests that have just arrived wait for the next engine step only."""
EVENT_SHRINK = 0.05
"""Preemptions and refusals tell no number of requests too many: this share of the window goes."""
PREEMPTIONS = 0.3
"""Preemptions per completion that are worth less concurrency: a rare one costs less than the slots it would take."""
MAX_SHRINK = 0.5
"""One congestion takes away at most this share."""
KV_TAPER = 0.8
KV_FULL = 0.95
"""Growth fades between these shares of the KV cache in use."""
PROBE_TURNOVERS = 20
"""Turnovers at the remembered ceiling before it is tried again: engines change with the length of their requests."""
STALE_AFTER_S = 5.0
"""Two observations further apart than this say nothing about the time between them."""


class ConcurrencyController(Protocol):
    """Owns the slots of rollouts."""

    @property
    def window_size(self) -> int:
        """Rollouts that may run at once, now."""

    @property
    def in_flight(self) -> int:
        """Slots that are taken."""

    @property
    def reason(self) -> str:
        """Why the window has the size it has."""

    def try_acquire(self) -> bool:
        """Take a slot if there is one."""

    def release(self) -> None:
        """Give a slot back: a rollout has ended."""

    def observe(self, load: Load, now: float) -> None:
        """Learn from the sampler's load at time `now` (s)."""

    def step_completed(self) -> dict[str, float]:
        """Metrics since the last call."""

    def learned(self) -> dict[str, float | None]:
        """What it knows of the sampler, as a checkpoint holds it."""

    def go_on(self, learned: Mapping[str, float | None]) -> None:
        """Start from what an earlier life of the run had `learned`. Nothing is in flight yet."""


@dataclass(slots=True)
class _Slots:
    """The counting that both controllers share."""

    in_flight: int = 0
    completions: int = 0
    peak: int = 0

    def acquire(self) -> None:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)

    def release(self) -> None:
        assert self.in_flight > 0, "a slot was given back twice"
        self.in_flight -= 1
        self.completions += 1

    def metrics(self, window: int) -> dict[str, float]:
        record = {"window": window, "in_flight": self.in_flight, "in_flight_peak": self.peak}
        self.peak = self.in_flight
        return {name: float(value) for name, value in record.items()}


class FixedWindow:
    """Always the same number of slots."""

    reason = "fixed"

    def __init__(self, size: int) -> None:
        self.window_size = size
        self._slots = _Slots()

    @property
    def in_flight(self) -> int:
        return self._slots.in_flight

    def try_acquire(self) -> bool:
        if self._slots.in_flight >= self.window_size:
            return False
        self._slots.acquire()
        return True

    def release(self) -> None:
        self._slots.release()

    def observe(self, load: Load, now: float) -> None:
        """A fixed window learns nothing."""

    def step_completed(self) -> dict[str, float]:
        return self._slots.metrics(self.window_size)

    def learned(self) -> dict[str, float | None]:
        return {}

    def go_on(self, learned: Mapping[str, float | None]) -> None:
        """A fixed window learns nothing."""


class AdaptiveWindow:
    """Owns a window that follows the sampler. `reason` says why it last changed."""

    def __init__(self, config: ConcurrencyConfig) -> None:
        self._min = config.min_window
        self._max = config.max_window
        self._window = float(min(max(config.initial_window, self._min), self._max))
        self._slots = _Slots()
        self._bound = False
        self._ceiling = math.inf
        self._at_ceiling = 0.0
        self._settling = 0
        self._queued = 0
        self._congested = False
        self._last: Load | None = None
        self._preempted = 0.0
        self._completed = 0.0
        self._seen_at = -math.inf
        self._completions_seen = 0
        self._changes = 0
        self.reason = "cold start"

    @property
    def window_size(self) -> int:
        return int(self._window)

    @property
    def in_flight(self) -> int:
        return self._slots.in_flight

    def try_acquire(self) -> bool:
        if self._slots.in_flight >= self.window_size:
            self._bound = True
            return False
        self._slots.acquire()
        return True

    def release(self) -> None:
        self._slots.release()
        self._settling = max(0, self._settling - 1)

    def step_completed(self) -> dict[str, float]:
        record = self._slots.metrics(self.window_size)
        record |= {"window_changes": float(self._changes), "window_congested": float(self._congested)}
        self._changes = 0
        return record

    def learned(self) -> dict[str, float | None]:
        ceiling = self._ceiling if math.isfinite(self._ceiling) else None
        return {"window": self._window, "ceiling": ceiling, "congested": float(self._congested)}

    def go_on(self, learned: Mapping[str, float | None]) -> None:
        window, ceiling = learned.get("window"), learned.get("ceiling")
        if window is not None:
            self._window = min(max(window, float(self._min)), float(self._max))
            self._congested = bool(learned.get("congested"))
            self._ceiling = math.inf if ceiling is None else ceiling
            self.reason = "as before the resume"

    def observe(self, load: Load, now: float) -> None:
        last, self._last = self._last or load, load
        completed = self._slots.completions - self._completions_seen
        fresh, bound = now - self._seen_at <= STALE_AFTER_S, self._bound
        self._seen_at, self._completions_seen, self._bound = now, self._slots.completions, False

        draining = self._slots.in_flight > self.window_size or self._settling > 0
        if draining:
            return
        self._preempted += load.preemptions - last.preemptions
        self._completed += completed
        allowed = max(MIN_SLACK, SLACK * self._window)
        self._queued = self._queued + 1 if load.waiting > allowed else 0
        if load.rejected > last.rejected:
            self._shrink(self._window * EVENT_SHRINK, 0, f"{load.rejected - last.rejected} requests were refused")
        elif self._preempted > max(MIN_SLACK, PREEMPTIONS * self._completed):
            self._shrink(self._window * EVENT_SHRINK, 0, f"{self._preempted:.0f} requests were preempted")
        elif self._queued >= SUSTAINED:
            self._shrink(load.waiting, load.running, f"{load.waiting} requests wait")
        elif fresh and bound and load.waiting <= allowed / 2:
            self._grow(load, min(completed / self._window, 1.0))
        if self._completed > self._window:  # one turnover: what is older says nothing about this window
            self._preempted /= 2
            self._completed /= 2

    def _shrink(self, excess: float, floor: int, reason: str) -> None:
        self._ceiling, self._at_ceiling, self._congested, self._queued = self._window, 0.0, True, 0
        self._set(max(self._window - max(excess, 1.0), self._window * (1 - MAX_SHRINK), float(floor)), reason)
        self._preempted = self._completed = 0.0
        # Its effect shows when the rollouts that were begun under the old window have ended.
        self._settling = self._slots.in_flight

    def _grow(self, load: Load, turnovers: float) -> None:
        if self._window >= self._ceiling * (1 - GROWTH):
            self._at_ceiling += turnovers
            if self._at_ceiling < PROBE_TURNOVERS:
                return
            self._ceiling, self._at_ceiling = math.inf, 0.0
            rate = GROWTH
        else:
            rate = GROWTH if self._congested else START_GROWTH
        taper = 1.0 if load.kv_use is None else min(1.0, max(0.0, (KV_FULL - load.kv_use) / (KV_FULL - KV_TAPER)))
        self._set(self._window * (1 + rate * turnovers * taper), "the limit binds and nothing waits")

    def _set(self, window: float, reason: str) -> None:
        window = min(max(window, float(self._min)), float(self._max))
        if int(window) != int(self._window):
            self._changes += 1
            self.reason = f"{int(self._window)} -> {int(window)}: {reason}"
        self._window = window


def controller(config: ConcurrencyConfig) -> ConcurrencyController:
    """The controller that the settings ask for: `min_window == max_window` is a fixed one."""
    if config.min_window == config.max_window:
        return FixedWindow(config.max_window)
    return AdaptiveWindow(config)
