"""Signals: one asks the work to end cleanly, a second one ends the process at once. What the exit codes say is in
`exits.py`.

SIGINT is Ctrl-C. SIGTERM is what `kill`, a batch system or a container sends. SIGHUP says that the terminal is gone:
the work ends cleanly for it too, unless `nohup` said that it should not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from asyncrl.errors import UserError
from asyncrl.exits import CUT_SHORT, stopped_by
from asyncrl.streams import streams_that_last
from asyncrl.workers import refuse_in_worker

LEFTOVER_LIMIT_S = 5.0
TOGETHER_S = 0.2
"""GNU timeout and some batch systems send SIGTERM to the process and to its group: what comes together is one wish."""
STOPPING = "stopping{}; once more stops at once"
STDERR = 2

T = TypeVar("T")


class Interrupt:
    """Passes the wish to stop on to whatever runs: the engine finishes its step; anything else is cancelled."""

    def __init__(self) -> None:
        self.stop: Callable[[], None] | None = None
        """How to end what runs now cleanly; None: by cancelling `task`."""
        self.task: asyncio.Task[Any] | None = None
        self.requested = False
        self.signal_number: int = signal.SIGINT
        """What asked."""
        self.owns_process = False
        """Whether the process is there for this work, and may be ended with it."""

    def __call__(self) -> None:
        self.requested = True
        if self.stop is not None:
            self.stop()
        elif self.task is not None:
            self.task.cancel()

    def raise_if_requested(self) -> None:
        """For when the work has ended as it was asked to.

        Raises:
            KeyboardInterrupt: by Ctrl-C.
            SystemExit: by another signal; its code says which.
        """
        if self.requested:
            if self.signal_number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(stopped_by(self.signal_number))


def run_interruptible(main: Callable[[Interrupt], Coroutine[Any, Any, T]]) -> T:
    """Run `main` on an event loop of its own, in a process that is there for it.

    Raises:
        UserError: this thread has a running event loop; or this is a worker process.
        KeyboardInterrupt, SystemExit: as `Interrupt.raise_if_requested`.
    """
    _refuse_running_loop()
    refuse_in_worker()
    interrupt = Interrupt()

    async def guarded() -> T:
        interrupt.task = asyncio.current_task()
        with stop_on_signals(interrupt, asyncio.get_running_loop()):
            try:
                return await main(interrupt)
            except asyncio.CancelledError:
                interrupt.raise_if_requested()
                raise

    loop = asyncio.new_event_loop()
    try:
        with streams_that_last():
            result = loop.run_until_complete(guarded())
    finally:
        _close(loop)
    interrupt.raise_if_requested()
    return result


@contextmanager
def stop_on_signals(
    interrupt: Interrupt,
    loop: asyncio.AbstractEventLoop | None = None,
    at_once: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Handle signals as long as the block lasts. Only the main thread may; elsewhere nothing is handled.

    `interrupt` is called on the loop, if there is one; `at_once` in the handler of a second signal, which ends the
    process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    interrupt.owns_process = True
    asked_at: float | None = None

    def stopping() -> str:
        cancelled = interrupt.stop is None and interrupt.task is not None
        return STOPPING.format("" if cancelled else " after this step")

    def ask() -> None:
        print(f"\n{stopping()}", file=sys.stderr, flush=True)  # which a live view shows above itself
        interrupt()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at, interrupt.signal_number = time.monotonic(), number
            interrupt.requested = True  # the time of the stop runs from here, also while the loop is blocked
            if loop is not None:
                loop.call_soon_threadsafe(ask)
            else:
                say(stopping())
                interrupt()
        elif number == signal.SIGINT or (number == signal.SIGTERM and time.monotonic() - asked_at > TOGETHER_S):
            say(f"stopping at once, with exit code {CUT_SHORT}")
            at_once()
            os._exit(CUT_SHORT)  # nothing stays behind: children see by themselves that this process is gone

    before = {number: signal.signal(number, handle) for number in _handled()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handled() -> list[signal.Signals]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def say(text: str) -> None:
    """On standard error, from wherever: a signal's handler, another thread."""
    # Not by print: the handler may have interrupted one, and a buffer cannot be entered twice.
    with suppress(OSError):  # the terminal is gone
        os.write(STDERR, f"\n{text}\n".encode())


def _refuse_running_loop() -> None:
    """A loop cannot run inside another one of the same thread.

    Raises:
        UserError: this thread has a running event loop, as every notebook does.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise UserError(
        "an event loop is running in this thread already, as in every notebook. Use `await asyncrl.train_async(...)` "
        "there, or `await asyncrl.run.evaluate_async(...)`, instead of train and evaluate."
    )


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """End what is left on the loop. `asyncio.run` would wait for ever for a rollout that ignores its cancellation."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.wait(left, timeout=LEFTOVER_LIMIT_S))
    with suppress(TimeoutError):
        loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), LEFTOVER_LIMIT_S))
    loop.close()
