"""Whether a ledger adds up: a pure fold over its events. `audit_run.py` holds the rest of the run folder against it.

    admitted = trained + filtered + rejected + pending, in the lineage: the events that are not undone

Every way in which a prompt can be lost, ended twice, or trained by what it should not have been, is a `Fault` here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from asyncrl.storage.ledger import Key
from asyncrl.storage.ledger_file import Bounds, Event, Life

Kind = Literal[
    "lost event",
    "unknown draw",
    "begun twice",
    "ended twice",
    "trained twice",
    "out of order",
    "steps",
    "batch size",
    "staleness",
    "coverage",
    "conservation",
    "checkpoint",
    "records",
]
ENDS = ("trained", "filtered", "rejected")
BEGINNINGS = ("admitted", "requeued", "restarted")
MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is off."""

    kind: Kind
    what: str


@dataclass(slots=True)
class _Draw:
    """Where a draw of the lineage stands."""

    state: str
    life: int
    """That began it last."""
    version: int | None = None
    """That it finished with."""
    step: int | None = None
    """That trained it."""


@dataclass(frozen=True, slots=True)
class Tally:
    """How the lineage stood behind one event."""

    step: int
    counts: Mapping[str, int]


@dataclass(slots=True)
class LifeTally:
    """What one life did, undone or not."""

    events: int = 0
    undone: int = 0
    steps: tuple[int, int] | None = None
    """The first and the last optimizer step that it took and that is not undone."""


@dataclass(slots=True)
class Account:
    """Owns what has been read so far. Feed it every event in order, undone ones too; then ask `conclude`."""

    lives: Sequence[Life]
    marks: Collection[int] = ()
    """Events behind which a `Tally` is taken: those of checkpoints."""
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Events of the lineage, by state."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Of rejections."""
    tallies: dict[int, Tally] = field(default_factory=dict)
    by_life: dict[int, LifeTally] = field(default_factory=lambda: defaultdict(LifeTally))
    step: int = 0
    """The last that trained something."""
    last: int = 0
    """Number of the last event, undone or not."""
    last_at: float | None = None
    """s since 1970."""
    _bounds: dict[int, Bounds | None] = field(init=False)
    """Of each life."""
    _draws: dict[Key, _Draw] = field(default_factory=dict)
    _groups: int = 0
    """That the last step trained."""

    def __post_init__(self) -> None:
        self._bounds = {life.life: life.bounds for life in self.lives}

    def read(self, events: Iterable[Event]) -> None:
        self._mark(0)
        for event in events:
            if event.id != self.last + 1:
                gap = f"event {self.last + 1}" + (f" to {event.id - 1}" if event.id > self.last + 2 else "")
                self._off("lost event", f"{gap} of the ledger is missing")
            self.last, self.last_at = event.id, event.time
            tally = self.by_life[event.life]
            tally.events += 1
            tally.undone += event.undone
            if not event.undone:
                self._follow(event)
                self._mark(event.id)

    def pending(self) -> int:
        return sum(draw.state not in ENDS for draw in self._draws.values())

    def summary(self) -> dict[str, int]:
        """In the words of `Ledger.summary`."""
        counted = {state: self.counts[state] for state in ("admitted", *ENDS)}
        return {**counted, "pending": self.pending(), "requeued": self.counts["requeued"]}

    def conclude(self, *, data_ended: bool) -> list[Fault]:
        """All faults, those of the whole included. `data_ended`: the run is over, and nothing but its data ended it."""
        counts = self.summary()
        ended = sum(counts[end] for end in ENDS)
        if counts["admitted"] != ended + counts["pending"]:
            self._off(
                "conservation",
                f"{counts['admitted']} draws were admitted, but {ended} ended and {counts['pending']} are pending",
            )
        if self.lives and self.lives[-1].bounds is not None:
            self._check_coverage(self.lives[-1].bounds, data_ended)
        return self.faults

    # One event of the lineage

    def _follow(self, event: Event) -> None:
        self.counts[event.state] += 1
        key = (event.epoch, event.row)
        draw = self._draws.get(key)
        if draw is None:
            if event.state != "admitted":
                self._off("unknown draw", f"{event.draw} was {event.state}, but never admitted")
            draw = self._draws[key] = _Draw(event.state, event.life)
        elif draw.state in ENDS:
            self._ended_before(event, draw)
        elif event.state == "admitted":
            self._off("begun twice", f"{event.draw} was admitted a second time")
        else:
            self._check_order(event, draw)
        if event.state in BEGINNINGS:
            draw.life = event.life
        elif event.state == "finished":
            draw.version = event.version
        elif event.state == "trained":
            self._trained(event, draw)
        elif event.state == "rejected":
            self.reasons[event.reason or ""] += 1
        draw.state = event.state

    def _ended_before(self, event: Event, draw: _Draw) -> None:
        if event.state == draw.state == "trained":
            self._off("trained twice", f"{event.draw} was trained in step {draw.step} and again in step {event.step}")
        elif event.state in ENDS:
            self._off("ended twice", f"{event.draw} was {draw.state}, and then {event.state}")
        else:
            self._off("begun twice", f"{event.draw} was {draw.state}, and then {event.state}")

    def _check_order(self, event: Event, draw: _Draw) -> None:
        """The draw is pending."""
        begun, same_life = draw.state != "finished", draw.life == event.life
        why = None
        match event.state:
            case "requeued" if begun:
                why = "was rolled out again while its rollouts ran"
            case "restarted" if not begun or same_life:
                why = "was restarted, but nothing had cut it off"
            case "finished" if not begun:
                why = "finished twice"
            case "trained" if begun:
                why = "was trained, but had not finished"
        if begun and not same_life and event.state not in BEGINNINGS:
            why = f"was {event.state} in life {event.life}, which had not begun it"
        if why is not None:
            self._off("out of order", f"{event.draw} {why}")

    def _trained(self, event: Event, draw: _Draw) -> None:
        step = event.step
        if step is None:
            self._off("steps", f"{event.draw} was trained in no step")
            return
        if step not in (self.step, self.step + 1):
            self._off("steps", f"{event.draw} was trained in step {step}, right after step {self.step}")
        draw.step = step
        self._groups = self._groups + 1 if step == self.step else 1
        self.step = step
        tally = self.by_life[event.life]
        tally.steps = (tally.steps[0] if tally.steps else step, step)
        if (bounds := self._bounds.get(event.life)) is None:
            return
        if self._groups == bounds.groups_per_step + 1:
            self._off("batch size", f"step {step} trained more than {bounds.groups_per_step} groups")
        age = step - 1 - draw.version if draw.version is not None else 0
        if bounds.max_staleness is not None and age > bounds.max_staleness:
            self._off(
                "staleness",
                f"{event.draw} began at version {draw.version} and was trained in step {step}: {age} steps old, more "
                f"than {bounds.max_staleness}",
            )

    def _mark(self, number: int) -> None:
        if number in self.marks:
            self.tallies[number] = Tally(self.step, self.summary())

    # The whole

    def _check_coverage(self, bounds: Bounds, data_ended: bool) -> None:
        """An epoch begins when the one before has been handed out, so an earlier one is whole at any time."""
        epochs: dict[int, set[int]] = defaultdict(set)
        for epoch, row in self._draws:
            epochs[epoch].add(row)
            if not (0 <= epoch < bounds.epochs and 0 <= row < bounds.rows):
                self._off("coverage", f"row {row} of epoch {epoch} is none of {bounds.epochs} x {bounds.rows} draws")
        over = bounds.epochs if data_ended else max(epochs, default=0)
        for epoch in range(over):
            if missing := sorted(set(range(bounds.rows)) - epochs[epoch]):
                self._off("coverage", f"epoch {epoch} is over, but never had row {_some(missing)}")
        if data_ended:
            for (epoch, row), draw in self._draws.items():
                if draw.state not in ENDS:
                    self._off("coverage", f"row {row} of epoch {epoch} is {draw.state} at the end of the data")

    def _off(self, kind: Kind, what: str) -> None:
        self.faults.append(Fault(kind, what))


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return ", ".join(map(str, numbers[:MOST_NAMED])) + more
