"""What an optimizer step took, and how things stood meanwhile: the record of a step, and the gauges of the live view.

Names and units are those of docs/metrics.md.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from asyncrl.metrics.lag import LagMeter
from asyncrl.metrics.report import PARTS
from asyncrl.rollout.adaptive import StepFacts
from asyncrl.rollout.batch import Batch
from asyncrl.rollout.concurrency import SLACK
from asyncrl.rollout.counts import Counts
from asyncrl.rollout.held import REASONS, Reason, between
from asyncrl.types import Load, StepResult, spread

if TYPE_CHECKING:
    from asyncrl.engine import Engine

Record = dict[str, float]
Gauges = Mapping[str, Any]
"""Numbers, but for `phase`, `window_reason` and `staleness_reason`, and lists with an entry for each replica."""

MEANS = ("sampler_running", "sampler_waiting", "sampler_full", "kv_use", "eval_in_flight", "replicas_up")
"""Gauges whose mean over the step is recorded, where the sampler was asked meanwhile, and has them."""


@dataclass(slots=True)
class StepAccount:
    """Owns what is counted from one step record to the next."""

    engine: Engine
    lag: LagMeter = field(default_factory=LagMeter)
    load: Load | None = None
    """What the sampler said last."""
    started_at: float | None = None
    elapsed_before_s: float = 0.0
    """In earlier lives of the run."""
    _began_at: float = 0.0
    _seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _held_before: dict[Reason, float] = field(default_factory=lambda: dict.fromkeys(REASONS, 0.0))
    _counted: Counts = field(default_factory=Counts)
    _tokens_seen: int = 0
    _sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _samples: int = 0
    """How often the sampler was asked."""
    _requests: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    """At each server that is up, summed over the times that the sampler was asked."""

    def start(self) -> None:
        """Training begins."""
        self._began_at = now()
        self.started_at = self._began_at - self.elapsed_before_s
        if self.engine.timeline is not None:
            self.engine.timeline.starts(self.started_at, self._began_at)

    def elapsed_s(self) -> float:
        """Seconds of training, over all lives of the run."""
        return now() - self.started_at if self.started_at is not None else self.elapsed_before_s

    @contextmanager
    def timed(self, part: str, called: str) -> Iterator[None]:
        """The block is of this one of `PARTS`, and `called` so in the timeline."""
        engine, began = self.engine, now()
        held = engine.scheduler.held.seconds(began) if part == "wait_s" else None
        straggler_s = engine.queue.straggler_s
        try:
            yield
        finally:
            ended = now()
            self._seconds[part] += ended - began
            if held is not None:
                for name, seconds in between(held, engine.scheduler.held.seconds(ended), "wait_{}_s").items():
                    self._seconds[name] += seconds
                self._seconds["wait_straggler_s"] += engine.queue.straggler_s - straggler_s
            if engine.timeline is not None:
                under_way = part in ("wait_s", "train_s")
                engine.timeline.span("trainer", called, began, ended, step=engine.step + under_way)

    @property
    def generated(self) -> int:
        """Tokens that the sampler has drawn."""
        return self.load.generated_tokens if self.load is not None else 0

    def sampled(self, load: Load) -> None:
        """The sampler said how busy it is."""
        if self.load is None:  # an evaluation before training, or another run on the same servers, has drawn some
            self._tokens_seen = load.generated_tokens
        self.load = load
        gauges = self.gauges()
        self._samples += 1
        for name in MEANS:
            if name in gauges:
                self._sums[name] += gauges[name]
        for server, requests in load.requests().items():
            self._requests[server] += requests

    def gauges(self) -> Record:
        """How things stand now."""
        engine, load = self.engine, self.load or Load(0, 0)
        return {
            "step": engine.step,
            "in_flight": engine.slots.in_flight,
            "window": engine.slots.window_size,
            "queue_groups": len(engine.queue),
            "budget_free": engine.scheduler.budget.free,
            "eval_in_flight": engine.scheduler.guests.in_use,
            "sampler_running": load.running,
            "sampler_waiting": load.waiting,
            "sampler_full": float(load.waiting > SLACK * load.running),
            "kv_use": load.kv_use if load.kv_use is not None else 0.0,
            "tokens_generated": load.generated_tokens,
            "rollouts_finished": engine.scheduler.finished_rollouts,
            "published": engine.published,
            **load.replicas(),
            **(engine.adaptive.gauges() if engine.adaptive is not None else {}),
        }

    def live(self) -> Gauges:
        """For the live view: the gauges, and why they are so."""
        servers = self.load.by_server() if self.load is not None else {}
        return {**self.gauges(), **servers, **self.reasons(), "phase": self.engine.phase}

    def reasons(self) -> dict[str, str]:
        """Why what moves by itself is where it is."""
        adaptive = self.engine.adaptive
        return {
            "window_reason": self.engine.slots.reason,
            **({"staleness_reason": adaptive.reason} if adaptive is not None else {}),
        }

    def facts(self, batch: Batch, result: StepResult) -> StepFacts:
        """What moves the bound. The optimizer step was taken, and is not reported yet."""
        spent, engine = self._seconds, self.engine
        admitted = [group.admitted_at for group in batch.groups]
        return StepFacts(
            now=now(),
            oldest_at=min(admitted),
            newest_at=max(admitted),
            seconds=now() - self._began_at - spent["publish_wait_s"] - spent["checkpoint_s"],
            starved_s=max(spent["wait_budget_s"] + spent["wait_unpublished_s"], spent["wait_straggler_s"]),
            ready_groups=len(engine.queue),
            hot_load_s=engine.publication.last_s,
            staleness=batch.staleness.mean,
            # Policy to anchor and anchor to sampler: one of them is about 0, `loss.anchor` says which.
            kl=result.metrics.get("behavior_kl", 0.0) + result.metrics.get("ppo_kl", 0.0),
            ess=result.metrics.get("ess", 1.0),
        )

    def close(self, batch: Batch, result: StepResult) -> Record:
        """The record of the step that was taken, and a fresh account."""
        engine, ended = self.engine, now()
        step_s, self._began_at = ended - self._began_at, ended
        publish_s, engine.publication.seconds = engine.publication.seconds, 0.0
        tokens, self._tokens_seen = self.generated - self._tokens_seen, self.generated
        held = engine.scheduler.held.seconds(ended)
        record: Record = {
            **self.gauges(),
            **{name: total / self._samples for name, total in self._sums.items()},
            **spread(self._requests),
            **engine.slots.step_completed(),
            "time_s": self.elapsed_s(),
            "step_s": step_s,
            **dict.fromkeys(PARTS, 0.0),
            **{f"wait_{reason}_s": 0.0 for reason in REASONS},
            "wait_straggler_s": 0.0,
            **self._seconds,
            **between(self._held_before, held, "held_{}_s"),
            "publish_s": publish_s,
            "loop_lag_s": self.lag.take(),
            "loop_blocked_s": self.lag.take_sum(),
            **_rollouts(engine.scheduler.counts.since(self._counted), batch),
            "samples": batch.sequences,
            "samples_per_s": batch.sequences / step_s if step_s else 0.0,
            "tokens_per_s": tokens / step_s if step_s else 0.0,
            **_staleness(batch),
            "tokens_generated": tokens,
            "canary_diff": engine.publication.canary_diff,
            **result.metrics,
        }
        self._held_before = held
        self._counted = replace(engine.scheduler.counts)
        self._seconds.clear()
        self._sums.clear()
        self._samples = 0
        self._requests.clear()
        return record


def _rollouts(counts: Counts, batch: Batch) -> Record:
    trained = batch.trained
    rewards = [run.segments[-1].reward for group in trained for run in group.runs]
    trained_mean = sum(rewards) / len(rewards) if rewards else math.nan
    return {
        "reward_mean": counts.reward_sum / counts.reward_count if counts.reward_count else trained_mean,
        "reward_trained_mean": trained_mean,
        **batch.turn_rewards(),
        "groups_trained": len(trained),
        "groups_filtered": counts.filtered,
        "groups_rejected": counts.rejected,
        "members_failed": counts.lost,
        "members_retried": counts.retried,
        "members_dropped": counts.dropped,
        "stale_requeued": counts.requeued,
        "stale_dropped": counts.stale,
        "rollouts_finished": counts.rollouts,
        "rollout_s": counts.rollout_s,
        "model_s": counts.model_s,
    }


def _staleness(batch: Batch) -> Record:
    return {
        "staleness_mean": batch.staleness.mean,
        "staleness_max": batch.staleness.highest,
        "staleness_min": batch.staleness.lowest,
        **batch.staleness.shares(),
        "stale_masked_tokens": batch.staleness.masked_tokens,
    }


def now() -> float:
    """Seconds on the loop's clock, which is monotonic, and virtual in simulations."""
    return asyncio.get_running_loop().time()
