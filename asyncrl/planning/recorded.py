"""The workload of a real run: what its rollouts did, from its timeline.

All that were admitted count, not only what was trained: the long ones are those that a run drops or never sees the end
of. A rollout that the end of the run cut off says that it takes longer than its age; it is given the rest of one that
was older than that when it ended (as a Kaplan-Meier estimate does it).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from asyncrl.errors import DataError
from asyncrl.planning.workload import Attempt, Call, Outcome, Turn, Workload
from asyncrl.reports.run_data import RunData
from asyncrl.storage.timeline import CUT_OFF, OUTCOMES, LifeTimes

MOST_GROUPS = 4000
"""The newest ones: rollouts change while a policy learns."""
TOGETHER_S = 1e-4
"""Calls that overlap by more than this were made at once."""
OUTCOME: dict[str, Outcome] = {"done": "done", "dropped": "dropped", "failed": "failed", "timed out": "timed out"}

Recorded = tuple[Attempt, float, bool]
"""An attempt, its seconds, and whether it was cut off."""


def workload_of(run: RunData) -> Workload:
    """
    Raises:
        DataError: the run has no timeline, or no rollout in it has ended.
    """
    if not run.timeline:
        raise DataError(
            f"{run.root} has no timeline: it was recorded with record_timeline = false, by an older version, or ended "
            "before training began. Expected a run with one: a few dozen steps are enough."
        )
    groups = [group for life in run.timeline for group in _groups(life)][-MOST_GROUPS:]
    ended = sorted(
        ((seconds, attempt) for group in groups for member in group for attempt, seconds, cut in member if not cut),
        key=lambda found: found[0],
    )
    if not ended:
        raise DataError(f"no rollout of {run.root} has ended, so there is nothing to learn from. Let it run longer.")
    ages = [seconds for seconds, _ in ended]
    rng = random.Random(0)

    def whole(recorded: Recorded) -> Attempt:
        attempt, seconds, cut = recorded
        first = int(np.searchsorted(ages, seconds, side="right"))
        return attempt if not cut or first == len(ages) else ended[rng.randrange(first, len(ages))][1]

    rows = tuple(tuple(tuple(whole(recorded) for recorded in member) for member in group) for group in groups)
    return Workload(rows, about=f"{sum(map(len, rows)):,} rollouts of {run.root}")


def _groups(life: LifeTimes) -> Iterator[list[list[Recorded]]]:
    """Those that were begun in training, in the order of their admission: their members, each with its attempts."""
    attempts = life.attempts
    training = np.flatnonzero(attempts["evaluation"] == 0)
    order = training[
        np.lexsort((attempts["attempt"][training], attempts["member"][training], attempts["sequence"][training]))
    ]
    group: list[list[Recorded]] = []
    last: tuple[float, float] | None = None
    for index in order.tolist():
        row = attempts[index]
        place = float(row["sequence"]), float(row["member"])
        if last is not None and place[0] != last[0]:
            yield group
            group = []
        if not group or place != last:
            group.append([])
        last = place
        first = int(life.first_call[index])
        calls = life.calls[first : first + int(row["turns"])]
        group[-1].append((_attempt(row, calls), float(row["ended"] - row["began"]), row["outcome"] == CUT_OFF))
    if group:
        yield group


def _attempt(row: np.void, calls: np.ndarray) -> Attempt:
    turns, end = _turns(calls, float(row["began"]))
    done = OUTCOMES[int(row["outcome"])] == "done"
    return Attempt(
        turns=turns,
        after_s=max(0.0, float(row["ended"]) - end),
        outcome=OUTCOME.get(OUTCOMES[int(row["outcome"])], "done"),
        reward=float(row["reward"]) if done else 0.0,
        tokens=int(row["tokens"]) if done else 0,
        loss_tokens=int(row["loss_tokens"]) if done else 0,
    )


def _turns(calls: np.ndarray, began: float) -> tuple[tuple[Turn, ...], float]:
    """The turns, and when the last one ended."""
    turns: list[tuple[float, list[Call]]] = []
    end, seen = began, 0
    for call in np.sort(calls, order="began"):
        prompt, drawn = int(call["prompt_tokens"]), int(call["drawn_tokens"])
        made = Call(prompt - seen if prompt >= seen else prompt, prompt, drawn)
        if turns and call["began"] < end - TOGETHER_S:
            turns[-1][1].append(made)
        else:
            turns.append((max(0.0, float(call["began"]) - end), [made]))
        end, seen = max(end, float(call["ended"])), max(seen, prompt + drawn)
    return tuple(Turn(gap_s, tuple(made)) for gap_s, made in turns), end
