"""The log of a run: JSON lines in `logs/asyncrl.jsonl`; warnings also where the user looks.

Inside `open_log` every `structlog.get_logger()` of the process writes there, so a component needs no
logger handed down.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import structlog

from asyncrl.metrics.jsonl import encode, open_to_append
from asyncrl.private import hide_secrets
from asyncrl.terminal import visible

EventDict = MutableMapping[str, Any]

QUIETED = logging.getLogger("bitsandbytes")
"""`peft` imports it wherever it is installed, and it warns of kernels that nothing here uses."""


def to_stderr(text: str) -> None:
    """Looks `sys.stderr` up at each call: the live view puts itself in its place."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def open_log(path: Path, echo: Callable[[str], None] = to_stderr) -> Iterator[structlog.typing.FilteringBoundLogger]:
    """Log to `path` until the block ends. `echo` gets one line of text for each warning or error."""
    before, level = structlog.get_config(), QUIETED.level
    QUIETED.setLevel(logging.ERROR)
    with closing_quietly(open_to_append(path)) as file:
        structlog.configure(
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
                _Echo(echo),
                _line,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
            logger_factory=structlog.WriteLoggerFactory(file),
            cache_logger_on_first_use=False,  # a second run of this process has a file of its own
        )
        try:
            yield structlog.get_logger()
        finally:
            structlog.configure(**before)
            QUIETED.setLevel(level)


@contextmanager
def closing_quietly(file: TextIO) -> Iterator[TextIO]:
    """A line that the disk did not take has said so when it was written; closing tries it again."""
    try:
        yield file
    finally:
        with suppress(OSError):
            file.close()


class _Echo:
    """Passes warnings on as readable text."""

    def __init__(self, echo: Callable[[str], None]) -> None:
        self._echo = echo

    def __call__(self, logger: object, level: str, event: EventDict) -> EventDict:
        if level in ("warning", "error", "critical", "exception"):
            hidden = ("event", "level", "timestamp", "exception")
            details = ", ".join(f"{key}={value}" for key, value in event.items() if key not in hidden)
            text = f"{event['level']}: {event['event']}" + (f" ({details})" if details else "")
            self._echo(visible(hide_secrets(text)))
        return event


def _line(logger: object, level: str, event: EventDict) -> str:
    first = {"time": event.pop("timestamp"), "level": event.pop("level"), "event": event.pop("event")}
    return hide_secrets(encode({**first, **event}))
