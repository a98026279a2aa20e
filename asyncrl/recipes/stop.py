"""Ctrl-C and SIGTERM around work that has no event loop: once ends it after the step, twice ends the process at once.

`asyncrl/interrupt.py` does the same for the engine.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from asyncrl.interrupt import SECOND_SIGNAL_EXIT

STDERR = 2


class StopWish:
    """Whether somebody wants the work to end."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self) -> bool:
        return self.said


@contextmanager
def stop_on_signals() -> Iterator[StopWish]:
    """Handle SIGINT and SIGTERM as long as the block lasts. Only the main thread may; elsewhere nothing is handled."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if wish.said:
            _say("stopping at once")
            os._exit(SECOND_SIGNAL_EXIT)
        wish.said = True
        _say("stopping after this step; once more stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    # Not by print: the handler may have interrupted one, and a buffer cannot be entered twice.
    os.write(STDERR, f"\n{text}\n".encode())
