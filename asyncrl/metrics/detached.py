"""A tracker in a thread of its own, so that what is wrong with it is no concern of the run.

    consumes    records, from the event loop
    produces    calls of the tracker, in their order
    waits for   the tracker: its disk, its network, its process
    woken by    a record, or the end

A tracker that fails, or takes nothing any more, is left out from then on, and the log says so: `metrics.jsonl` and the
files beside it have every record.
"""

from __future__ import annotations

from collections.abc import Mapping
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, Protocol

import structlog

Axis = Literal["step", "eval_version", "rollouts_ended"]
"""The field of a record that a chart of it has as its x axis: which kind of record it is."""
Record = Mapping[str, Any]

MOST_WAITING = 1000
"""Records. At most one a second comes beside those of the steps, so a tracker has stood still for minutes then."""
CLOSE_LIMIT_S = 60.0
"""A tracker may have a lot to send at the end; what it has not sent by then is on disk, or lost to it."""
STUCK_LIMIT_S = 1.0
"""For one that had been left out already."""

log = structlog.get_logger(__name__)


class Tracker(Protocol):
    """What shows the numbers of a run. May block, and may raise anything."""

    def log(self, axis: Axis, record: Record) -> None: ...

    def close(self) -> None:
        """Send what is left."""


class Detached:
    """Hands records to a tracker. `log` returns at once."""

    def __init__(self, name: str, tracker: Tracker, *, close_limit_s: float = CLOSE_LIMIT_S) -> None:
        self._name = name
        self._tracker = tracker
        self._close_limit_s = close_limit_s
        self._left_out = False
        self._records: SimpleQueue[tuple[Axis, Record] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name=f"asyncrl tracker {name}", daemon=True)
        self._thread.start()

    def log(self, axis: Axis, record: Record) -> None:
        if self._left_out:
            return
        if self._records.qsize() < MOST_WAITING:
            self._records.put((axis, dict(record)))
        else:
            self._leave_out(f"it has not taken the last {MOST_WAITING} records")

    def close(self) -> None:
        """Wait until the tracker has everything, but not for ever."""
        self._records.put(None)
        self._thread.join(STUCK_LIMIT_S if self._left_out else self._close_limit_s)
        if self._thread.is_alive() and not self._left_out:
            self._leave_out(f"it has not taken everything within {self._close_limit_s:g} s of the end")

    def _run(self) -> None:
        try:
            while (entry := self._records.get()) is not None:
                if not self._left_out:
                    self._tracker.log(*entry)
        except Exception as error:  # of somebody else's package, its disk or its network
            self._leave_out(repr(error))
        try:
            self._tracker.close()
        except Exception as error:  # as above
            if not self._left_out:
                self._leave_out(repr(error))

    def _leave_out(self, reason: str) -> None:
        self._left_out = True
        log.warning(
            f"the tracker {self._name} is left out from here on, and the run goes on without it",
            reason=reason,
            all_records="metrics.jsonl, evaluations.jsonl and producer.jsonl in the run folder",
        )
