"""Nothing waits for ever: what a run is at has a name and a limit. A standstill ends it, and says who waits for what.

    watchdog = Watchdog(1800.0, report_file=folder / "stalled.txt")
    with watchdog.phase("opening the sampler"):
        ...
    with watchdog.phase("training", marks=engine.marks, describe=engine.describe):
        ...

The innermost phase is the one that is judged: when it has neither ended nor moved for its limit, what runs in it is
cancelled, and it raises `StallError`. For code that does not let itself be cancelled there is `last_resort.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asyncrl.errors import StallError
from asyncrl.private import write_private
from asyncrl.standstill import busy_threads, tasks_report, threads_report, where

LOOKS = 20
"""Looks within a limit, which have to find the same. Looks are counted, not seconds: a process that was suspended, or a
machine that slept, has not stalled."""


@dataclass(slots=True, eq=False)
class Phase:
    """Something that a run is at."""

    name: str
    limit_s: float
    limit: str
    """The limit in words."""
    marks: Callable[[], Any]
    describe: Callable[[float], list[str]]
    task: asyncio.Task[Any]
    loop: asyncio.AbstractEventLoop
    since: float = field(init=False)
    cancelling: int = field(init=False)
    """Cancellations that were under way before."""
    stall: StallError | None = None
    seen: Any = None
    looks: int = 0
    """In a row that found nothing new."""
    timer: asyncio.TimerHandle | None = None
    cancelled: int = 0
    """How often the stall has cancelled it."""

    def cancel(self) -> None:
        self.cancelled += 1
        self.task.cancel()

    def forget_cancellations(self) -> bool:
        """Those of the stall. False: somebody else cancelled the task too."""
        while self.cancelled:
            self.cancelled -= 1
            self.task.uncancel()
        return self.task.cancelling() <= self.cancelling

    def __post_init__(self) -> None:
        self.since = self.loop.time()
        self.cancelling = self.task.cancelling()


class Watchdog:
    """Owns the phases of one run. They are entered by one task, one in another."""

    def __init__(self, limit_s: float, report_file: Path | None = None) -> None:
        """`limit_s` is `stall_timeout_s`, that of every phase without one of its own."""
        self.limit_s = limit_s
        self.report_file = report_file
        self._phases: list[Phase] = []
        self._entered = 0

    @property
    def ending(self) -> Phase | None:
        """The phase that stalled and has been cancelled, as long as it has not ended."""
        return next((phase for phase in self._phases if phase.stall is not None), None)

    @property
    def doing(self) -> str:
        """The innermost phase, by its name; '' between phases. May be read by another thread."""
        return next((phase.name for phase in reversed(list(self._phases))), "")

    @contextmanager
    def phase(
        self,
        name: str,
        *,
        limit_s: float | None = None,
        marks: Callable[[], Any] = lambda: None,
        describe: Callable[[float], list[str]] = lambda now: [],
    ) -> Iterator[None]:
        """What runs in the block, by a name.

        Args:
            name: As in "opening the sampler".
            limit_s: How long it may stand still; None: `stall_timeout_s`.
            marks: What changes when it moves; what is compared with `==`, and may be read by another thread.
            describe: Lines for the report, from the loop's time; may be called by another thread.

        Raises:
            StallError: it did not move for `limit_s`.
        """
        task = asyncio.current_task()
        assert task is not None
        limit = f"stall_timeout_s={self.limit_s:g} s" if limit_s is None else f"{limit_s:g} s"
        phase = Phase(name, limit_s or self.limit_s, limit, marks, describe, task, asyncio.get_running_loop())
        self._phases.append(phase)
        self._entered += 1
        try:
            self._look(phase)
            yield
        except BaseException as error:
            # As `asyncio.timeout` does it, and not by a scope of anyio: what is opened in a phase may outlive it.
            if phase.stall is not None and phase.forget_cancellations():
                raise phase.stall from error
            raise
        finally:
            self._phases.remove(phase)
            if phase.timer is not None:
                phase.timer.cancel()
        if phase.stall is not None:  # it had swallowed its cancellation
            phase.forget_cancellations()
            raise phase.stall

    def _look(self, phase: Phase) -> None:
        seen = (self._entered, phase is self._phases[-1] and phase.marks())
        phase.looks = phase.looks + 1 if seen == phase.seen and phase is self._phases[-1] else 0
        phase.seen = seen
        if phase.looks >= LOOKS and phase.stall is None:
            phase.stall = StallError(self.report(f"nothing has moved for {phase.limit}"))
        if phase.stall is not None:  # once more at each look: code may swallow one
            phase.cancel()
        phase.timer = phase.loop.call_later(phase.limit_s / LOOKS, self._look, phase)

    def report(self, headline: str, loop: asyncio.AbstractEventLoop | None = None) -> str:
        """Write who waits for what to the report file. Returns the gist, the culprit first; all where there is no file.

        `loop` is needed in a thread without a running one.
        """
        gist = [f"{headline}.", *self._gist()]
        loop = loop or asyncio.get_running_loop()
        full = [*gist, "", "Tasks", "", *tasks_report(asyncio.all_tasks(loop)), "", "Threads", "", *threads_report()]
        if self.report_file is None:
            return "\n".join(full)
        try:
            head = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, process {os.getpid()}"
            write_private(self.report_file, "\n".join([head, "", *full, ""]))
        except OSError as error:  # a full disk, a folder that is gone: then all of it goes where the gist goes
            return "\n".join([*full, "", f"{self.report_file} cannot be written: {error.strerror}"])
        return "\n".join([*gist, f"all tasks and threads: {self.report_file}"])

    def _gist(self) -> Iterator[str]:
        if self._phases:
            phase = self._phases[-1]
            now = phase.loop.time()
            yield f"run: {phase.name}, for {now - phase.since:.0f} s"
            yield f"it waits at: {where(phase.task)}"
            try:
                yield from phase.describe(now)
            except Exception as error:  # what is broken enough to stall may be too broken to be described
                yield f"it cannot be described: {error!r}"
        yield from busy_threads()
