"""The scheduler: prompts in, finished groups out, as many rollouts at once as staleness and the sampler allow.

    consumes    draws from the PromptStream
    produces    groups into the GroupQueue, entries in the Ledger
    waits for   a slot (concurrency, per rollout) and room in the staleness budget (per group)
    woken by    the end of a rollout, a publication, an observation of the sampler's load

Nothing here polls, and no event costs more because more rollouts are in flight: `pump` starts what may start,
and everything that frees something calls it. Rollouts are bare asyncio tasks: there may be tens of thousands,
and one costs a third of what a task-group entry with a cancel scope of its own does. Their time limit is the
same for all, so their deadlines come in the order of their starts and one sweeper watches the oldest.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from asyncrl.data import Prompt, PromptStream
from asyncrl.errors import BreakerOpen, RolloutError, RolloutTimeout
from asyncrl.rollout.concurrency import ConcurrencyController
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.counts import Counts, record_attempt
from asyncrl.rollout.failures import Breaker, FailurePolicy, Verdict, describe, fatal, is_ours, leaves
from asyncrl.rollout.grading import Grader, SignalPatience
from asyncrl.rollout.group import Member, OpenGroup
from asyncrl.rollout.guests import Guests
from asyncrl.rollout.held import Held, Reason
from asyncrl.rollout.queue import GroupQueue
from asyncrl.rollout.staleness import StalenessBudget
from asyncrl.storage.ledger import Ledger
from asyncrl.storage.timeline import Timeline
from asyncrl.types import Group, RolloutRun

RolloutFn = Callable[[Prompt], Awaitable[Any]]
PolicyFactory = Callable[[str, "int | None"], Any]
"""(session, pinned version or None) -> the `prompt.policy` of one rollout."""

CANCEL_GRACE_S = 30.0
"""A rollout that has been cancelled must end within it; one that does not is abandoned and named."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """The settings of `Config` that the scheduler needs."""

    group_size: int
    timeout_s: float
    min_group_size: int
    keep_filtered: bool
    """`on_filtered="drop"`: a group without signal keeps its place in the batch."""
    pin_version: bool
    seed: int


@dataclass(slots=True)
class Scheduler:
    """Owns the rollouts in flight and the groups that are not finished. Lives as an async context manager.

    A failure that ends the run is kept in `failure` and wakes whoever waits for `failed`.
    """

    stream: PromptStream
    rollout: RolloutFn
    make_policy: PolicyFactory
    budget: StalenessBudget
    slots: ConcurrencyController
    guests: Guests
    queue: GroupQueue
    ledger: Ledger
    contract: Contract
    failures: FailurePolicy
    grader: Grader
    patience: SignalPatience
    settings: RolloutSettings
    live_version: Callable[[], int]

    timeline: Timeline | None = None
    counts: Counts = field(default_factory=Counts)
    held: Held = field(default_factory=Held)
    finished_rollouts: int = 0
    """Since the start: what the watchdog watches."""
    admissions: int = 0
    """Groups that were admitted: the sequence number of the next one."""
    _breaker: Breaker = field(default_factory=Breaker)
    _opening: deque[OpenGroup] = field(default_factory=deque)
    _open: dict[int, OpenGroup] = field(default_factory=dict)
    _running: dict[asyncio.Task[None], Member] = field(default_factory=dict)
    _overdue: dict[asyncio.Task[None], Member] = field(default_factory=dict)
    _stopped: bool = False
    _failure: asyncio.Future[None] = field(init=False)
    _sweeper: asyncio.Task[None] = field(init=False)
    _loop: asyncio.AbstractEventLoop = field(init=False)

    async def __aenter__(self) -> Scheduler:
        self._loop = asyncio.get_running_loop()
        self._failure = self._loop.create_future()
        self._sweeper = self._loop.create_task(self._sweep(), name="asyncrl rollout time limits")
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop()
        self._sweeper.cancel()
        tasks = {self._sweeper, *self._running, *self._overdue}
        _, stuck = await asyncio.wait(tasks, timeout=CANCEL_GRACE_S)
        for task in stuck:
            member = self._running.get(task) or self._overdue.get(task)
            log.warning("a cancelled rollout did not end and is left behind", rollout=repr(member))
        if self._failure.done() and not self._failure.cancelled():
            self._failure.exception()

    # What may be asked

    @property
    def failed(self) -> asyncio.Future[None]:
        """Done, with the exception, once a failure ends the run. Never has a result."""
        return self._failure

    @property
    def in_flight(self) -> int:
        return len(self._running) + len(self._overdue)

    @property
    def open_groups(self) -> int:
        return len(self._open)

    def oldest(self, now: float, count: int = 5) -> list[tuple[Member, float]]:
        """The rollouts that have run longest, and for how long (s)."""
        longest = itertools.chain(self._overdue.values(), self._running.values())
        return [(member, now - member.started_at) for member in itertools.islice(longest, count)]

    @property
    def _drained(self) -> bool:
        """No prompt will be begun any more: the data is at its end, or gives no signal."""
        return self.stream.exhausted or self.patience.lost is not None

    # What wakes it

    def pump(self) -> None:
        """Start every rollout that may start now."""
        held_by: Reason = "slots"
        while not self._stopped and (self._opening or self._can_admit()):
            if not self.slots.try_acquire():
                break
            if not self._opening:
                self._admit()
            group = self._opening[0]
            self._start(group.start_member())
            if group.all_started:
                self._opening.popleft()
        else:
            held_by = "data" if self._stopped or self._drained else self.budget.held_by
        self.guests.admit()
        self._close_if_done()
        if held_by != self.held.reason:
            self.held.by(held_by, self._loop.time())

    def published(self, version: int) -> None:
        """Weights of `version` are live: slots of trained groups come back."""
        self.budget.published(version)
        self.pump()

    def requeue(self, group: Group) -> None:
        """Roll the group's prompt out again: it was too old to be trained."""
        self.counts.requeued += 1
        self.stream.give_back(group.epoch, group.row)
        self.budget.leave()
        self.queue.reopen()
        self.pump()

    def reject_stale(self, group: Group) -> None:
        """The group was too old to be trained and is dropped."""
        self.ledger.rejected((group.epoch, group.row), "stale")
        self.counts.stale += 1
        self.budget.leave()
        self.pump()

    def take_finished(self, group: Group, deadline: int) -> None:
        """An earlier life of this run admitted and finished the group: it waits to be trained."""
        self.budget.admit()
        self.queue.order.admitted_before(group, deadline)
        self.queue.finished(group)

    def stop(self) -> None:
        """Begin nothing new and cancel what runs. What was admitted and not trained stays pending."""
        self._stopped = True
        for task in self._running:
            task.cancel()
        self.queue.abort()

    # Groups

    def _can_admit(self) -> bool:
        return not self._drained and self.budget.can_admit()

    def _admit(self) -> None:
        draw = self.stream.draw()
        sequence = self.admissions
        self.admissions += 1
        self.budget.admit()
        version = self.live_version()
        if draw.again:
            self.ledger.requeue(draw.key, sequence, version)
        else:
            self.ledger.admit(draw.key, sequence, version)
        self.queue.order.admitted(sequence, version)
        group = OpenGroup(sequence, draw, self.settings.group_size, version, self._loop.time())
        self._open[sequence] = group
        self._opening.append(group)

    def _end_member(self, member: Member, run: RolloutRun | None) -> None:
        group = member.group
        group.end_member(member, run, self._loop.time())
        if run is not None:
            self._breaker.succeeded()
            self.counts.reward_sum += run.reward
            self.counts.reward_count += 1
        if group.complete:
            del self._open[group.sequence]
            self._finish(group)

    def _finish(self, group: OpenGroup) -> None:
        """All members have ended: the group goes to the trainer, is filtered, or is rejected."""
        self.counts.groups += 1
        key, sequence = group.draw.key, group.sequence
        if len(group.runs) < self.settings.min_group_size:
            self.counts.rejected += 1
            self.ledger.rejected(key, f"{len(group.runs)} of {group.size} rollouts survived")
            self._leave(sequence)
            return
        runs = [group.runs[index] for index in sorted(group.runs)]
        advantages = self.grader.grade(runs)
        if reason := self.patience.finished(bool(advantages)):
            log.warning("no further prompt is begun", reason=reason)
        if not advantages:
            self.counts.filtered += 1
            if not self.settings.keep_filtered:
                self.ledger.filtered(key)
                self._leave(sequence)
                return
        self.ledger.finished(key, group.version, [run.reward for run in runs])
        self.queue.finished(
            Group(
                sequence=sequence,
                row=group.draw.index,
                epoch=group.draw.epoch,
                version=group.version,
                runs=list(self.grader.spread(runs, advantages)),
                advantages=advantages,
                admitted_at=group.admitted_at,
                finished_at=self._loop.time(),
                seconds=[group.seconds[index] for index in sorted(group.runs)],
            )
        )

    def _leave(self, sequence: int) -> None:
        self.counts.warn_of_no_signal()
        self.budget.leave()
        self.queue.gone(sequence)

    def _close_if_done(self) -> None:
        if self._drained and not self._open:
            self.queue.close()

    # Members

    def _start(self, member: Member) -> None:
        member.task = self._loop.create_task(self._run(member))
        self._watch(member)

    def _watch(self, member: Member) -> None:
        """Start the member's clock. The dict stays in the order of the deadlines."""
        self._overdue.pop(member.task, None)
        self._running.pop(member.task, None)
        member.started_at = self._loop.time()
        self._running[member.task] = member

    async def _run(self, member: Member) -> None:
        """One group member, from its first attempt to its end."""
        try:
            run = await self._draw(member)
            if not member.abandoned:
                self._end(member, run)
        except (asyncio.CancelledError, GeneratorExit) as error:  # at the end of the run, unless the rollout made it
            if not self._stopped:
                self.fail(fatal(repr(member), error, budget_spent=False))
        except Exception as error:  # ours or the user's: either way it ends the run, and nobody awaits this task
            self.fail(error)
        finally:
            self._running.pop(member.task, None)
            self._overdue.pop(member.task, None)

    def _end(self, member: Member, run: RolloutRun | None) -> None:
        self.slots.release()
        self.guests.admit()
        self.finished_rollouts += 1
        self.counts.rollouts += 1
        self._end_member(member, run)
        self.pump()

    async def _draw(self, member: Member) -> RolloutRun | None:
        """The member's run, drawn again after recoverable failures; None when it is lost."""
        while True:
            try:
                run = await self._attempt(member)
            except (asyncio.CancelledError, GeneratorExit):
                raise
            except BaseException as error:  # asyncio lets a SystemExit of one rollout end the loop, and so the run
                lost = member.abandoned or self._judge(member, error)
            else:
                if run is not None:
                    return run
                self.counts.drop()
                lost = member.abandoned or member.attempt >= self.failures.retries
            if lost:
                return None
            member.attempt += 1
            self.counts.retried += 1

    async def _attempt(self, member: Member) -> RolloutRun | None:
        """One call of the user's function, after a pause if it is not the first. None: it dropped the draw."""
        try:
            if member.attempt:
                self._watch(member)  # the pause is no part of the attempt before it
                await asyncio.sleep(self.failures.backoff_s(member.attempt))
                self._watch(member)
            return await self._call(member)
        except asyncio.CancelledError:
            self._explain_cancellation(member)
            raise

    async def _call(self, member: Member) -> RolloutRun | None:
        group, draw = member.group, member.group.draw
        pinned = self.live_version() if self.settings.pin_version else None
        policy = self.make_policy(f"{draw.epoch}.{draw.index}.{member.index}.{member.attempt}", pinned)
        prompt = Prompt(
            draw.row,
            policy=policy,
            index=draw.index,
            epoch=draw.epoch,
            rollout_index=member.index,
            seed=self.settings.seed,
        )
        run: RolloutRun | None = None
        failure: BaseException | None = None
        try:
            result = await self.rollout(prompt)
            if result is not None:
                oldest = group.version if policy.oldest_version is None else policy.oldest_version
                run = self.contract.check(result, oldest=oldest, newest=self.live_version())
            return run
        except BaseException as error:
            failure = error
            raise
        finally:
            policy.close()
            record_attempt(self.counts, self.timeline, member, policy.calls, failure or run, self._loop.time())

    def _explain_cancellation(self, member: Member) -> None:
        """Who cancelled: the time limit, the end of the run (nothing is raised), or the rollout itself?"""
        if self._stopped:
            return
        while member.task.cancelling():
            member.task.uncancel()
        if member.timed_out:
            member.timed_out = False
            raise RolloutTimeout(f"{member} took longer than rollout.timeout_s={self.settings.timeout_s:g} s") from None
        raise RolloutError(f"{member} ended with CancelledError, though nobody had cancelled it") from None

    def _judge(self, member: Member, error: BaseException) -> bool:
        """Whether the member is lost (else it is drawn again).

        Raises:
            RolloutFailed: the failure is fatal.
            EngineError, ModelError: it was the engine's own; it comes out as it is.
            BreakerOpen: too many members were lost.
        """
        if is_ours(error):
            raise next(filter(is_ours, leaves(error)))
        if self.failures.judge(error) is Verdict.FATAL:
            raise fatal(repr(member), error, budget_spent=self.failures.budget_spent) from error
        log.info("a rollout failed", rollout=repr(member), error=describe(error), retries=self.failures.retries)
        if member.attempt < self.failures.retries:
            return False
        self._lose(member, describe(error), error)
        return True

    def _lose(self, member: Member, why: str, cause: BaseException | None = None) -> None:
        """The member has no try left. Raises `BreakerOpen` where it is one too many."""
        self.counts.lost += 1
        if (outage := self._breaker.lost()) is not None:
            raise BreakerOpen(
                f"{outage}: this looks like an outage, so the run ends instead of burning prompts. "
                f"The last failure: {why} ({member}). Mend its cause, or raise rollout.retries if it passes by itself."
            ) from cause

    def fail(self, error: Exception) -> None:
        """End the run with this error, unless one came before."""
        if not self._failure.done():
            self._failure.set_exception(error)
        self.stop()

    async def _sweep(self) -> None:
        """Cancel rollouts that run too long; leave behind those that ignore it."""
        timeout_s = self.settings.timeout_s
        patience_s = timeout_s + CANCEL_GRACE_S
        while True:
            now = self._loop.time()
            while (member := _first(self._running)) and member.started_at + timeout_s <= now:
                del self._running[member.task]
                self._overdue[member.task] = member
                member.timed_out = True
                member.task.cancel()
            while (member := _first(self._overdue)) and member.started_at + patience_s <= now:
                del self._overdue[member.task]
                self._abandon(member)
            wake = now + timeout_s
            if member := _first(self._running):
                wake = min(wake, member.started_at + timeout_s)
            if member := _first(self._overdue):
                wake = min(wake, member.started_at + patience_s)
            await asyncio.sleep(wake - now)

    def _abandon(self, member: Member) -> None:
        log.warning("a rollout ignores its cancellation and is left behind", rollout=repr(member))
        member.abandoned = True
        try:
            self._lose(member, "it ignores its cancellation")
            self._end(member, None)
        except Exception as error:  # whatever it is, the sweeper must not die of it
            self.fail(error)


def _first(members: dict[asyncio.Task[None], Member]) -> Member | None:
    return next(iter(members.values()), None)
