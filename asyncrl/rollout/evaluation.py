"""Rollouts that are measured and not trained."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import anyio
import structlog

from asyncrl.config import RolloutConfig
from asyncrl.data import Draw, Prompt, Rows
from asyncrl.errors import BreakerOpen, first_failure
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.counts import Counts, record_attempt
from asyncrl.rollout.estimate import EvalResult
from asyncrl.rollout.failures import Breaker, FailurePolicy, Verdict, describe, fatal, is_ours, leaves
from asyncrl.rollout.group import Member, OpenGroup
from asyncrl.rollout.limited import call
from asyncrl.rollout.scheduler import PolicyFactory, RolloutFn
from asyncrl.storage.timeline import Timeline
from asyncrl.types import EvaluatedRun, RolloutRun

log = structlog.get_logger(__name__)


class Room(Protocol):
    """Where a rollout waits for its turn: `anyio.Semaphore`, or `Guests` of the training window."""

    async def acquire(self) -> None: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs a rollout function over rows, each rollout under a time limit. Failures mean what they mean in training."""

    rollout: RolloutFn
    make_policy: PolicyFactory
    contract: Contract
    settings: RolloutConfig
    seed: int
    on_run: Callable[[EvaluatedRun], None] = lambda run: None
    """Hears of each rollout that gave a reward."""
    timeline: Timeline | None = None

    async def run(
        self,
        rows: Rows,
        samples: int = 1,
        *,
        room: Room,
        version: int | None = None,
        on_end: Callable[[], None] = lambda: None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> EvalResult:
        """Roll out every row `samples` times, pinned to `version` where one is given.

        `on_end` is called as each rollout ends, `on_retry` as one is drawn again.

        Raises:
            RolloutFailed: a rollout failed in a way that trying again would not mend.
            BreakerOpen: an outage.
        """
        now = asyncio.get_running_loop().time()
        failures = FailurePolicy(self.settings)
        measurement = _Measurement(self, version, now, EvalResult(), failures, Breaker(), on_end, on_retry)
        try:
            async with anyio.create_task_group() as tasks:
                for index in range(len(rows)):
                    measurement.result.per_row[index] = []
                    for sample in range(samples):
                        # All wait at once: whoever comes back for one more slot at a time gets none of those that
                        # come free together.
                        tasks.start_soon(measurement.one, rows, index, sample, room)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        return measurement.result


@dataclass(frozen=True, slots=True)
class _Measurement:
    """One evaluation under way."""

    evaluator: Evaluator
    version: int | None
    began_at: float
    """On the loop's clock."""
    result: EvalResult
    failures: FailurePolicy
    breaker: Breaker
    on_end: Callable[[], None]
    on_retry: Callable[[], None]

    async def one(self, rows: Rows, index: int, sample: int, room: Room) -> None:
        await room.acquire()
        began = asyncio.get_running_loop().time()
        try:
            run = await self._draw(rows, index, sample)
        finally:
            room.release()
        if run is None:
            self.result.failed += 1
        else:
            self.result.per_row[index].append(run.reward)
            seconds = asyncio.get_running_loop().time() - began
            self.evaluator.on_run(EvaluatedRun(self._version_of(run), index, run, seconds))
        self.on_end()

    def _version_of(self, run: RolloutRun) -> int:
        """That of the evaluation; without a pin the newest that drew a token."""
        if self.version is not None:
            return self.version
        return max(version for segment in run.segments for version in segment.versions or ())

    async def _draw(self, rows: Rows, index: int, sample: int) -> RolloutRun | None:
        """The run of one rollout, drawn again after recoverable failures; None: it gave no reward."""
        attempt = 0
        while True:
            found = await self._attempt(rows, index, sample, attempt)
            if not isinstance(found, BaseException):
                if found is not None:
                    self.breaker.succeeded()
                else:
                    log.info("an evaluation rollout failed", row=index, error="the rollout function returned None")
                return found
            if self._judge(found, index, attempt):
                return None
            attempt += 1
            self.on_retry()
            await asyncio.sleep(self.failures.backoff_s(attempt))

    async def _attempt(self, rows: Rows, index: int, sample: int, attempt: int) -> RolloutRun | BaseException | None:
        evaluator, name = self.evaluator, f"row {index} of the evaluation"
        policy = evaluator.make_policy(f"evaluation-{self.version}-{index}-{sample}-{attempt}", self.version)
        began = asyncio.get_running_loop().time()
        prompt = Prompt(
            rows[index], policy=policy, index=index, rollout_index=sample, evaluation=True, seed=evaluator.seed
        )

        async def drawn(prompt: Prompt) -> RolloutRun | None:
            result = await evaluator.rollout(prompt)
            return None if result is None else evaluator.contract.check(result, oldest=0, newest=1 << 62)

        found: RolloutRun | BaseException | None = asyncio.CancelledError()
        try:
            outcome = await call(drawn, prompt, name, evaluator.settings.timeout_s)
            found = outcome.value if outcome.error is None else outcome.error
        finally:
            policy.close()
            if (timeline := evaluator.timeline) is not None:
                measured = policy.version if self.version is None else self.version
                group = OpenGroup(-1, Draw(0, index, rows[index]), 1, measured, self.began_at)
                member, now = Member(group, sample, attempt, began), asyncio.get_running_loop().time()
                record_attempt(Counts(), timeline, member, policy.calls, found, now, evaluation=measured + 1)
        return found

    def _judge(self, error: BaseException, index: int, attempt: int) -> bool:
        """Whether the rollout is lost (else it is drawn again). Raises what ends the evaluation."""
        where = f"row {index} of the evaluation"
        if is_ours(error):
            raise next(filter(is_ours, leaves(error)))
        if self.failures.judge(error) is Verdict.FATAL:
            raise fatal(where, error, budget_spent=self.failures.budget_spent) from error
        log.info("an evaluation rollout failed", row=index, error=describe(error), retries=self.failures.retries)
        if attempt < self.failures.retries:
            return False
        outage = self.breaker.lost()
        if outage is not None:
            raise BreakerOpen(f"{outage} in the evaluation. The last: {describe(error)}") from error
        return True
