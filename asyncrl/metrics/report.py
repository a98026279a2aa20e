"""What the time of a run went into: sums over step records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from asyncrl.rollout.held import REASONS

PARTS = ("wait_s", "train_s", "publish_wait_s", "checkpoint_s")
"""Of the trainer's time; they do not overlap."""
_SUMS = (
    *PARTS,
    *(f"wait_{reason}_s" for reason in REASONS),
    *("wait_straggler_s", "loop_blocked_s", "rollout_s", "model_s"),
    *("rollouts_finished", "members_retried", "groups_filtered", "groups_trained"),
)
_MEANS = (
    *("eval_in_flight", "window", "window_congested", "kv_use", "staleness_max", "replicas_up", "replica_spread"),
    *("sampler_running", "sampler_waiting", "sampler_full"),
)


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Shares of the trainer's time. They add up to at most 1; the rest is bookkeeping."""

    waiting: float
    """No batch was ready."""
    training: float
    publishing: float
    """Waiting for a hot-load to end."""
    saving: float
    """Standing still for a checkpoint."""

    def __str__(self) -> str:
        parts = {
            "waiting for rollouts": self.waiting,
            "training": self.training,
            "publishing": self.publishing,
            "checkpoints": self.saving,
        }
        shown = {name: f"{share:.0%}" for name, share in parts.items()}
        if shown["checkpoints"] == "0%":
            del shown["checkpoints"]
        return ", ".join(f"{name} {share}" for name, share in shown.items())


class Account:
    """What the time of a run went into. Owns sums alone: a run of a million steps needs no more memory than its first.

    The metrics are those of docs/metrics.md; one that is absent, null or not a number counts as 0.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.steps = 0
        self.seconds = 0.0
        self._sums: dict[str, float] = defaultdict(float)
        self._weights: dict[str, float] = defaultdict(float)
        self._most: dict[str, float] = {}
        self._busiest: dict[int, float] = defaultdict(float)
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the record of one more optimizer step."""
        self.steps += 1
        values = {name: _number(record, name) or 0.0 for name in _SUMS}
        for name, value in values.items():
            self._sums[name] += value
        step_s = max(_number(record, "step_s") or 0.0, sum(values[name] for name in PARTS))
        self.seconds += step_s
        for name in _MEANS:
            if (gauge := _number(record, name)) is not None:
                self._sums[name] += gauge * step_s
                self._weights[name] += step_s
                self._most[name] = max(gauge, self._most.get(name, gauge))
        if (busiest := _number(record, "replica_busiest")) is not None:
            self._busiest[int(busiest)] += step_s

    def shares(self) -> TimeShares | None:
        """Over all steps together; None when they took no time."""
        return TimeShares(*(self.share(name) for name in PARTS)) if self.seconds > 0 else None

    def share(self, name: str) -> float:
        """Of the time, for a metric in seconds."""
        return self._sums[name] / self.seconds if self.seconds > 0 else 0.0

    def sum(self, name: str) -> float:
        return self._sums[name]

    def mean(self, name: str) -> float:
        """Of a gauge, each step by its length; 0 where it is unknown."""
        return self._sums[name] / self._weights[name] if self._weights[name] > 0 else 0.0

    def most(self, name: str) -> float:
        """The largest value of a gauge; 0 where it is unknown."""
        return self._most.get(name, 0.0)

    def busiest_replica(self) -> tuple[int, float]:
        """Its number from 1, and for which share of the time it was the busiest. Share 0: there are no replicas."""
        if not self._busiest or self.seconds <= 0:
            return 0, 0.0
        number = max(self._busiest, key=lambda replica: self._busiest[replica])
        return number, self._busiest[number] / self.seconds

    def knows(self, name: str) -> bool:
        return name in self._most


def _number(record: Mapping[str, Any], name: str) -> float | None:
    """None where the metric is absent, null or not a number (then it differs from itself)."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and value == value else None
