"""Standard output and error that outlast whoever reads them: `asyncrl train ... | head` and a terminal that is closed
cost a run of hours no more than what it would have printed. The run folder holds everything that matters.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

GONE = frozenset({errno.EPIPE, errno.EIO})
"""What writing to a pipe without a reader, and to a terminal that is gone, comes to."""


class LastingFile(io.FileIO):
    """A file that takes everything, also where its disk is full; once nobody reads it, its descriptor leads nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in GONE:
                self._lead_nowhere()
        return memoryview(data).nbytes

    def _lead_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


@contextmanager
def streams_that_last() -> Iterator[None]:
    """Put such files under `sys.stdout` and `sys.stderr` as long as the block lasts.

    Streams that something else has put there (a notebook, a test runner) stay.
    """
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    ours = {name: _lasting(stream) for name, stream in before.items() if type(stream) is io.TextIOWrapper}
    for name, stream in ours.items():
        setattr(sys, name, stream)
    try:
        yield
    finally:
        for name, stream in ours.items():
            _flush(stream)
            if getattr(sys, name) is stream:
                setattr(sys, name, before[name])


def _lasting(stream: io.TextIOWrapper) -> TextIO:
    _flush(stream)
    raw = LastingFile(stream.fileno(), "wb", closefd=False)
    unbuffered = not isinstance(stream.buffer, io.BufferedWriter)  # python -u
    return io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),  # as the interpreter makes it with -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )


def _flush(stream: TextIO) -> None:
    with suppress(OSError):  # what cannot be written now cannot be written later
        stream.flush()
