"""What a run recorded of its time, on one axis: its lives one after the other, without what a resume has taken back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from asyncrl.errors import DataError
from asyncrl.reports.run_data import Records, read_records
from asyncrl.storage.folder import RunFolder, existing_run
from asyncrl.storage.ledger_file import read_ledger
from asyncrl.storage.timeline import ATTEMPT, LifeTimes, read_timeline

EVENTS_OF_A_STEP = 16
"""In a trace: the step, its curves, and what the trainer did. Few against the rollouts of a step."""
TOUCH_S = 1e-4
"""What overlaps a step by less only touches it: the step before it, above all."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of the run, in seconds on the axis of the step records' `time_s`. What overlaps it is in it, whole."""

    start: float = -math.inf
    end: float = math.inf

    def holds(self, began: float, ended: float) -> bool:
        return ended >= self.start and began <= self.end


class Attempt(NamedTuple):
    """A row of the timeline (`storage.timeline.ATTEMPT`)."""

    admitted: float
    began: float
    ended: float
    epoch: float
    row: float
    member: float
    attempt: float
    sequence: float
    outcome: float
    reward: float
    tokens: float
    loss_tokens: float
    turns: float
    model_s: float
    evaluation: float


assert Attempt._fields == ATTEMPT


@dataclass(frozen=True, slots=True)
class Recorded:
    """Times are seconds on the axis of the step records' `time_s`."""

    lives: Sequence[LifeTimes]
    """Without what is undone."""
    steps: Records
    trained_in: Mapping[int, int]
    """Place in the order of admission -> the optimizer step that trained the group."""
    undone: int = 0
    """Attempts that were left out: a later life went on from before their end."""

    @property
    def times(self) -> Window:
        """From the first to the last moment that anything is known of."""
        began, ended = self.steps["time_s"] - self.steps["step_s"], self.steps["time_s"]
        for life in self.lives:
            spans = life.spans
            began = np.concatenate([began, life.attempts["admitted"], [span["began"] for span in spans]])
            ended = np.concatenate([ended, life.attempts["ended"], [span["ended"] for span in spans]])
        return Window(float(np.nanmin(began)), float(np.nanmax(ended))) if len(ended) else Window(0.0, 0.0)

    def newest(self, most_events: int) -> Window:
        """All times, or as much of their end as about `most_events` of a trace can show."""
        whole = self.times
        ends, events = [self.steps["time_s"]], [np.full(len(self.steps), EVENTS_OF_A_STEP)]
        for life in self.lives:
            ends.append(life.attempts["ended"])
            events.append(3 + 2 * life.attempts["turns"])
        moments, counts = np.concatenate(ends), np.concatenate(events)
        newest_first = np.argsort(-moments, kind="stable")
        shown = int(np.searchsorted(np.cumsum(counts[newest_first]), most_events, side="right"))
        return whole if shown == len(moments) else replace(whole, start=float(moments[newest_first[max(shown - 1, 0)]]))

    def steps_in(self, window: Window) -> Iterator[int]:
        """The places of the step records that overlap it."""
        for index, (ended, took) in enumerate(zip(self.steps["time_s"], self.steps["step_s"], strict=True)):
            if window.holds(ended - took, ended):
                yield index

    def window_of(self, first: int, last: int) -> Window:
        """From the beginning of step `first` to the end of step `last`.

        Raises:
            DataError: the run has no such steps.
        """
        numbers = self.steps["step"]
        chosen = np.flatnonzero((numbers >= first) & (numbers <= last))
        if not len(chosen):
            known = f"steps {numbers[0]:.0f} to {numbers[-1]:.0f}" if len(numbers) else "no steps yet"
            asked = f"step {first} is" if first == last else f"steps {first} to {last} are"
            raise DataError(f"{asked} not there: the run has {known}.")
        ended, took = self.steps["time_s"][chosen], self.steps["step_s"][chosen]
        return Window(float(ended[0] - took[0]) + TOUCH_S, float(ended[-1]) - TOUCH_S)

    def attempts(self, window: Window, *, evaluation: bool) -> Iterator[tuple[Attempt, list[tuple[float, ...]]]]:
        """Those that overlap the window, in the order of their begins, each with its calls of the model (`CALL`).
        Members of a group that begin at once are beside each other.
        """
        found: list[tuple[float, float, float, int, int]] = []
        for number, life in enumerate(self.lives):
            rows = life.attempts
            chosen = (rows["ended"] >= window.start) & (rows["began"] <= window.end)
            places = np.flatnonzero(chosen & ((rows["evaluation"] > 0) == evaluation))
            order = (rows[name][places].tolist() for name in ("began", "sequence", "member"))
            found += zip(*order, [number] * len(places), places.tolist(), strict=True)
        found.sort()
        for *_, number, index in found:
            life = self.lives[number]
            attempt = Attempt._make(life.attempts[index].item())
            first = int(life.first_call[index])
            yield attempt, life.calls[first : first + int(attempt.turns)].tolist()

    def tracks(self, window: Window) -> dict[str, list[Mapping[str, Any]]]:
        """What is no rollout, by track, in the order of their begins."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for life in self.lives:
            for span in life.spans:
                if window.holds(span["began"], span["ended"]):
                    found.setdefault(span["track"], []).append(span)
        for spans in found.values():
            spans.sort(key=lambda span: (span["began"], span["ended"]))
        return found


def read_recorded(run: str | Path) -> Recorded:
    """Read what the run in the folder `run` has recorded up to now.

    Raises:
        ConfigError: there is no such folder.
        DataError: there is no timeline in it, or a file in it is not what a run writes.
    """
    root = existing_run(run)
    lives = read_timeline(root)
    if not lives:
        raise DataError(
            f"{root} holds no timeline. A run writes it from the beginning of its training on, unless it has "
            "record_timeline = false; those of older versions of asyncrl have none."
        )
    files = RunFolder(root)
    standing = [_until(life, _gone_on_from(life, lives)) for life in lives]
    undone = sum(len(life.attempts) for life in lives) - sum(len(life.attempts) for life in standing)
    with read_ledger(files.ledger) if files.ledger.is_file() else nullcontext() as ledger:
        trained_in = ledger.trained_in() if ledger is not None else {}
    return Recorded(standing, read_records(files.metrics), trained_in, undone)


def _gone_on_from(life: LifeTimes, lives: Sequence[LifeTimes]) -> float:
    return min((later.began for later in lives if later.number > life.number), default=math.inf)


def _until(life: LifeTimes, time: float) -> LifeTimes:
    """Without what happened after it; what went on then has its end there."""
    stays = life.attempts["ended"] <= time
    spans = [{**span, "ended": min(span["ended"], time)} for span in life.spans if span["began"] < time]
    return replace(life, attempts=life.attempts[stays], first_call=life.first_call[stays], spans=spans)
