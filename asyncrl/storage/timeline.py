"""The timeline: when every rollout began, called the model, and ended, and what the trainer did meanwhile.

    RUN/timeline/life-0/attempts.f8   a row per attempt of a rollout (`ATTEMPT`), in the order of their ends
    RUN/timeline/life-0/calls.f8      a row per model call (`CALL`); those of an attempt are the next `turns` rows
    RUN/timeline/life-0/spans.jsonl   the clock, then what the trainer, hot-loads, checkpoints and evaluations took

It has to be cheap, for it is about every rollout: the loop appends numbers to an array, and a thread writes the
array as it is. Nothing is made into text, and nothing is done per rollout, by anybody.
"""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from struct import Struct
from threading import Thread
from typing import IO, Any

import numpy as np
import structlog

from asyncrl.private import private

ATTEMPT = (
    *("admitted", "began", "ended", "epoch", "row", "member", "attempt", "sequence", "outcome", "reward"),
    *("tokens", "loss_tokens", "turns", "model_s", "evaluation"),
)
"""Columns of an attempt, each a float64.

    admitted, began, ended   s; the group was admitted, this attempt began (in its slot), and ended
    outcome                  index into `OUTCOMES`
    reward                   nan where there is none
    tokens, loss_tokens      of all segments
    turns, model_s           calls of the model, and the seconds in them
    evaluation               0 in training; else 1 + the version that is measured
"""
CALL = ("began", "ended", "prompt_tokens", "drawn_tokens", "version")
"""Columns of a model call, each a float64. `version` is that of its last token; -1 where none was drawn."""

OUTCOMES = ("done", "dropped", "failed", "timed out", "cut off")
DONE, DROPPED, FAILED, TIMED_OUT, CUT_OFF = range(len(OUTCOMES))

MOST_WAITING_BYTES = 64 << 20
"""That may wait for the disk: of 100,000 rollouts with ten turns each. What comes while more wait is left out."""
CLOSE_LIMIT_S = 30.0

ATTEMPT_TYPE = np.dtype([(name, "<f8") for name in ATTEMPT])
PACK_ATTEMPT = Struct(f"<{len(ATTEMPT)}d").pack
CALL_TYPE = np.dtype([(name, "<f8") for name in CALL])

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is written at once."""

    attempts: bytearray
    calls: array[float]
    spans: list[dict[str, Any]]

    @property
    def size(self) -> int:
        """In bytes, nearly."""
        return len(self.attempts) + 8 * len(self.calls) + 500 * len(self.spans)


class Timeline:
    """Records one life of a run. Used from the event loop; a thread writes.

    A disk that is full or slow costs the rest of the timeline and a line in the log, never the run.

    Args:
        folder: `RUN/timeline`. None: nothing is written, and `on_flush` alone hears of it.
        life: Number of the process that works on the run; 0 is the first.
    """

    def __init__(self, folder: Path | None, life: int = 0) -> None:
        self.on_flush: Callable[[bytearray, array[float]], None] = lambda attempts, calls: None
        """Gets the attempts and the calls that are handed over, as they are written."""
        self._folder = folder / f"life-{life}" if folder is not None else None
        self._life = life
        self.attempts = bytearray()
        """Those that have ended, packed as they come: later their numbers would be in no cache any more."""
        self.calls: array[float] = array("d")
        self._spans: list[dict[str, Any]] = []
        self._jobs: SimpleQueue[_Parts | None] = SimpleQueue()
        self._handed_over = 0  # bytes; the loop counts these,
        self._taken = 0  # and the thread those
        self._dropping = False
        self._thread: Thread | None = None
        if self._folder is not None:
            self._thread = Thread(target=self._run, args=(self._folder,), name="asyncrl timeline", daemon=True)
            self._thread.start()

    def starts(self, origin: float, now: float) -> None:
        """Training begins, `now` on the loop's clock; `origin` is there where `time_s` of the step records is 0."""
        clock = {"life": self._life, "origin": origin, "began": now, "wall": time.time() - (now - origin)}
        self._spans.insert(0, clock)

    def attempt(self, row: Sequence[float], calls: list[float]) -> None:
        """Take an attempt that has ended: the columns of `ATTEMPT`, and those of `CALL` for each of its calls."""
        self.attempts += PACK_ATTEMPT(*row)
        self.calls.fromlist(calls)

    def span(self, track: str, name: str, began: float, ended: float, **about: float | str) -> None:
        """Take something that is not a rollout, on the loop's clock."""
        self._spans.append({"track": track, "name": name, "began": began, "ended": ended, **about})

    def flush(self) -> None:
        """Hand over what there is. Returns at once."""
        if not self.attempts and not self._spans:
            return
        parts = _Parts(self.attempts, self.calls, self._spans)
        self.attempts, self.calls, self._spans = bytearray(), array("d"), []
        self.on_flush(parts.attempts, parts.calls)
        if self._thread is None:
            return
        if self._handed_over - self._taken + parts.size <= MOST_WAITING_BYTES:
            self._handed_over += parts.size
            self._jobs.put(parts)
        elif not self._dropping:
            self._dropping = True
            log.warning("the disk does not take the timeline: a part of it is left out", folder=str(self._folder))

    def close(self) -> None:
        """Write the rest. A disk that never answers holds it up for `CLOSE_LIMIT_S` at most."""
        self.flush()
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_LIMIT_S)
            if self._thread.is_alive():
                log.warning("the disk does not take the timeline: its end is left out", folder=str(self._folder))

    # The thread

    def _run(self, folder: Path) -> None:
        try:
            for made in (folder.parent, folder):  # the mode is that of the last folder alone
                made.mkdir(mode=0o700, exist_ok=True)
            with (
                open(folder / "attempts.f8", "wb", opener=private) as attempts,
                open(folder / "calls.f8", "wb", opener=private) as calls,
                open(folder / "spans.jsonl", "wb", opener=private) as spans,
            ):
                while (parts := self._next()) is not None:
                    _write(parts, attempts, calls, spans)
        except Exception as error:  # whatever ends the thread must be told, and the run goes on
            log.warning("the rest of the timeline is not written", folder=str(folder), error=repr(error))
            while self._next() is not None:
                pass

    def _next(self) -> _Parts | None:
        parts = self._jobs.get()
        if parts is not None:
            self._taken += parts.size
        return parts


def _write(parts: _Parts, attempts: IO[bytes], calls: IO[bytes], spans: IO[bytes]) -> None:
    """Calls first: whoever reads meanwhile, or after the end of the process, finds those of every attempt."""
    lines = "".join(json.dumps(span) + "\n" for span in parts.spans).encode()
    for file, content in ((calls, parts.calls), (attempts, parts.attempts), (spans, lines)):
        file.write(content)
        file.flush()


@dataclass(frozen=True, slots=True)
class LifeTimes:
    """The timeline of one life. Times are seconds on the axis of the step records' `time_s`."""

    number: int
    began: float
    """When it began to train: where the life before it is gone on from."""
    wall: float
    """Unix time at 0."""
    attempts: np.ndarray
    """[A] with the fields of `ATTEMPT`."""
    calls: np.ndarray
    """[C] with the fields of `CALL`."""
    first_call: np.ndarray
    """[A] where the calls of each attempt begin."""
    spans: list[dict[str, Any]]


def read_timeline(run: Path) -> list[LifeTimes]:
    """What was recorded in the run folder `run`, one entry per life; none where nothing was. What the end of the
    process cut off is left out.
    """
    folders = [path for path in (run / "timeline").glob("life-*") if path.name[5:].isdecimal()]
    lives = (_read_life(folder) for folder in sorted(folders, key=lambda path: int(path.name[5:])))
    return [life for life in lives if life is not None]


def _read_life(folder: Path) -> LifeTimes | None:
    lines = _read_spans(folder / "spans.jsonl")
    clock = next((line for line in lines if "origin" in line), None)
    if clock is None:
        return None  # it ended before training began
    origin = clock["origin"]
    attempts, calls = _read_rows(folder / "attempts.f8", ATTEMPT_TYPE), _read_rows(folder / "calls.f8", CALL_TYPE)
    turns = attempts["turns"].astype(np.int64)
    first = np.cumsum(turns) - turns
    whole = int(np.searchsorted(np.cumsum(turns), len(calls), side="right"))
    attempts, first = attempts[:whole], first[:whole]
    for columns, names in ((attempts, ("admitted", "began", "ended")), (calls, ("began", "ended"))):
        for name in names:
            columns[name] -= origin
    spans = [
        {**line, "began": line["began"] - origin, "ended": line["ended"] - origin} for line in lines if "track" in line
    ]
    return LifeTimes(int(clock["life"]), clock["began"] - origin, clock["wall"], attempts, calls, first, spans)


def _read_rows(path: Path, row: np.dtype[Any]) -> np.ndarray:
    if not path.exists():
        return np.zeros(0, row)
    return np.fromfile(path, row, count=path.stat().st_size // row.itemsize)


def _read_spans(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:  # cut off
            break
    return found
