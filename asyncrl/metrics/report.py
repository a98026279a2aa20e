"""Where the time went, in plain sentences, and which setting would change it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DOMINANT = 0.4
"""Share of the time from which one phase is called the bottleneck. Three phases and a rest share it, so
whatever has 0.4 is nearly always the largest."""


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Shares of the trainer's time. They add up to at most 1; the rest is bookkeeping."""

    waiting: float
    """No batch was ready."""
    training: float
    publishing: float
    """Waiting for a hot-load to end."""

    def __str__(self) -> str:
        waiting, training, publishing = (f"{share:.0%}" for share in (self.waiting, self.training, self.publishing))
        return f"waiting for rollouts {waiting}, training {training}, publishing {publishing}"


class Account:
    """What the time of a run went into. Owns sums alone: a run of a million steps needs no more memory than its first.

    The metrics are those of docs/metrics.md; one that is absent, null or not a number counts as 0.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.steps = 0
        self._sums: Counter[str] = Counter()
        self._known: set[str] = set()
        self._total_s = 0.0
        for record in records:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take the record of one more optimizer step."""
        self.steps += 1
        self._known.update(name for name in _NAMES if name in record)
        values = {name: _number(record, name) for name in _NAMES}
        self._sums.update(values)
        self._total_s += max(values["step_s"], sum(values[name] for name in _PARTS))

    def shares(self) -> TimeShares | None:
        """Over all steps together; None when they took no time."""
        if self._total_s <= 0:
            return None
        return TimeShares(*(self._sums[name] / self._total_s for name in _PARTS))

    def knows(self, name: str) -> bool:
        return name in self._known

    def sum(self, name: str) -> float:
        return self._sums[name]

    def mean(self, name: str) -> float:
        return self._sums[name] / self.steps if self.steps else 0.0


_PARTS = ("wait_s", "train_s", "publish_wait_s")
_NAMES = (
    *_PARTS,
    *("step_s", "sampler_waiting", "kv_use", "groups_filtered", "groups_trained", "in_flight", "window", "budget_free"),
)


def where_time_went(account: Account) -> str:
    """One sentence on the bottleneck, one on what to change."""
    shares = account.shares()
    if shares is None:
        return "No optimizer step was finished, so there is no time to account for."
    sentence = f"Time: {shares}."
    if shares.publishing >= max(DOMINANT, shares.waiting, shares.training):
        return (
            f"{sentence} Hot-loading is the bottleneck: raise publish.weight_sync_interval, "
            "or train an adapter (lora.rank), which is loaded without a pause."
        )
    if shares.waiting >= max(DOMINANT, shares.training):
        return f"{sentence} Rollouts are the bottleneck: {_why_waiting(account)}"
    if shares.training >= DOMINANT:
        return (
            f"{sentence} The trainer is the bottleneck and rollouts hide behind it, which is where a run should be: "
            "a faster device, lora.rank or a larger trainer.max_tokens_per_microbatch would speed it up."
        )
    return f"{sentence} No part dominates: rollouts and training are in balance."


def _why_waiting(account: Account) -> str:
    """What held the rollouts back, from the gauges at the end of each step."""
    if account.mean("sampler_waiting") >= 1 or account.mean("kv_use") > 0.9:
        return (
            "requests wait for room in the sampler. Add sampler.replicas, give it more memory "
            "(sampler.gpu_memory_utilization), or lower sampling.max_tokens."
        )
    filtered, trained = account.sum("groups_filtered"), account.sum("groups_trained")
    if filtered > trained:
        return (
            f"{filtered:.0f} of {filtered + trained:.0f} groups had equal rewards and were thrown away. Use prompts "
            "that the model solves sometimes, a finer reward, or a larger completions_per_prompt."
        )
    in_flight, window = account.mean("in_flight"), account.mean("window")
    if window and in_flight >= 0.9 * window:
        return (
            f"the concurrency window of {window:.0f} was full and the sampler had room. "
            "Raise concurrency.initial_window, or concurrency.max_window where the window has reached it."
        )
    if account.knows("budget_free") and account.mean("budget_free") < 1:
        return (
            "the staleness budget was used up while rollouts were running. Raise staleness.max_staleness, "
            "or shorten the slowest rollouts (sampling.max_tokens, rollout.timeout_s)."
        )
    return "the sampler or your rollout function is slow. See rollouts.jsonl for how long each group took."


def _number(record: Mapping[str, Any], name: str) -> float:
    """0 where the metric is absent, null or not a number (then it differs from itself)."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and value == value else 0.0
