"""The members of one prompt while they roll out. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from asyncrl.data import Draw
from asyncrl.types import RolloutRun


@dataclass(slots=True)
class Member:
    """One rollout of a group. Owns nothing but its own state."""

    group: OpenGroup
    index: int
    attempt: int = 0
    started_at: float = 0.0
    timed_out: bool = False
    abandoned: bool = False
    task: Any = None
    """The asyncio task that runs it."""

    def __repr__(self) -> str:
        draw = self.group.draw
        return f"row {draw.index} (epoch {draw.epoch}), rollout {self.index}, attempt {self.attempt + 1}"


@dataclass(slots=True)
class OpenGroup:
    """A group that was admitted and has members under way. Owns their runs until all have ended."""

    sequence: int
    draw: Draw
    size: int
    version: int
    admitted_at: float
    runs: dict[int, RolloutRun] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    """How long each run took."""
    started: int = 0
    ended: int = 0

    @property
    def all_started(self) -> bool:
        return self.started == self.size

    @property
    def complete(self) -> bool:
        return self.ended == self.size

    def start_member(self) -> Member:
        assert not self.all_started
        member = Member(self, self.started)
        self.started += 1
        return member

    def end_member(self, member: Member, run: RolloutRun | None, now: float) -> None:
        """The member has a run at time `now`, or is lost."""
        assert member.index not in self.runs
        self.ended += 1
        assert self.ended <= self.started
        if run is not None:
            self.runs[member.index] = run
            self.seconds[member.index] = now - member.started_at
