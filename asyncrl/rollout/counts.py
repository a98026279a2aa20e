"""What happened to rollouts: sums, and an entry in the timeline for each attempt."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from asyncrl.rollout.group import Member
from asyncrl.storage.timeline import CUT_OFF, DONE, DROPPED, FAILED, TIMED_OUT, Timeline
from asyncrl.types import RolloutRun


@dataclass(slots=True)
class Counts:
    """Since the process began. Whoever reports keeps a copy of what it has reported."""

    rollouts: int = 0
    retried: int = 0
    dropped: int = 0
    lost: int = 0
    groups: int = 0
    filtered: int = 0
    rejected: int = 0
    requeued: int = 0
    stale: int = 0
    """Groups that were dropped because they were too old."""
    reward_sum: float = 0.0
    reward_count: int = 0
    rollout_s: float = 0.0
    """Of the attempts that ended."""
    model_s: float = 0.0
    """The part of it in calls of the model."""

    def since(self, before: Counts) -> Counts:
        """What has happened since `before`, a copy that was made then."""
        return Counts(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))


def model_seconds(calls: Sequence[float]) -> float:
    """In the columns `timeline.CALL` of one attempt. Calls beside each other count once each."""
    return sum(calls[1::5]) - sum(calls[0::5])


def record_attempt(
    counts: Counts,
    timeline: Timeline | None,
    member: Member,
    calls: Sequence[float],
    outcome: RolloutRun | BaseException | None,
    now: float,
) -> None:
    """An attempt has ended at `now`, with a run, with nothing, or with an error."""
    model_s = model_seconds(calls)
    counts.rollout_s += now - member.started_at
    counts.model_s += model_s
    if timeline is None:
        return
    group = member.group
    draw = group.draw
    tokens = trained = 0
    reward = math.nan
    if isinstance(outcome, RolloutRun):
        reward = outcome.reward
        for segment in outcome.segments:
            tokens += len(segment.tokens)
            trained += sum(segment.loss_mask)
    timeline.attempt(
        (
            *(group.admitted_at, member.started_at, now, draw.epoch, draw.index, member.index, member.attempt),
            *(group.sequence, _outcome(member, outcome), reward, tokens, trained, len(calls) // 5, model_s, 0.0),
        ),
        calls,
    )


def _outcome(member: Member, outcome: Any) -> int:
    if outcome is None:
        return DROPPED
    if not isinstance(outcome, BaseException):
        return DONE
    if isinstance(outcome, asyncio.CancelledError):
        return TIMED_OUT if member.timed_out else CUT_OFF
    return FAILED
