"""Evaluations before, beside and after training: each measures one version, and training does not wait for it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import structlog

from asyncrl.config import EvaluationConfig
from asyncrl.data import Rows, load_rows
from asyncrl.errors import BreakerOpen, ConfigError, EvaluationFailed
from asyncrl.rollout.estimate import Estimate, EvalResult
from asyncrl.rollout.evaluation import Evaluator, Room
from asyncrl.rollout.factory import is_async
from asyncrl.rollout.failures import is_ours, users_traceback
from asyncrl.rollout.guests import Guests
from asyncrl.types import Sampler

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Evaluation:
    """One evaluation, as an evaluation function sees it."""

    version: int
    """The weights that are measured, in optimizer steps."""
    policy: Any
    """A handle on them, like `prompt.policy`. What it draws takes no slots: it is for a few requests."""
    done: int = 0
    """Rollouts that have ended."""
    retried: int = 0
    """Tries of rollouts that have failed, and were not the last."""
    _rollouts: Callable[..., Awaitable[EvalResult]] = field(kw_only=True)
    """`Evaluator.run`, of this version."""
    _moved: Callable[[], None] = field(kw_only=True)

    async def rollouts(self, rows: Rows, samples: int = 1) -> EvalResult:
        """The run's own rollout function over `rows`, `samples` times each, in the slots of evaluations."""
        return await self._rollouts(rows, samples, on_end=self._ended, on_retry=self._again)

    def _ended(self) -> None:
        self.done += 1
        self._moved()

    def _again(self) -> None:
        self.retried += 1
        self._moved()


EvaluationFn = Callable[[Evaluation], Awaitable["EvalResult | Mapping[str, float] | None"]]


def evaluation_function(
    given: str | Path | Rows | EvaluationFn | None, samples: int | None, config: EvaluationConfig
) -> EvaluationFn | None:
    """What measures a version: a function as it is given, or the rollouts of held-out rows; None: nothing.

    Raises:
        ConfigError: there is an interval and nothing to evaluate, or a function that is not async.
    """
    chosen = config.dataset if given is None else given
    if chosen is None:
        if config.interval is not None:
            raise ConfigError(
                f"evaluation.interval is {config.interval}, but there is nothing to evaluate. Pass evaluation=rows to "
                "asyncrl.train, or set evaluation.dataset to a JSONL file."
            )
        return None
    if is_async(chosen):
        return chosen  # type: ignore[return-value]
    if callable(chosen):
        raise ConfigError(f"evaluation is {chosen!r}. Expected rows, a JSONL file, or an async function.")
    rows, times = load_rows(chosen), config.samples if samples is None else samples

    async def held_out(evaluation: Evaluation) -> EvalResult:
        return await evaluation.rollouts(rows, times)

    return held_out


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation found."""

    version: int
    """The weights that were measured, in optimizer steps."""
    newest_version: int
    """As `version`; larger where the sampler could not hold that one, and newer weights took part."""
    seconds: float
    result: EvalResult | None
    """Of rollouts; None where an evaluation function returned numbers of its own."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Those that it returned."""

    @property
    def reward(self) -> Estimate | None:
        """None where nothing was rewarded."""
        return self.result.reward if self.result is not None and self.result.n else None

    def record(self) -> dict[str, float]:
        """As `evaluations.jsonl` and the trackers have it: docs/metrics.md."""
        record = {
            "eval_version": float(self.version),
            "eval_version_newest": float(self.newest_version),
            "eval_s": round(self.seconds, 3),
        }
        if self.result is not None:
            reward = self.result.reward
            record |= {"eval_reward": reward.mean, "eval_reward_low": reward.low, "eval_reward_high": reward.high}
            record |= {f"eval_pass_at_{k}": estimate.mean for k, estimate in self.result.passes().items()}
            record |= {"eval_rollouts": float(self.result.n), "eval_failed": float(self.result.failed)}
        return record | {f"eval_{name}": float(number) for name, number in self.numbers.items()}

    def as_json(self) -> dict[str, Any]:
        result = None
        if self.result is not None:
            result = {"rewards": list(self.result.per_row.items()), "failed": self.result.failed}
        return {
            "versions": [self.version, self.newest_version],
            "seconds": self.seconds,
            "result": result,
            "numbers": dict(self.numbers),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Evaluated:
        """What `as_json` gave."""
        result = found["result"]
        if result is not None:
            result = EvalResult({row: list(rewards) for row, rewards in result["rewards"]}, result["failed"])
        version, newest = found["versions"]
        return cls(version, newest, found["seconds"], result, found["numbers"])

    def __str__(self) -> str:
        """One line for whoever watches the run."""
        step = f"step {self.version}"
        if self.newest_version != self.version:
            step = f"steps {self.version} to {self.newest_version} (this sampler holds one version at a time)"
        if self.result is None:
            return f"evaluation at {step}: " + ", ".join(f"{name} {n:.4g}" for name, n in self.numbers.items())
        passes = "".join(f", pass@{k} {estimate.mean:.3f}" for k, estimate in self.result.passes().items())
        return f"held-out reward at {step}: {self.result}{passes}"


@dataclass(slots=True)
class Evaluations:
    """Owns the evaluation that runs, and what all of them found. Lives as an async context manager.

    consumes    versions that go live
    produces    `done`; what went wrong goes to `report`, and to `fail` if it must end the run
    waits for   its rollouts, each under a limit of its own; for nothing longer than `limit_s`
    woken by    a publication
    """

    function: EvaluationFn | None
    evaluator: Evaluator
    sampler: Sampler
    guests: Guests
    interval: int | None
    """Steps from one evaluation to the next; None: none beside training."""
    alone: int
    """Rollouts at once while nothing is trained."""
    limit_s: float
    on_result: Callable[[Evaluated], None]
    report: Callable[[str], None]
    fail: Callable[[Exception], None]

    done: list[Evaluated] = field(default_factory=list)
    skipped: int = 0
    """Evaluations that were due while another one ran."""
    given_up: int = 0
    _last_due: int = 0
    _current: Evaluation | None = None
    _task: asyncio.Task[None] | None = None
    _over: bool = False
    _failure: Exception | None = None

    async def __aenter__(self) -> Evaluations:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()
        if self._task is not None:
            await asyncio.wait([self._task])

    # Before, beside and after training

    async def before(self) -> Evaluated | None:
        """Measure the live version while nothing is trained.

        Raises:
            EngineError: a rollout, or the evaluation function, failed.
        """
        return await self._measure(anyio.Semaphore(self.alone)) if self.function is not None else None

    def published(self, version: int) -> None:
        """Weights of `version` are live: evaluate them, if that is due. Returns at once."""
        if self.function is None or self.interval is None or self._over:
            return
        if version // self.interval <= self._last_due // self.interval:
            return
        self._last_due = version
        if self._task is not None and not self._task.done():
            self.skipped += 1
            if self.skipped == 1:
                self.report(
                    f"version {version} is not evaluated: the evaluation before still runs. Should that happen often, "
                    "raise evaluation.interval or evaluation.concurrency."
                )
            return
        self._task = asyncio.create_task(self._beside(), name=f"asyncrl evaluation of {version}")

    def training_is_over(self) -> None:
        """What still runs has the sampler for itself."""
        self._over = True
        self.guests.training_is_over(self.alone)

    async def after(self) -> Evaluated | None:
        """What the live version is worth: from the evaluation that still runs, if it is that one, or a new one.

        Raises: as `before`.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._failure is not None:
            raise self._failure
        if self.done and self.done[-1].version == self.sampler.version:
            return self.done[-1]
        return await self.before()

    def cancel(self) -> None:
        """Give up what runs, without a word."""
        self._over = True
        if self._task is not None:
            self._task.cancel()

    # One evaluation

    async def _beside(self) -> None:
        try:
            await self._measure(self.guests)
        except (EvaluationFailed, BreakerOpen) as error:  # training would notice an outage by itself
            self.given_up += 1
            log.warning("an evaluation was given up", error=str(error))
            self.report(f"an evaluation was given up, and training goes on: {error}")
        except Exception as error:  # it would have ended the run in a training rollout too
            self._failure = error
            if not self._over:
                self.fail(error)

    async def _measure(self, room: Room) -> Evaluated:
        loop = asyncio.get_running_loop()
        began = loop.time()
        with self.sampler.hold() as pinned:
            version = self.sampler.version if pinned is None else pinned
            found = await self._limited(version, pinned, room)
            newest = self.sampler.version if pinned is None else pinned
        if (timeline := self.evaluator.timeline) is not None:
            timeline.span("evaluation", f"evaluation of {version}", began, loop.time(), version=version)
        result = found if isinstance(found, EvalResult) else None
        numbers = {} if found is None or isinstance(found, EvalResult) else dict(found)
        evaluated = Evaluated(version, newest, loop.time() - began, result, numbers)
        self.done.append(evaluated)
        self.on_result(evaluated)
        return evaluated

    async def _limited(self, version: int, pinned: int | None, room: Room) -> EvalResult | Mapping[str, float] | None:
        """Call the function. Raises `EvaluationFailed` when nothing has moved for `limit_s`."""
        policy = self.evaluator.make_policy(f"evaluation-{version}", pinned)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.limit_s) as deadline:

                def moved() -> None:
                    if not deadline.expired():
                        deadline.reschedule(loop.time() + self.limit_s)

                rollouts = partial(self.evaluator.run, room=room, version=pinned)
                self._current = Evaluation(version, policy, _rollouts=rollouts, _moved=moved)
                return await self._ask(self._current)
        except TimeoutError:
            assert self._current is not None
            raise EvaluationFailed(
                f"the evaluation of version {version} has not moved for stall_timeout_s={self.limit_s:g} s, after "
                f"{self._current.done} rollouts. Look at what your evaluation waits for, or raise stall_timeout_s."
            ) from None
        finally:
            self._current = None
            policy.close()

    async def _ask(self, evaluation: Evaluation) -> EvalResult | Mapping[str, float] | None:
        assert self.function is not None
        try:
            found = await self.function(evaluation)
        except (Exception, SystemExit) as error:  # asyncio would let the second one end the loop
            if is_ours(error):
                raise
            raise EvaluationFailed(
                f"the evaluation function failed at version {evaluation.version}:\n{users_traceback(error)}"
            ) from error
        if found is not None and not isinstance(found, EvalResult) and not _numbers(found):
            raise EvaluationFailed(
                f"the evaluation function returned {found!r}. Expected what evaluation.rollouts(...) gave, a dict from "
                "names to numbers, or None."
            )
        return found

    # How things stand

    def found(self) -> list[dict[str, Any]]:
        """What all of them found, as a checkpoint holds it."""
        return [evaluated.as_json() for evaluated in self.done]

    def go_on(self, found: Sequence[Mapping[str, Any]]) -> None:
        """Start from what an earlier life of the run had `found`."""
        self.done = [Evaluated.from_json(evaluated) for evaluated in found]
        self._last_due = max((evaluated.version for evaluated in self.done), default=0)

    @property
    def best(self) -> Evaluated | None:
        """That of the highest mean reward, the first of equals."""
        rewarded = [evaluated for evaluated in self.done if evaluated.reward is not None]
        return max(rewarded, key=_mean, default=None)

    def marks(self) -> tuple[int, int, int] | None:
        """What changes when something moves."""
        current = self._current
        return None if current is None else (current.version, current.done, current.retried)

    def gauges(self) -> dict[str, float]:
        """What runs now; nothing where none does."""
        if self._current is None:
            return {}
        return {"eval_version": self._current.version, "eval_done": self._current.done}


def _mean(evaluated: Evaluated) -> float:
    assert evaluated.reward is not None
    return evaluated.reward.mean


def _numbers(found: object) -> bool:
    return isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(value, int | float) and not math.isnan(value)
        for name, value in found.items()
    )
