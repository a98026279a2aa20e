"""Rollouts that are measured and not trained: mean reward on held-out rows, with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import structlog

from asyncrl.data import Prompt, Rows
from asyncrl.errors import BreakerOpen, RolloutContractError, RolloutFailed, first_failure
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.failures import Breaker, is_ours, is_recoverable, users_traceback
from asyncrl.rollout.scheduler import RolloutFn

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows, with its 95 % interval."""

    mean: float
    low: float
    high: float
    rows: int

    @classmethod
    def over(cls, values: list[float]) -> Estimate:
        """The normal interval over rows: the rollouts of one row are not independent. NaN where there are too few."""
        count = len(values)
        mean = sum(values) / count if count else math.nan
        if count < 2:
            return cls(mean, math.nan, math.nan, count)
        variance = sum((value - mean) ** 2 for value in values) / (count - 1)
        half_width = 1.96 * math.sqrt(variance / count)
        return cls(mean, mean - half_width, mean + half_width, count)


@dataclass(slots=True)
class EvalResult:
    """Mean reward over the rows that were rolled out."""

    per_row: dict[int, list[float]] = field(default_factory=dict)
    """Row index -> the rewards of its rollouts."""
    failed: int = 0
    """Rollouts that gave no reward; they count in no mean."""

    @property
    def n(self) -> int:
        """Rollouts that gave a reward."""
        return sum(map(len, self.per_row.values()))

    @property
    def reward(self) -> Estimate:
        """Mean over rows of the mean over a row's rollouts."""
        return Estimate.over([sum(rewards) / len(rewards) for rewards in self.per_row.values() if rewards])

    @property
    def mean(self) -> float:
        return self.reward.mean

    @property
    def ci_low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.reward.low

    @property
    def ci_high(self) -> float:
        return self.reward.high

    def pass_at(self, k: int, solved: float = 1.0) -> Estimate:
        """pass@k: how likely one of `k` rollouts of a row has a reward of at least `solved`.

        Of n rollouts of which c solve the row: 1 - C(n - c, k) / C(n, k), without bias (arXiv:2107.03374, eq. 1).
        Rows with fewer than `k` rollouts are left out.
        """
        counts = [(len(rewards), sum(reward >= solved for reward in rewards)) for rewards in self.per_row.values()]
        found = Estimate.over([1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts if n >= k])
        # A NaN comes first and stays: no comparison with it is true.
        return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Runs a rollout function over rows, `concurrency` at once, each under a time limit."""

    rollout: RolloutFn
    make_policy: Callable[[str], Any]
    contract: Contract
    timeout_s: float
    concurrency: int
    seed: int

    async def run(self, rows: Rows, samples: int = 1) -> EvalResult:
        """Roll out every row `samples` times.

        Raises:
            RolloutFailed: a rollout failed in a way that trying again would not mend.
            BreakerOpen: an outage.
        """
        result = EvalResult(per_row={index: [] for index in range(len(rows))})
        room = anyio.CapacityLimiter(self.concurrency)
        breaker = Breaker()
        try:
            async with anyio.create_task_group() as tasks:
                for index in range(len(rows)):
                    for sample in range(samples):
                        await room.acquire_on_behalf_of((index, sample))
                        tasks.start_soon(self._one, rows, index, sample, result, breaker, room)
        except BaseExceptionGroup as group:
            raise first_failure(group) from None
        return result

    async def _one(
        self, rows: Rows, index: int, sample: int, result: EvalResult, breaker: Breaker, room: anyio.CapacityLimiter
    ) -> None:
        policy = self.make_policy(f"evaluation-{index}-{sample}")
        prompt = Prompt(rows[index], policy=policy, index=index, rollout_index=sample, evaluation=True, seed=self.seed)
        try:
            with anyio.fail_after(self.timeout_s):
                returned = await self.rollout(prompt)
            if returned is None:
                result.failed += 1
                return
            run = self.contract.check(returned, oldest=0, newest=1 << 62)
        except Exception as error:
            result.failed += 1
            self._judge(error, index, breaker)
        else:
            breaker.succeeded()
            result.per_row[index].append(run.reward)
        finally:
            room.release_on_behalf_of((index, sample))

    def _judge(self, error: Exception, index: int, breaker: Breaker) -> None:
        where = f"row {index} of the evaluation"
        if is_ours(error):
            raise error
        if isinstance(error, RolloutContractError):
            raise RolloutFailed(f"{where} returned a sample that cannot be used:\n{error}") from error
        if not is_recoverable(error):
            raise RolloutFailed(f"{where} failed:\n{users_traceback(error)}") from error
        log.info("an evaluation rollout failed", row=index, error=repr(error))
        outage = breaker.lost()
        if outage is not None:
            raise BreakerOpen(f"{outage} in the evaluation. The last: {type(error).__name__}: {error}") from error
