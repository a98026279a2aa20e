"""The loop: take, step, publish, log, save.

    consumes    groups from the queue that the scheduler fills
    produces    optimizer steps, live weights, one record per step
    waits for   groups, the trainer, the publication before the last
    woken by    a finished group, the end of the data, a stop

The trainer goes on with the next batch while weights travel to the sampler; it waits for a publication only
when the next one is due.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
import structlog

from asyncrl.errors import SamplerRequestError, StepFailed, TrainerError, first_failure
from asyncrl.metrics.lag import watch_lag
from asyncrl.publication import Publication
from asyncrl.rollout.adaptive import AdaptiveStaleness
from asyncrl.rollout.batch import Batch, chunk_sizes
from asyncrl.rollout.concurrency import ConcurrencyController
from asyncrl.rollout.queue import GroupQueue
from asyncrl.rollout.scheduler import Scheduler
from asyncrl.rollout.staleness import Verdict
from asyncrl.run_state import RunState, capture
from asyncrl.standstill import where
from asyncrl.step_record import Gauges, Record, StepAccount, now
from asyncrl.storage.ledger import Ledger
from asyncrl.storage.timeline import Timeline
from asyncrl.types import Group, Sampler, StepResult, Trainer, TrainSequence
from asyncrl.watchdog import Watchdog

if TYPE_CHECKING:
    from asyncrl.checkpointing import Checkpointer

LOAD_EVERY_S = 0.25
"""How often the sampler is asked for its load: short against a rollout, long against the few ms that it costs."""
LOAD_LIMIT_S = 5.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings of `Config` that the loop needs."""

    groups_per_step: int
    chunks_per_step: int
    max_staleness: int
    on_stale: Verdict
    hard_bound: bool
    sync_interval: int
    publish_timeout_s: float
    canary_tolerance: float | None
    """None: no canary."""
    max_steps: int | None
    skip_steps: int = 0
    """Steps in a row that may fail."""


@dataclass(slots=True)
class Engine:
    """Owns the step count, the batch being trained, and the publication under way."""

    settings: EngineSettings
    scheduler: Scheduler
    queue: GroupQueue
    slots: ConcurrencyController
    ledger: Ledger
    sampler: Sampler
    trainer: Trainer
    watchdog: Watchdog
    on_step: Callable[[Record, Batch], None]
    on_gauges: Callable[[Gauges], None] = lambda gauges: None
    on_published: Callable[[int], None] = lambda version: None
    step: int = 0
    """Optimizer steps taken."""
    worst_staleness: int = 0
    stopping: bool = False
    adaptive: AdaptiveStaleness | None = None
    """None: the bound stays."""
    taken: list[Group] = field(default_factory=list)
    """Groups of the step under way: out of the queue, and not trained yet."""
    checkpoints: Checkpointer | None = None
    on_failed_step: Callable[[Batch, StepFailed], None] = lambda batch, error: None
    _failed_steps: int = 0
    """In a row."""
    timeline: Timeline | None = None
    load_every_s: float = LOAD_EVERY_S
    phase: str = "starting"
    """What the trainer does."""
    _phase_since: float = 0.0
    account: StepAccount = field(init=False)
    publication: Publication = field(init=False)

    def __post_init__(self) -> None:
        self.account = StepAccount(self)
        self.publication = Publication(
            self.sampler,
            self.settings.publish_timeout_s,
            self.settings.canary_tolerance,
            on_live=self._went_live,
            on_failed=self.scheduler.stop,
        )

    @property
    def published(self) -> int:
        """The version that is live in the sampler."""
        return self.publication.live

    async def run(self) -> None:
        """Train until the data ends, `max_steps` is reached, or `stop` is called.

        Raises:
            EngineError: whatever ends the run early, the first cause.
        """
        self.account.start()
        if self.adaptive is not None:
            self._move_bound(self.adaptive.bound)
        try:
            with self.watchdog.phase("training", marks=self._marks, describe=self.describe):
                try:
                    async with self.scheduler, anyio.create_task_group() as helpers:
                        helpers.start_soon(self._watch_load, name="asyncrl load monitor")
                        helpers.start_soon(watch_lag, self.account.lag, name="asyncrl lag monitor")
                        self.scheduler.pump()
                        self.on_published(self.published)  # an earlier life may have ended before it was evaluated
                        await self._train()
                        self._enter("done")
                        self.on_gauges(self.account.live())
                        helpers.cancel_scope.cancel()
                finally:
                    await self.publication.cancel()
        except BaseExceptionGroup as group:
            raise first_failure(group) from None

    def stop(self) -> None:
        """Finish the step under way, publish it, and end."""
        self.stopping = True
        self.scheduler.stop()

    def go_on(self, step: int, *, elapsed_s: float, worst_staleness: int) -> None:
        """Start where an earlier life of the run had come to. The weights of `step` must be live."""
        self.step, self.worst_staleness, self.account.elapsed_before_s = step, worst_staleness, elapsed_s
        if self.settings.sync_interval:
            self.publication.live = self.publication.newest = step

    def elapsed_s(self) -> float:
        """Seconds of training, over all lives of the run."""
        return self.account.elapsed_s()

    def capture(self) -> RunState:
        """What a checkpoint holds of the loop. No optimizer step may be under way."""
        return capture(self)

    # The loop

    async def _train(self) -> None:
        while not self._done():
            batch = self._new_batch()
            try:
                if not await self._collect(batch):
                    break
                result = await self._optimize(batch)
            except StepFailed as error:
                self._give_up(batch, error)
                continue
            if result is not None:
                await self._step_taken(batch, result)
        await self._published()
        if self.published < self.step and self.settings.sync_interval:
            await self._publish()
            await self._published()

    async def _step_taken(self, batch: Batch, result: StepResult) -> None:
        state: RunState | None = None
        try:
            self._adapt(batch, result)
            if self.checkpoints is not None and self.checkpoints.due(self.step):
                state = self.capture()
            await self._publish_if_due()
        finally:  # the step was taken, whatever becomes of its weights
            self._report(batch, result)
        if self.checkpoints is not None and state is not None:
            self._enter(f"taking a snapshot of step {self.step} for a checkpoint")
            with self.account.timed("checkpoint_s", "snapshot"):
                await self.checkpoints.save(state)

    def _done(self) -> bool:
        return self.stopping or (self.settings.max_steps is not None and self.step >= self.settings.max_steps)

    def _new_batch(self) -> Batch:
        self.queue.order.begin_batch(self.step)
        return Batch(self.step, self.settings.max_staleness, self.settings.on_stale, self.settings.hard_bound)

    async def _collect(self, batch: Batch) -> bool:
        """Fill the batch, each chunk trained as soon as it is full. False: nothing is left to train."""
        for size in chunk_sizes(self.settings.groups_per_step, self.settings.chunks_per_step):
            groups = await self._take(batch, size)
            if self.stopping:
                break
            if sequences := batch.add(groups):
                await self._forward_backward(sequences)
            if len(groups) < size:
                break
        self._raise_failure()
        return bool(self.taken) and not self.stopping

    async def _take(self, batch: Batch, size: int) -> list[Group]:
        """The next groups, oldest first; fewer than `size` only when no more will come."""
        groups: list[Group] = []
        with self.account.timed("wait_s", "wait"):
            while len(groups) < size:
                self._enter(f"waiting for group {len(self.taken) + 1} of step {self.step + 1}")
                group = await self.queue.take()
                if group is None:
                    break
                verdict = batch.verdict(group)
                if verdict in ("train", "mask"):
                    groups.append(group)
                    self.taken.append(group)
                else:
                    self._send_away(group, requeue=verdict == "requeue")
        return groups

    def _send_away(self, group: Group, *, requeue: bool) -> None:
        """The group is too old to be trained."""
        self.queue.order.put_back()
        if requeue:
            self.scheduler.requeue(group)
        else:
            self.scheduler.reject_stale(group)

    async def _forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        self._enter(f"training step {self.step + 1}: {len(sequences)} sequences forward and backward")
        with self.account.timed("train_s", "forward_backward"):
            await self.trainer.forward_backward(sequences)

    async def _optimize(self, batch: Batch) -> StepResult | None:
        """One optimizer step. None: no group of the batch carried signal, so there is nothing to step on."""
        if not batch.sequences:
            for group in batch.groups:
                self.ledger.filtered((group.epoch, group.row))
                self.scheduler.budget.leave()
            self.taken.clear()
            self.scheduler.pump()
            return None
        self._enter(f"training step {self.step + 1}: optimizer")
        with self.account.timed("train_s", "optimizer"):
            result = await self.trainer.optim_step()
        self.step += 1
        assert result.step == self.step, f"the trainer counts {result.step} steps, the engine {self.step}"
        self.worst_staleness = max(self.worst_staleness, batch.staleness.highest)
        for group in batch.groups:
            key = (group.epoch, group.row)
            if group.advantages:
                self.ledger.trained(key, self.step)
            else:
                self.ledger.filtered(key)
        self.scheduler.budget.trained(len(batch.groups), self.step)
        self.taken.clear()
        self._failed_steps = 0
        self.scheduler.pump()  # nothing may begin yet, but what holds rollouts back is another thing now
        return result

    def _give_up(self, batch: Batch, error: StepFailed) -> None:
        """The step was not taken: its groups are rejected, and training goes on with others.

        Raises:
            TrainerError: it was one too many in a row.
        """
        self._failed_steps += 1
        self.on_failed_step(batch, error)
        if self._failed_steps > self.settings.skip_steps:
            raise TrainerError(
                f"{self._failed_steps} optimizer steps in a row could not be taken (trainer.skip_steps is "
                f"{self.settings.skip_steps}). The last one: {error}"
            ) from error
        for group in self.taken:
            self.ledger.rejected((group.epoch, group.row), f"step {self.step + 1} failed: {error}")
            self.scheduler.budget.leave()
        self.scheduler.counts.rejected += len(self.taken)
        self.taken.clear()
        self.scheduler.pump()

    def _adapt(self, batch: Batch, result: StepResult) -> None:
        """Let the bound move, before it is asked whether the weights are due: the next step may need them live."""
        if self.adaptive is None:
            return
        before = self.adaptive.gauges()
        self.adaptive.observe(self.account.facts(batch, result))
        if self.adaptive.gauges() != before:
            log.info("staleness", **self.adaptive.gauges(), reason=self.adaptive.reason)
            self._move_bound(self.adaptive.bound)
            self.scheduler.pump()

    def _move_bound(self, bound: int) -> None:
        self.scheduler.budget.resize((bound + 1) * self.settings.groups_per_step)
        if self.queue.order.bound is not None:
            self.queue.order.bound = bound

    # Publication

    async def _publish_if_due(self) -> None:
        if not self.settings.sync_interval:
            self.scheduler.published(self.step)
        elif self._publication_is_due():
            await self._publish()

    def _publication_is_due(self) -> bool:
        if self.adaptive is None:
            return self.step % self.settings.sync_interval == 0
        return self.step - self.publication.newest >= self.adaptive.sync_interval

    async def _publish(self) -> None:
        """Start a hot-load of the current weights, once the one before it has ended."""
        with self.account.timed("publish_wait_s", "wait for hot-load"):
            await self._published()
        with self.account.timed("publish_wait_s", "export"):
            self._enter(f"exporting version {self.step}")
            weights = await self.trainer.save_weights_for_sampler()
        assert weights.version == self.step
        self.publication.start(weights)

    async def _published(self) -> None:
        self._enter(f"waiting for the hot-load after step {self.published}")
        await self.publication.ended()

    def _went_live(self, version: int) -> None:
        if self.timeline is not None:
            self.timeline.span("publish", f"hot-load of {version}", self.publication.began_at, now(), version=version)
        self.scheduler.published(version)
        self.on_published(version)

    # What may go wrong

    def _raise_failure(self) -> None:
        self.publication.raise_failure()
        if self.checkpoints is not None:
            self.checkpoints.raise_failure()
        if self.scheduler.failed.done():
            self.scheduler.failed.result()

    async def _watch_load(self) -> None:
        """Tell the concurrency controller how busy the sampler is."""
        while True:
            try:
                with anyio.fail_after(LOAD_LIMIT_S):
                    load = await self.sampler.load()
            except (TimeoutError, SamplerRequestError) as error:
                log.info("no load metrics", error=repr(error))
            else:
                before = self.slots.window_size
                self.account.sampled(load)
                self.slots.observe(load, now())
                if self.slots.window_size != before:
                    log.info("window", reason=self.slots.reason)
                    self.scheduler.pump()
            self.on_gauges(self.account.live())
            if self.timeline is not None:
                self.timeline.flush()
            await anyio.sleep(self.load_every_s)

    def _marks(self) -> tuple[Any, ...]:
        """What changes when something moves."""
        scheduler = self.scheduler
        ended = scheduler.finished_rollouts + scheduler.counts.retried
        return (ended, self.step, self.published, self.phase, self.account.generated)

    def describe(self, now: float) -> list[str]:
        """Who waits for what, since when."""
        lines = [
            f"engine: {self.phase}, for {now - self._phase_since:.0f} s",
            f"queue: {len(self.queue)} finished groups, {self.scheduler.open_groups} unfinished",
            f"slots: {self.slots.in_flight} of {self.slots.window_size} rollouts, "
            f"{self.scheduler.guests.in_use} of an evaluation; "
            f"staleness budget: {self.scheduler.budget.free} of {self.scheduler.budget.slots} groups free",
            f"sampler: {self.account.load}",
        ]
        oldest = self.scheduler.oldest(now)
        return lines + [f"rollout: {member}, for {age_s:.0f} s, at {where(member.task)}" for member, age_s in oldest]

    # What it tells

    def _enter(self, phase: str) -> None:
        self.phase, self._phase_since = phase, now()

    def _report(self, batch: Batch, result: StepResult) -> None:
        record = self.account.close(batch, result)
        self.on_gauges(self.account.live())
        self.on_step(record, batch)
