"""Predicts many settings at once, in processes of its own.

A process that dies, Ctrl-C, and an error in a simulation end all of them; none outlives the block.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import structlog

from asyncrl.config import Config
from asyncrl.errors import EngineError, UserError
from asyncrl.metrics.bottleneck import Bottleneck, bottleneck
from asyncrl.metrics.report import Account
from asyncrl.planning.predict import Machine, Prediction, predict, unbounded
from asyncrl.planning.setting import Failure, Point, Setting
from asyncrl.planning.workload import Workload

TURNOVERS = 4
"""Times that everything under way is replaced before measuring begins: the rollouts of a start all begin together."""
LEAST_STEPS, MOST_STEPS = 100, 2000
ROLLOUTS = 10_000
"""Of one prediction, where that is enough steps: a second or two."""
BINDS = {"publish": "hot-loads", "slots": "window"}
"""Kinds of bottlenecks that have another name here; all others keep theirs."""


@dataclass(frozen=True, slots=True)
class Question:
    """What the processes are told once."""

    base: Config
    machine: Machine
    workload: Workload
    seed: int = 0
    steps: int | None = None
    """Optimizer steps to measure. None: `ROLLOUTS` rollouts' worth, from `LEAST_STEPS` to `MOST_STEPS`."""


@dataclass(frozen=True, slots=True)
class Task:
    """One simulation."""

    setting: Setting
    unbounded: bool = False
    """Of staleness: what sampler, trainer and window could do by themselves."""
    resample: int = 0
    """Above 0: with the rows of the workload drawn anew, by this seed (a bootstrap)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a simulation shows."""

    prediction: Prediction
    bottleneck: Bottleneck | None


def solve(question: Question, task: Task) -> Answer | str:
    """Predict one setting. A str is what such a run would say when it ends early.

    Raises:
        ConfigError: no such run could begin.
    """
    setting = task.setting
    config = setting.config(question.base)
    per_step = setting.groups_per_step * setting.group_size
    under_way = setting.demand
    if task.unbounded:
        config = unbounded(config)
        under_way = config.concurrency.max_window
    turnover = -(-min(under_way, config.concurrency.max_window) // per_step)
    warm_up = 10 + TURNOVERS * turnover
    steps = question.steps or min(MOST_STEPS, max(LEAST_STEPS, 2 * warm_up, ROLLOUTS // per_step))
    warm_up = min(warm_up, steps)
    workload, account = question.workload, Account()
    if task.resample:
        workload = Workload(tuple(random.Random(task.resample).choices(workload.rows, k=len(workload.rows))))
    try:
        prediction = predict(
            config,
            question.machine,
            workload,
            steps=steps,
            warm_up=warm_up,
            seed=question.seed,
            on_step=account.add,
        )
    except (EngineError, UserError) as error:
        return str(error)
    return Answer(prediction, bottleneck(account))


class Runner:
    """Answers tasks, `jobs` at a time. Make it with `running`."""

    def __init__(self, question: Question, pool: Executor | None, progress: Callable[[int, int], None]) -> None:
        self._question, self._pool, self._progress = question, pool, progress

    def predictions(self, tasks: Sequence[Task]) -> list[Answer | str]:
        """As `solve`, for each task, in their order.

        Raises:
            EngineError: a process died.
        """
        if not tasks:
            return []
        self._progress(0, len(tasks))
        if self._pool is None:
            found = list[Answer | str]()
            for done, task in enumerate(tasks, 1):
                found.append(solve(self._question, task))
                self._progress(done, len(tasks))
            return found
        with _deaf_children():
            futures = [self._pool.submit(_solve, task) for task in tasks]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                self._progress(done, len(tasks))
        except BrokenProcessPool:
            raise EngineError(
                "a process that simulates settings died, for lack of memory perhaps. Try fewer at once (--jobs 1), or "
                "fewer steps (--steps)."
            ) from None
        return [future.result() for future in futures]

    def ideals(self, settings: Sequence[Setting]) -> list[float]:
        """Samples/s of each without a bound on staleness; 0 where the run would end early."""
        found = self.predictions([Task(setting, unbounded=True) for setting in settings])
        return [0.0 if isinstance(one, str) else one.prediction.samples_per_s for one in found]

    def points(self, settings: Sequence[Setting], ideal: float) -> list[Point | Failure]:
        """`ideal`: samples/s."""
        found = zip(settings, self.predictions([Task(setting) for setting in settings]), strict=True)
        return [Failure(s, one) if isinstance(one, str) else point_of(s, one, ideal) for s, one in found]


@contextmanager
def running(question: Question, jobs: int, progress: Callable[[int, int], None]) -> Iterator[Runner]:
    """A runner with `jobs` processes; 1 stays in this one. `progress` is told (done, of how many)."""
    logged = structlog.get_config()
    quiet()
    try:
        with _pool(question, jobs) as pool:
            yield Runner(question, pool, progress)
    finally:
        structlog.configure(**logged)


@contextmanager
def _pool(question: Question, jobs: int) -> Iterator[Executor | None]:
    if jobs <= 1:
        yield None
        return
    before = {child.pid for child in multiprocessing.active_children()}
    # By a file: a process that is started reads what it is told only after its imports, and holds up the next one.
    with TemporaryDirectory(prefix="asyncrl-tune-") as folder:
        told = Path(folder) / "question"
        told.write_bytes(pickle.dumps(question))
        pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _begin, (str(told),))
        try:
            yield pool
        finally:
            for child in multiprocessing.active_children():
                if child.pid not in before:
                    child.terminate()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that start in the block take no notice of Ctrl-C, not even while they start. Here it works after it."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def quiet() -> None:
    """What simulated runs log is of no interest."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))


_asked: Question


def _begin(told: str) -> None:
    """In a process: learn what is asked. It ends when the one that asks is gone, however that ended."""
    global _asked
    quiet()
    _asked = pickle.loads(Path(told).read_bytes())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, name="asyncrl parent watch", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _solve(task: Task) -> Answer | str:
    return solve(_asked, task)


def point_of(setting: Setting, answer: Answer, ideal: float) -> Point:
    """What matters of an answer."""
    prediction, binds = answer.prediction, answer.bottleneck
    drawn = prediction.loss_tokens_per_s + prediction.lost_tokens_per_s
    lost = prediction.lost_tokens_per_s / drawn if drawn else 0.0
    kept = 1 - lost if setting.policy == "mask" else 1.0  # others train all of what they train
    return Point(
        setting=setting,
        samples_per_s=kept * prediction.samples_per_s,
        share=kept * prediction.samples_per_s / ideal,
        error=kept * prediction.samples_per_s_error / ideal,
        staleness_mean=prediction.staleness_mean,
        staleness_worst=prediction.staleness_worst,
        lost=lost,
        wait_share=prediction.wait_share,
        publish_share=prediction.publish_wait_share,
        busy=prediction.in_flight / prediction.window if prediction.window else 0.0,
        step_s=1 / prediction.steps_per_s,
        binds=BINDS.get(binds.kind, binds.kind) if binds is not None else "",
        why=binds.sentence if binds is not None else "",
    )
