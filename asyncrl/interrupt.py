"""Ctrl-C and SIGTERM around an event loop: once ends the work cleanly, twice ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from asyncrl.errors import UserError
from asyncrl.workers import refuse_in_worker

SECOND_SIGNAL_EXIT = 130
LEFTOVER_LIMIT_S = 5.0

T = TypeVar("T")


class Interrupt:
    """Passes the wish to stop on to whatever runs: the engine finishes its step; anything else is cancelled."""

    def __init__(self) -> None:
        self.stop: Callable[[], None] | None = None
        """How to end what runs now cleanly; None: by cancelling `task`."""
        self.task: asyncio.Task[Any] | None = None
        self.requested = False

    def __call__(self) -> None:
        self.requested = True
        if self.stop is not None:
            self.stop()
        elif self.task is not None:
            self.task.cancel()


def run_interruptible(main: Callable[[Interrupt], Coroutine[Any, Any, T]]) -> T:
    """Run `main` with Ctrl-C and SIGTERM: once ends it cleanly, twice at once."""
    _refuse_running_loop()
    refuse_in_worker()
    interrupt = Interrupt()

    async def guarded() -> T:
        interrupt.task = asyncio.current_task()
        with _signals(interrupt):
            try:
                return await main(interrupt)
            except asyncio.CancelledError:
                if interrupt.requested:
                    raise KeyboardInterrupt from None
                raise

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(guarded())
    finally:
        _close(loop)


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
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@contextmanager
def _signals(interrupt: Interrupt) -> Iterator[None]:
    """Handle SIGINT and SIGTERM as long as the block lasts. Only the main thread may."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    loop = asyncio.get_running_loop()

    def handle() -> None:
        if interrupt.requested:
            print("\nstopping at once", file=sys.stderr, flush=True)
            os._exit(SECOND_SIGNAL_EXIT)  # the servers' guards see the pipe close and end them
        print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)
        interrupt()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
