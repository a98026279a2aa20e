"""What happened to rollouts: sums, and an entry in the timeline for each attempt."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from asyncrl.errors import RolloutTimeout
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
    if timeline is not None:
        timeline.attempt(attempt_columns(member, calls, outcome, now, model_s, 0), calls)


def model_seconds(calls: Sequence[float]) -> float:
    """In the columns `timeline.CALL` of one attempt. Calls beside each other count once each."""
    if len(calls) <= 5:
        return calls[1] - calls[0] if calls else 0.0
    return sum(calls[1::5]) - sum(calls[0::5])


def attempt_columns(
    member: Member,
    calls: Sequence[float],
    outcome: RolloutRun | BaseException | None,
    now: float,
    model_s: float,
    evaluation: int,
) -> tuple[float, ...]:
    """Those of `timeline.ATTEMPT`. Written for speed: it is called for every rollout."""
    group = member.group
    draw = group.draw
    if isinstance(outcome, RolloutRun) and not member.abandoned:
        state, reward, segments = DONE, outcome.reward, outcome.segments
    else:
        state, reward, segments = _ending(member, outcome), math.nan, []
    tokens = loss_tokens = 0
    for segment in segments:
        tokens += len(segment.tokens)
        loss_tokens += sum(segment.loss_mask)
    # fmt: off
    return (
        group.admitted_at, member.started_at, now, draw.epoch, draw.index, member.index, member.attempt, group.sequence,
        state, reward, tokens, loss_tokens, len(calls) // 5, model_s, evaluation,
    )
    # fmt: on


def _ending(member: Member, outcome: RolloutRun | BaseException | None) -> int:
    cancelled = isinstance(outcome, asyncio.CancelledError)
    if member.abandoned or isinstance(outcome, RolloutTimeout) or (cancelled and member.timed_out):
        return TIMED_OUT
    if cancelled:
        return CUT_OFF
    return DROPPED if outcome is None else FAILED
