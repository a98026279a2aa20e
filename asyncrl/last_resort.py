"""A thread beside the event loop that ends the process where the loop cannot end the run any more.

    consumes    nothing
    produces    a report, and the end of the process
    waits for   its own clock
    woken by    nobody

Three cases: the loop does not turn (code that blocks it), a phase that stalled does not let itself be cancelled, and
a stop that a signal asked for does not come to an end. That a blocked loop has not heard of the stop yet is said early.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import suppress
from types import TracebackType

import structlog

from asyncrl.exits import CUT_SHORT, STALLED
from asyncrl.interrupt import Interrupt, say
from asyncrl.metrics.lag import name_of
from asyncrl.watchdog import LOOKS, Watchdog

LONGEST_TICK_S = 1.0
UNHEARD_S = 1.0
"""The loop may be busy for so long when it is asked to stop."""

log = structlog.get_logger(__name__)


class LastResort:
    """Watches the event loop of this thread as long as the block lasts.

    In a process that is ours (`asyncrl.train` runs it) it ends the process; in somebody else's it only says so.
    """

    def __init__(self, watchdog: Watchdog, interrupt: Interrupt, stop_limit_s: float) -> None:
        """`stop_limit_s`: the longest end of a phase that stalled, and of a stop."""
        self._watchdog = watchdog
        self._interrupt = interrupt
        self._stop_limit_s = stop_limit_s
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._over = threading.Event()
        self._alive = True
        """The loop has turned since the last look."""
        self._said: set[str] = set()
        """What has been reported, where that is all that may be done."""
        # Ticks, and not what a clock says: while a process is suspended, no time passes for it.
        self._deaf_s = self._ending_s = self._stopping_s = 0.0

    def __enter__(self) -> LastResort:
        threading.Thread(target=self._watch, name="asyncrl last resort", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()

    def _watch(self) -> None:
        tick_s = min(LONGEST_TICK_S, min(self._watchdog.limit_s, self._stop_limit_s) / LOOKS)
        while not self._over.wait(tick_s):
            self._deaf_s = 0.0 if self._alive else self._deaf_s + tick_s
            self._ending_s = self._ending_s + tick_s if self._watchdog.ending is not None else 0.0
            self._stopping_s = self._stopping_s + tick_s if self._interrupt.requested else 0.0
            self._judge()
            if self._alive:
                self._alive = False
                with suppress(RuntimeError):  # the loop is closed, and this thread's end is near
                    self._loop.call_soon_threadsafe(self._turned)

    def _turned(self) -> None:
        self._alive = True

    def _judge(self) -> None:
        stalled, ending = self._watchdog.limit_s, self._watchdog.ending
        if min(self._stopping_s, self._deaf_s) >= UNHEARD_S and "unheard" not in self._said:
            self._said.add("unheard")
            say(f"the stop waits for the event loop{self._blocked_by()}; once more stops at once")
        if self._stopping_s >= self._stop_limit_s:
            self._end(CUT_SHORT, f"the stop has not come to its end within stop_timeout_s={self._stop_limit_s:g} s")
        elif self._deaf_s >= stalled:
            self._end(STALLED, f"the event loop has not turned for stall_timeout_s={stalled:g} s", self._blocked_by())
        elif ending is not None and self._ending_s >= self._stop_limit_s:
            within = f"stop_timeout_s={self._stop_limit_s:g} s"
            self._end(STALLED, f"{ending.name} stalled, was cancelled, and did not end within {within}")

    def _blocked_by(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)
        name = "" if frame is None else name_of(frame)
        return f", blocked by {name}" if name else ""

    def _end(self, code: int, headline: str, detail: str = "") -> None:
        if headline in self._said:
            return
        self._said.add(headline)
        try:
            text = self._watchdog.report(headline + detail, self._loop)
        except Exception as error:  # it looks at what another thread is changing; no report is no reason to go on
            text = f"{headline}{detail} (there is no report: {error!r})"
        if not self._interrupt.owns_process:
            log.error(text)
            return
        say(f"error: {text}\nthe process is ended with exit code {code}")
        os._exit(code)
