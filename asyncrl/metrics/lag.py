"""How late the event loop is, and who holds it up: what blocks it stops every rollout and every request at once.

    consumes    nothing
    produces    the largest lag since the last step, and a warning about a long one, with the line that blocked
    waits for   its own timer
    woken by    the event loop, late when something blocked it

The trainer computes in a thread of its own and does not delay the loop.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Literal

import structlog

from asyncrl.standstill import STDLIB_DISTANCE, distance

SLEEP_S = 0.05
"""20 wakes a second cost nothing that can be measured, and a block of 0.2 s cannot hide between two of them."""
LONG_S = 0.2
"""A pause of the garbage collector stays below it; every rollout and request waits that long."""
UNNAMED_S = 1.0
"""Where nobody is found who held the loop up: a busy machine, which gave the process no time, stays below it."""
WARN_EVERY_S = 60.0
STUCK_S = 10.0
"""A loop that is blocked for so long may never come back to say so itself."""
_OF_THE_LOOP = frozenset({"_run", "_run_once", "run_forever", "run_until_complete"})
"""Functions of asyncio below which the frames are of who started the loop, and not of what runs on it."""

log = structlog.get_logger(__name__)


class LagMeter:
    """Owns the lags of the step, in seconds, and when a warning is due. Pure."""

    def __init__(self) -> None:
        self._largest_s = 0.0
        self._sum_s = 0.0
        self._warned_at: float | None = None

    def observe(self, lag_s: float, now: float, *, named: bool = True) -> bool:
        """Count one lag. Returns whether to warn about it: it is long, and the last warning is a minute old.

        `named`: who held up the loop is known.
        """
        self._largest_s = max(self._largest_s, lag_s)
        self._sum_s += lag_s
        due = self._warned_at is None or now - self._warned_at >= WARN_EVERY_S
        if lag_s <= (LONG_S if named else UNNAMED_S) or not due:
            return False
        self._warned_at = now
        return True

    def take(self) -> float:
        """The largest lag since the last call, in seconds."""
        largest_s, self._largest_s = self._largest_s, 0.0
        return largest_s

    def take_sum(self) -> float:
        """All lags since the last call together, in seconds: about how long the loop was blocked."""
        sum_s, self._sum_s = self._sum_s, 0.0
        return sum_s


class Culprit:
    """A thread that looks at what the event loop's thread is doing whenever the loop is `LONG_S` late.

    It sleeps otherwise: 10 wakes a second, a thousandth of a core. Code that keeps the interpreter's lock (a regular
    expression that explodes, a huge number) keeps this thread from looking too, and may go unnamed.
    """

    def __init__(self) -> None:
        self._loop_thread = threading.get_ident()
        self._ticked_at = time.monotonic()
        self._seen: list[str] = []  # which both threads may touch at once
        self._warn_after_s = STUCK_S
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="asyncrl lag watch", daemon=True)
        self._thread.start()

    def tick(self) -> str:
        """The loop lives. Returns what held it up longest since the last tick, `f (agent.py:12)`; '' if nothing did."""
        self._ticked_at, self._warn_after_s = time.monotonic(), STUCK_S
        seen, self._seen = self._seen, []
        return Counter(seen).most_common(1)[0][0] if seen else ""

    def end(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(LONG_S / 2):
            late_s = time.monotonic() - self._ticked_at - SLEEP_S
            if late_s > LONG_S:
                self._seen.append(self._look())
            if late_s > self._warn_after_s:
                self._warn_after_s += WARN_EVERY_S
                _warn(late_s, self._look(), "is")

    def _look(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)
        return "" if frame is None else name_of(frame)


def name_of(innermost: FrameType) -> str:
    """The innermost line of the user's code, else of a package's, else of asyncrl's; '' when the loop runs nothing."""
    stack: list[FrameType] = []
    frame: FrameType | None = innermost
    while frame is not None and not _is_loop(frame):
        stack.append(frame)
        frame = frame.f_back
    near = [frame for frame in stack if distance(frame.f_code.co_filename) < STDLIB_DISTANCE]
    if not near:
        return ""
    found = min(near, key=lambda frame: distance(frame.f_code.co_filename))  # of equals the first: the innermost
    return f"{found.f_code.co_qualname} ({found.f_code.co_filename}:{found.f_lineno})"


def _is_loop(frame: FrameType) -> bool:
    return frame.f_code.co_name in _OF_THE_LOOP and "asyncio" in frame.f_code.co_filename


async def watch_lag(meter: LagMeter) -> None:
    """Measure until cancelled. In virtual time there is nothing to measure, so it ends."""
    loop = asyncio.get_running_loop()
    culprit = Culprit()  # before the first rollout runs: that one may block for good
    try:
        while True:
            began, wall_began = loop.time(), time.monotonic()
            await asyncio.sleep(SLEEP_S)
            if time.monotonic() - wall_began < SLEEP_S / 2:
                return
            now = loop.time()
            lag_s, blocker = now - began - SLEEP_S, culprit.tick()
            if meter.observe(lag_s, now, named=bool(blocker)):
                _warn(lag_s, blocker, "was")
    finally:
        culprit.end()


def _warn(lag_s: float, blocker: str, tense: Literal["was", "is"]) -> None:
    unknown = (
        ": something in the rollout function, a reward or a parser computes or waits without giving up control, or "
        "tens of thousands of rollouts were ready at once"
    )
    log.warning(
        f"the event loop {tense} blocked for {lag_s:.1f} s" + (f" by {blocker}" if blocker else ""),
        meaning=f"every rollout and request wait{'ed' if tense == 'was' else 's'}" + ("" if blocker else unknown),
        to_do="await what waits, and send heavy work, and agents whose client is synchronous, away: "
        "`await asyncrl.offload(function, *args)`",
    )
