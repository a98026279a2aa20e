"""Where the time went, in plain sentences, and which setting would change it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def time_shares(records: Iterable[Mapping[str, Any]]) -> TimeShares | None:
    """Over these steps together; None when they took no time."""
    wait = train = publish = total = 0.0
    for record in records:
        parts = (_number(record, "wait_s"), _number(record, "train_s"), _number(record, "publish_wait_s"))
        wait, train, publish = wait + parts[0], train + parts[1], publish + parts[2]
        total += max(_number(record, "step_s"), sum(parts))
    return TimeShares(wait / total, train / total, publish / total) if total > 0 else None


def where_time_went(records: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the bottleneck, one on what to change."""
    shares = time_shares(records)
    if shares is None:
        return "No optimizer step was finished, so there is no time to account for."
    sentence = f"Time: {shares}."
    if shares.publishing >= max(DOMINANT, shares.waiting, shares.training):
        return (
            f"{sentence} Hot-loading is the bottleneck: raise publish.weight_sync_interval, "
            "or train an adapter (lora.rank), which is loaded without a pause."
        )
    if shares.waiting >= max(DOMINANT, shares.training):
        return f"{sentence} Rollouts are the bottleneck: {_why_waiting(records)}"
    if shares.training >= DOMINANT:
        return (
            f"{sentence} The trainer is the bottleneck and rollouts hide behind it, which is where a run should be: "
            "a faster device, lora.rank or a larger trainer.max_tokens_per_microbatch would speed it up."
        )
    return f"{sentence} No part dominates: rollouts and training are in balance."


def _why_waiting(records: Sequence[Mapping[str, Any]]) -> str:
    """What held the rollouts back, from the gauges at the end of each step."""
    if _mean(records, "sampler_waiting") >= 1 or _mean(records, "kv_use") > 0.9:
        return (
            "requests wait for room in the sampler. Add sampler.replicas, give it more memory "
            "(sampler.gpu_memory_utilization), or lower sampling.max_tokens."
        )
    filtered, trained = _sum(records, "groups_filtered"), _sum(records, "groups_trained")
    if filtered > trained:
        return (
            f"{filtered:.0f} of {filtered + trained:.0f} groups had equal rewards and were thrown away. Use prompts "
            "that the model solves sometimes, a finer reward, or a larger completions_per_prompt."
        )
    in_flight, window = _mean(records, "in_flight"), _mean(records, "window")
    if window and in_flight >= 0.9 * window:
        return (
            f"the concurrency window of {window:.0f} was full and the sampler had room. "
            "Raise concurrency.initial_window, or concurrency.max_window where the window has reached it."
        )
    if _any(records, "budget_free") and _mean(records, "budget_free") < 1:
        return (
            "the staleness budget was used up while rollouts were running. Raise staleness.max_staleness, "
            "or shorten the slowest rollouts (sampling.max_tokens, rollout.timeout_s)."
        )
    return "the sampler or your rollout function is slow. See rollouts.jsonl for how long each group took."


def _number(record: Mapping[str, Any], name: str) -> float:
    """0 where the metric is absent, null or not a number (then it differs from itself)."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) and value == value else 0.0


def _any(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(name in record for record in records)


def _sum(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(_number(record, name) for record in records)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return _sum(records, name) / len(records) if records else 0.0
