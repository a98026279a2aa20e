"""Wires evaluations together: which policy they draw from, how much of the sampler is theirs, and who hears of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.config import Config
from asyncrl.engine import Engine
from asyncrl.metrics.live import LiveView
from asyncrl.metrics.sinks import SinkList
from asyncrl.model_facts import ModelFacts
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.evaluation import Evaluator
from asyncrl.rollout.evaluations import Evaluated, EvaluationFn, Evaluations
from asyncrl.rollout.scheduler import PolicyFactory
from asyncrl.storage.timeline import Timeline
from asyncrl.types import EvaluatedRun

CONCURRENCY_ALONE = 64
"""Rollouts of an evaluation at once while nothing is trained: most samplers keep up with so many."""


def policies(context: PolicyContext) -> PolicyFactory:
    """What hands every rollout its policy."""
    return lambda session, version: Policy(context, session, version)


def make_evaluator(
    config: Config,
    facts: ModelFacts,
    function: Any,
    context: PolicyContext,
    on_run: Callable[[EvaluatedRun], None] = lambda run: None,
    timeline: Timeline | None = None,
) -> Evaluator:
    """The evaluator of a run, or of a finished model; `on_run` hears of each rollout that gave a reward."""
    if config.evaluation.temperature is not None:
        context = copy(context)
        context.params = replace(context.params, temperature=config.evaluation.temperature)
    return Evaluator(
        rollout=function,
        make_policy=policies(context),
        contract=Contract(facts.vocabulary, facts.max_seq_len),
        settings=config.rollout,
        seed=config.seed,
        on_run=on_run,
        timeline=timeline,
    )


def concurrency_alone(config: Config) -> int:
    """Rollouts at once while nothing is trained."""
    return min(config.evaluation.concurrency or CONCURRENCY_ALONE, config.concurrency.max_window)


def beside(
    engine: Engine,
    function: EvaluationFn | None,
    evaluator: Evaluator,
    *,
    config: Config,
    sinks: SinkList,
    live: LiveView,
) -> Evaluations:
    """The evaluations of the run that `engine` trains: told of its publications, as guests in its window."""

    def on_result(evaluated: Evaluated) -> None:
        record = evaluated.record()
        sinks.evaluated(record)
        live.evaluated(record)
        live.note(str(evaluated))

    evaluations = Evaluations(
        function=function,
        evaluator=evaluator,
        sampler=engine.sampler,
        guests=engine.scheduler.guests,
        interval=config.evaluation.interval,
        alone=concurrency_alone(config),
        limit_s=config.stall_timeout_s,
        on_result=on_result,
        report=live.note,
        fail=engine.scheduler.fail,
    )
    engine.on_published = evaluations.published
    engine.on_gauges = lambda gauges: live.gauges({**gauges, **evaluations.gauges()})
    return evaluations
