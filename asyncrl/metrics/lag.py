"""How late the event loop wakes whoever sleeps: a rollout function that blocks holds up every other rollout.

    consumes    nothing
    produces    the largest lag since the last step, and a warning about a long one
    waits for   its own timer
    woken by    the event loop, late when something blocked it

The trainer computes in a thread of its own and does not delay the loop.
"""

from __future__ import annotations

import asyncio
import time

import structlog

SLEEP_S = 0.05
"""20 wakes a second cost nothing that can be measured, and a block of 0.2 s cannot hide between two of them."""
LONG_S = 0.2
"""A pause of the garbage collector or a busy machine stays below it; every rollout and request waits that long."""
WARN_EVERY_S = 60.0

log = structlog.get_logger(__name__)


class LagMeter:
    """Owns the largest lag of the step, in seconds, and when a warning is due. Pure."""

    def __init__(self) -> None:
        self._largest_s = 0.0
        self._warned_at: float | None = None

    def observe(self, lag_s: float, now: float) -> bool:
        """Count one lag. Returns whether to warn about it: it is long, and the last warning is a minute old."""
        self._largest_s = max(self._largest_s, lag_s)
        due = self._warned_at is None or now - self._warned_at >= WARN_EVERY_S
        if lag_s <= LONG_S or not due:
            return False
        self._warned_at = now
        return True

    def take(self) -> float:
        """The largest lag since the last call, in seconds."""
        largest_s, self._largest_s = self._largest_s, 0.0
        return largest_s


async def watch_lag(meter: LagMeter) -> None:
    """Measure until cancelled. In virtual time there is nothing to measure, so it ends."""
    loop = asyncio.get_running_loop()
    while True:
        began, wall_began = loop.time(), time.monotonic()
        await asyncio.sleep(SLEEP_S)
        if time.monotonic() - wall_began < SLEEP_S / 2:
            return
        now = loop.time()
        lag_s = now - began - SLEEP_S
        if meter.observe(lag_s, now):
            log.warning(
                "the event loop was blocked",
                blocked_s=round(lag_s, 2),
                meaning="every rollout and request waited: something in the rollout function, a reward or a parser "
                "computes or waits without giving up control, or tens of thousands of rollouts were ready at once",
                to_do="await what waits, and send heavy work away: `await asyncrl.offload(function, *args)`",
            )
