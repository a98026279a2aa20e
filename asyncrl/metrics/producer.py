"""Records of the rollout side, on an axis of its own: a step may wait for rollouts, and rollouts for no step.

    consumes    the attempts that have ended, as the timeline hands them over (4 times a second)
    produces    a record when groups for a step have ended since the last, and at most one a second
    waits for   nothing
    woken by    the timeline

Nothing is done per rollout: the numbers are those of arrays that are kept anyway.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from asyncrl.rollout.counts import Counts
from asyncrl.storage.timeline import ATTEMPT_TYPE, CALL_TYPE, CUT_OFF, DONE, DROPPED, FAILED, TIMED_OUT

Record = dict[str, float]
LEAST_S = 1.0
"""From one record to the next."""


class Producer:
    """Owns what has ended since the last record.

    Args:
        groups: Groups of one record, B: so a chart of it has about as many points as one of the steps.
        counts: Those of the scheduler, which go on counting.
        gauges: How things stand: `step`, `published`, `rollouts_finished`, `in_flight`, `queue_groups`.
        elapsed_s: Seconds of training behind the run. This object is made when a life of it begins.
        write: Takes a record.
    """

    def __init__(
        self,
        *,
        groups: int,
        counts: Counts,
        gauges: Callable[[], Mapping[str, float]],
        elapsed_s: Callable[[], float],
        write: Callable[[Record], None],
    ) -> None:
        self._groups = groups
        self._counts = counts
        self._counted = replace(counts)
        self._gauges = gauges
        self._elapsed_s = elapsed_s
        self._write = write
        self._attempts = bytearray()
        self._calls: array[float] = array("d")
        self._told_s = elapsed_s()

    def take(self, attempts: bytearray, calls: array[float]) -> None:
        """Attempts that have ended, in the columns of `timeline.ATTEMPT`, packed, and their calls."""
        self._attempts += attempts
        self._calls += calls
        enough = self._counts.groups - self._counted.groups >= self._groups
        if enough and self._elapsed_s() - self._told_s >= LEAST_S:
            self._tell()

    def close(self) -> None:
        """Training is over: tell of the groups that have ended since the last record."""
        if self._counts.groups > self._counted.groups:
            self._tell()

    def _tell(self) -> None:
        since, gauges, time_s = self._counts.since(self._counted), self._gauges(), self._elapsed_s()
        attempts, calls = np.frombuffer(self._attempts, ATTEMPT_TYPE), np.frombuffer(self._calls, CALL_TYPE)
        numbers = attempt_numbers(attempts, calls, step=int(gauges["step"]))
        drawn = numbers.pop("drawn_tokens")
        passed_s = time_s - self._told_s
        self._counted, self._told_s = replace(self._counts), time_s
        self._attempts, self._calls = bytearray(), array("d")
        self._write(
            {
                "rollouts_ended": gauges["rollouts_finished"],
                "rollout_step": gauges["step"] + 1,
                "rollout_time_s": time_s,
                "rollout_version": gauges["published"],
                **numbers,
                "rollout_rate_per_s": since.rollouts / passed_s if passed_s > 0 else math.nan,
                "rollout_tokens_per_s": drawn / passed_s if passed_s > 0 else math.nan,
                "rollout_groups": since.groups,
                "rollout_groups_filtered": since.filtered,
                "rollout_groups_rejected": since.rejected,
                "rollout_lost": since.lost,
                "rollout_in_flight": gauges["in_flight"],
                "rollout_queue_groups": gauges["queue_groups"],
            }
        )


def attempt_numbers(attempts: np.ndarray[Any, Any], calls: np.ndarray[Any, Any], *, step: int) -> Record:
    """What attempts come to.

    Args:
        attempts: [A] with the fields of `timeline.ATTEMPT`; those of evaluations are left out, and those that the end
            of the run cut off.
        calls: [C] with those of `timeline.CALL`: the calls of each attempt, one attempt after the other.
        step: Optimizer steps taken.
    """
    counts_here = (attempts["evaluation"] == 0) & (attempts["outcome"] != CUT_OFF)
    if not counts_here.all():
        calls = calls[np.repeat(counts_here, attempts["turns"].astype(np.int64))]
        attempts = attempts[counts_here]
    outcomes = attempts["outcome"]
    done = outcomes == DONE
    return {
        **_of_those_done(attempts if done.all() else attempts[done]),
        "rollout_attempts_dropped": float(np.count_nonzero(outcomes == DROPPED)),
        "rollout_attempts_failed": float(np.count_nonzero(outcomes == FAILED)),
        "rollout_attempts_timed_out": float(np.count_nonzero(outcomes == TIMED_OUT)),
        "rollout_lag_mean": step - _mean(calls["version"], calls["drawn_tokens"]),
        "drawn_tokens": float(calls["drawn_tokens"].sum()),
    }


def _of_those_done(done: np.ndarray[Any, Any]) -> Record:
    seconds, first = done["ended"] - done["began"], done["attempt"] == 0
    middle_s, late_s = np.quantile(seconds, (0.5, 0.95)) if len(done) else (math.nan, math.nan)
    return {
        "rollout_reward_mean": _mean(done["reward"]),
        "rollout_reward_std": float(done["reward"].std()) if len(done) else math.nan,
        "rollout_mean_s": _mean(seconds),
        "rollout_p50_s": float(middle_s),
        "rollout_p95_s": float(late_s),
        "rollout_max_s": _most(seconds),
        "rollout_queue_s": _mean((done["began"] - done["admitted"])[first]),
        "rollout_model_share": _mean(done["model_s"]) / _mean(seconds) if seconds.any() else math.nan,
        "rollout_turns_mean": _mean(done["turns"]),
        "rollout_turns_max": _most(done["turns"]),
        "rollout_tokens_mean": _mean(done["tokens"]),
        "rollout_tokens_max": _most(done["tokens"]),
        "rollout_loss_tokens_mean": _mean(done["loss_tokens"]),
    }


def _mean(values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any] | None = None) -> float:
    if not len(values) or (weights is not None and not weights.any()):
        return math.nan
    return float(values.mean() if weights is None else np.average(values, weights=weights))


def _most(values: np.ndarray[Any, Any]) -> float:
    return float(values.max()) if len(values) else math.nan
