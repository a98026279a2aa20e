"""A run's timeline as a Chrome trace: a file that https://ui.perfetto.dev opens.

    Run                  numbers of every step, as curves
    Trainer              steps, what the trainer did, hot-loads, checkpoints
    Rollouts             a lane for each slot: rollouts, in them the turns of the model and what came between (`tools`)
    Waiting for a slot   rollouts, from the admission of their group to their beginning
    Evaluation           evaluations, and their rollouts

The format is the Trace Event Format, in its JSON object form. Slices of one lane must nest, or viewers drop them: so
times are whole microseconds, rounded down everywhere, and what overlaps goes to another lane. Perfetto takes the colour
of a slice from its name without the digits: a rollout that did not end well is called otherwise.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import heappop, heappush
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple

from asyncrl.errors import ConfigError
from asyncrl.private import private
from asyncrl.reports.recorded import Attempt, Recorded, Window
from asyncrl.storage.timeline import OUTCOMES

SHORTEST_S = 0.001
"""A wait or a gap that is shorter is not drawn."""
COUNTERS = {
    "reward_mean": "reward",
    "staleness_mean": "staleness",
    "in_flight": "in flight",
    "queue_groups": "groups ready",
    "sampler_running": "sampler running",
    "sampler_waiting": "sampler waiting",
    "tokens_per_s": "tokens per s",
}
"""Metrics that are drawn as curves, and what they are called there."""
STEP_FACTS = ("reward_mean", "staleness_mean", "staleness_max", "wait_s", "train_s", "publish_wait_s", "loss_tokens")
RUN, TRAINER, ROLLOUTS, WAITING, EVALUATION = range(1, 6)
PROCESSES = {
    RUN: "Run",
    TRAINER: "Trainer",
    ROLLOUTS: "Rollouts",
    WAITING: "Waiting for a slot",
    EVALUATION: "Evaluation",
}
TRACKS = {"publish": "hot-loads", "checkpoint": "checkpoints", "evaluation": "evaluations"}
"""Tracks of the timeline that have another name in the trace."""
SLOT = "slot"
BEGINS = '{"displayTimeUnit":"ms","traceEvents":['
"""What every trace begins with, and hardly any other file."""

Event = dict[str, Any]


class Slice(NamedTuple):
    """Something that took its time, µs."""

    begin: int
    end: int
    name: str
    facts: Mapping[str, Any]
    inside: Sequence[Slice] = ()
    arrow: str = ""
    """`s`: arrows leave from its end, `f`: they arrive at its beginning; one for each of `groups`."""
    groups: Sequence[int] = ()


@dataclass(slots=True)
class Drawn:
    """What a trace holds."""

    window: Window
    events: int = 0
    rollouts: int = 0
    evaluated: int = 0
    """Rollouts of evaluations."""
    lanes: int = 0
    """The most training rollouts that ran at once."""
    steps: int = 0


class Lanes:
    """Gives each slice a lane in which nothing overlaps it: the lowest free one, so that there are as few as the most
    that overlap. Slices come in the order of their begins.
    """

    def __init__(self) -> None:
        self._busy: list[tuple[int, int]] = []
        self._free: list[int] = []
        self.count = 0

    def place(self, begin: int, end: int) -> int:
        """O(log lanes)."""
        while self._busy and self._busy[0][0] <= begin:
            heappush(self._free, heappop(self._busy)[1])
        if not self._free:
            heappush(self._free, self.count)
            self.count += 1
        lane = heappop(self._free)
        heappush(self._busy, (end, lane))
        return lane


def write_trace(recorded: Recorded, window: Window, path: Path) -> Drawn:
    """Draw what overlaps `window` into a file, gzipped where its name says so; a reader never sees half of it.

    Raises:
        ConfigError: another file stands there.
        OSError: it cannot be written.
    """
    if path.is_file() and not _is_trace(path):
        raise ConfigError(f"{path} is another file, and no trace of asyncrl. Name one that does not exist (--out).")
    tracer = _Tracer(recorded, window)
    beside = path.with_name(f".{path.name}.unfinished")
    with ExitStack() as files:
        files.callback(beside.unlink, missing_ok=True)
        raw = files.enter_context(open(beside, "wb", opener=private))
        packed = files.enter_context(gzip.GzipFile(fileobj=raw, mode="wb", mtime=0)) if path.suffix == ".gz" else raw
        text = files.enter_context(TextIOWrapper(packed, encoding="utf-8"))
        text.write(f"{BEGINS}\n")
        for number, event in enumerate(tracer.events()):
            text.write((",\n" if number else "") + json.dumps(event, separators=(",", ":"), allow_nan=False))
        text.write("\n]}\n")
        text.close()
        raw.close()
        os.replace(beside, path)
    return tracer.drawn


def _is_trace(path: Path) -> bool:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(len(BEGINS)) == BEGINS.encode()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return False


def trace_events(recorded: Recorded, window: Window) -> list[Event]:
    """What `write_trace` writes."""
    return list(_Tracer(recorded, window).events())


class _Tracer:
    """Makes the events of one trace. Owns the numbers of its lanes."""

    def __init__(self, recorded: Recorded, window: Window) -> None:
        self.drawn = Drawn(window)
        self._recorded, self._window = recorded, window
        self._shift_s = max(0.0, -recorded.times.start)  # what the model is worth is measured before the clock starts
        self._threads: dict[tuple[int, str], int] = {}
        self._tracks = recorded.tracks(window)
        self._leave, self._arrive = self._arrows()
        self._beside: list[Slice] = []

    def events(self) -> Iterator[Event]:
        for event in self._all():
            self.drawn.events += 1
            yield event

    def _all(self) -> Iterator[Event]:
        for process, name in PROCESSES.items():
            yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
            yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
        yield from self._curves()
        yield from self._packed(RUN, "lives", self._lives())
        yield from self._packed(TRAINER, "steps", self._steps())
        for track, spans in self._tracks.items():
            process = EVALUATION if track == "evaluation" else TRAINER
            yield from self._packed(process, TRACKS.get(track, track), map(self._span, spans))
        yield from self._packed(ROLLOUTS, SLOT, self._rollouts(evaluation=False))
        yield from self._packed(EVALUATION, SLOT, self._rollouts(evaluation=True))
        yield from self._packed(ROLLOUTS, "turns beside others", sorted(self._beside, key=lambda turn: turn[:2]))
        yield from self._packed(WAITING, "waiting", self._waits())
        for (process, name), thread in self._threads.items():
            where = {"pid": process, "tid": thread}
            yield {"ph": "M", "name": "thread_name", **where, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_sort_index", **where, "args": {"sort_index": thread}}

    # Lanes

    def _us(self, seconds: float) -> int:
        return math.floor((seconds + self._shift_s) * 1e6)

    def _packed(self, process: int, track: str, slices: Iterable[Slice]) -> Iterator[Event]:
        """Slices in the order of their begins, in as many lanes as they need."""
        lanes = Lanes()
        for piece in slices:
            lane = lanes.place(piece.begin, piece.end)
            # No two processes share the number of a lane, and none has that of a process: viewers mix them up.
            name = f"{track} {lane + 1:03}" if track == SLOT or lane else track
            thread = self._threads.setdefault((process, name), len(PROCESSES) + 1 + len(self._threads))
            yield from _drawn(piece, process, thread)
        if process == ROLLOUTS and track == SLOT:
            self.drawn.lanes = lanes.count

    # What is drawn

    def _curves(self) -> Iterator[Event]:
        steps = self._recorded.steps
        for index in self._recorded.steps_in(self._window):
            at = self._us(steps["time_s"][index])
            for metric, name in COUNTERS.items():
                if math.isfinite(value := float(steps[metric][index])):
                    yield {"ph": "C", "name": name, "ts": at, "pid": RUN, "args": {"value": value}}

    def _lives(self) -> Iterator[Slice]:
        lives, window = self._recorded.lives, self._window
        for life, later in zip(lives, [*lives[1:], None], strict=True):
            began, ended = life.began, self._recorded.times.end if later is None else later.began
            if window.holds(began, ended):
                began, ended = max(began, window.start), min(ended, window.end)
                yield self._slice(began, ended, f"life {life.number}", {"unix_time": life.wall + life.began})

    def _steps(self) -> Iterator[Slice]:
        steps = self._recorded.steps
        before = -math.inf
        for index in self._recorded.steps_in(self._window):
            ended = float(steps["time_s"][index])
            began = max(before, ended - float(steps["step_s"][index]))  # the clock was read twice
            facts = {name: float(steps[name][index]) for name in STEP_FACTS}
            known = {name: round(value, 6) for name, value in facts.items() if math.isfinite(value)}
            yield self._slice(began, max(began, ended), f"step {steps['step'][index]:.0f}", known)
            before = ended
            self.drawn.steps += 1

    def _span(self, span: Mapping[str, Any]) -> Slice:
        facts = {name: value for name, value in span.items() if name not in ("track", "name", "began", "ended")}
        found = self._slice(span["began"], span["ended"], span["name"], facts)
        groups = self._arrive.get(span["step"], ()) if span["name"] == "optimizer" else ()
        return found._replace(arrow="f", groups=groups)

    def _slice(self, began: float, ended: float, name: str, facts: Mapping[str, Any]) -> Slice:
        return Slice(self._us(began), self._us(ended), name, facts)

    def _rollouts(self, *, evaluation: bool) -> Iterator[Slice]:
        for attempt, calls in self._recorded.attempts(self._window, evaluation=evaluation):
            self.drawn.rollouts += not evaluation
            self.drawn.evaluated += evaluation
            trained_in = None if evaluation else self._recorded.trained_in.get(int(attempt.sequence))
            name, facts = _name(attempt), _facts(attempt, calls, trained_in)
            found = self._slice(attempt.began, attempt.ended, name, facts)
            last = not evaluation and self._leave.get(int(attempt.sequence)) == (attempt.member, attempt.attempt)
            groups = (int(attempt.sequence),) if last else ()
            yield found._replace(inside=self._inside(found, calls), arrow="s", groups=groups)

    def _inside(self, rollout: Slice, calls: Iterable[Sequence[float]]) -> list[Slice]:
        """The turns of the model, and what came between them. Turns that overlap others are kept for lanes of their
        own."""
        found: list[Slice] = []
        at, shortest = rollout.begin, SHORTEST_S * 1e6
        turns = [self._slice(call[0], call[1], *_turn(number, call)) for number, call in enumerate(calls, start=1)]
        for turn in sorted(turns, key=lambda turn: turn[:2]):
            begin, end = (min(max(time, rollout.begin), rollout.end) for time in turn[:2])
            if begin < at:
                self._beside.append(turn._replace(begin=begin, end=end, name=f"{rollout.name}: {turn.name}"))
                continue
            if begin - at >= shortest:
                found.append(Slice(at, begin, "tools", {}))
            found.append(turn._replace(begin=begin, end=end))
            at = end
        if turns and rollout.end - at >= shortest:
            found.append(Slice(at, rollout.end, "tools", {}))
        return found

    def _waits(self) -> Iterator[Slice]:
        waits = [
            self._slice(attempt.admitted, attempt.began, _name(attempt), {"group": int(attempt.sequence)})
            for attempt, _ in self._recorded.attempts(self._window, evaluation=False)
            if not attempt.attempt and attempt.began - attempt.admitted >= SHORTEST_S
        ]
        yield from sorted(waits, key=lambda wait: wait[:2])

    def _arrows(self) -> tuple[dict[int, tuple[float, float]], dict[int, list[int]]]:
        """Group -> member and attempt that finished it, and step -> its groups; where both ends are in the window."""
        stepped = {span["step"] for span in self._tracks.get("trainer", ()) if span["name"] == "optimizer"}
        leave: dict[int, tuple[float, float]] = {}
        ended: dict[int, float] = {}
        for attempt, _ in self._recorded.attempts(self._window, evaluation=False):
            group = int(attempt.sequence)
            if self._recorded.trained_in.get(group) in stepped and attempt.ended >= ended.get(group, -math.inf):
                leave[group], ended[group] = (attempt.member, attempt.attempt), attempt.ended
        arrive: dict[int, list[int]] = {}
        for group in leave:
            arrive.setdefault(self._recorded.trained_in[group], []).append(group)
        return leave, arrive


def _drawn(piece: Slice, process: int, thread: int) -> Iterator[Event]:
    """What contains others comes first: a viewer keeps the order of what begins at once."""
    where = {"pid": process, "tid": thread}
    event = {"ph": "X", "name": piece.name, "ts": piece.begin, "dur": piece.end - piece.begin, **where}
    yield {**event, "args": piece.facts} if piece.facts else event
    at = piece.begin if piece.arrow == "f" else max(piece.begin, piece.end - 1)
    for group in piece.groups:
        arrow = {"ph": piece.arrow, "cat": "group", "name": "trained", "id": group, "ts": at, **where}
        yield {**arrow, "bp": "e"} if piece.arrow == "f" else arrow
    for inner in piece.inside:
        yield from _drawn(inner, process, thread)


def _name(attempt: Attempt) -> str:
    again = " again" if attempt.attempt else ""
    ending = f" {OUTCOMES[int(attempt.outcome)]}" if attempt.outcome else ""
    return f"row {attempt.row:.0f} #{attempt.member:.0f}{again}{ending}"


def _facts(attempt: Attempt, calls: Sequence[Sequence[float]], trained_in: int | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "outcome": OUTCOMES[int(attempt.outcome)],
        "row": int(attempt.row),
        "epoch": int(attempt.epoch),
        "member": int(attempt.member),
        "attempt": int(attempt.attempt) + 1,
    }
    if attempt.evaluation:
        facts["evaluates"] = int(attempt.evaluation) - 1
    else:
        facts["group"] = int(attempt.sequence)
    if math.isfinite(attempt.reward):
        facts |= {"reward": attempt.reward, "tokens": int(attempt.tokens), "loss_tokens": int(attempt.loss_tokens)}
    facts |= {"turns": int(attempt.turns), "model_s": round(attempt.model_s, 6)}
    versions = [int(version) for *_, version in calls if version >= 0]
    if versions:
        facts |= {"version": min(versions), "newest_version": max(versions)}
    if trained_in is not None:
        facts["trained_in_step"] = trained_in
    return facts


def _turn(number: int, call: Sequence[float]) -> tuple[str, dict[str, Any]]:
    _, _, prompt_tokens, drawn_tokens, version = call
    if version < 0:
        return f"turn {number} without an answer", {"prompt_tokens": int(prompt_tokens)}
    facts = {"prompt_tokens": int(prompt_tokens), "drawn_tokens": int(drawn_tokens), "version": int(version)}
    return f"turn {number}" if drawn_tokens else f"turn {number} scored", facts
