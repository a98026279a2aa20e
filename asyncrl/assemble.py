"""Wires the engine together from a config and two ends: a sampler and a trainer.

Everything here is on the event-loop side: the same wiring serves the real ends (run.py) and the fakes in
virtual time (testing/simulation.py).
"""

from __future__ import annotations

from collections.abc import Callable

from asyncrl.config import Config
from asyncrl.data import PromptStream, Rows
from asyncrl.engine import Engine, EngineSettings
from asyncrl.rollout import adaptive
from asyncrl.rollout.batch import Batch
from asyncrl.rollout.concurrency import controller
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.failures import FailurePolicy
from asyncrl.rollout.grading import SignalPatience, grader
from asyncrl.rollout.guests import Guests
from asyncrl.rollout.queue import GroupQueue
from asyncrl.rollout.scheduler import PolicyFactory, RolloutFn, RolloutSettings, Scheduler
from asyncrl.rollout.staleness import StalenessBudget
from asyncrl.step_record import Gauges, Record
from asyncrl.storage.ledger import EventStore, Ledger
from asyncrl.storage.timeline import Timeline
from asyncrl.types import Sampler, Trainer
from asyncrl.watchdog import Watchdog


def assemble(
    config: Config,
    rollout: RolloutFn,
    rows: Rows,
    *,
    sampler: Sampler,
    trainer: Trainer,
    make_policy: PolicyFactory,
    on_step: Callable[[Record, Batch], None],
    on_gauges: Callable[[Gauges], None] = lambda gauges: None,
    contract: Contract | None = None,
    canary_tolerance: float | None = None,
    ledger_store: EventStore | None = None,
    watchdog: Watchdog | None = None,
    timeline: Timeline | None = None,
) -> Engine:
    """An engine that is ready to `run`. The sampler and the trainer must have been entered."""
    hard = config.staleness.policy == "wait"
    bound = config.staleness.max_staleness if hard else None
    queue = GroupQueue(config.prompt_groups_per_step, bound, in_order=config.deterministic)
    slots = controller(config.concurrency)
    guests = Guests(slots, config.evaluation.concurrency)
    ledger = Ledger(ledger_store)
    most_groups = config.max_steps * config.prompt_groups_per_step if config.max_steps else None
    scheduler = Scheduler(
        stream=PromptStream(rows, config.data, config.seed),
        rollout=rollout,
        make_policy=make_policy,
        budget=StalenessBudget(config.budget_groups, most_groups),
        slots=slots,
        guests=guests,
        queue=queue,
        ledger=ledger,
        contract=contract or Contract(),
        failures=FailurePolicy(config.rollout),
        grader=grader(config.advantage, config.group_filter, config.completions_per_prompt, config.turn_discount),
        patience=SignalPatience(config.signal_patience_groups),
        settings=RolloutSettings(
            group_size=config.completions_per_prompt,
            timeout_s=config.rollout.timeout_s,
            min_group_size=config.rollout.min_group_size,
            keep_filtered=config.on_filtered == "drop",
            pin_version=config.sampler.version_policy == "per_rollout",
            seed=config.seed,
        ),
        live_version=lambda: sampler.version,
        timeline=timeline,
    )
    guests.freed = scheduler.pump
    return Engine(
        settings=engine_settings(config, canary_tolerance),
        scheduler=scheduler,
        queue=queue,
        slots=slots,
        ledger=ledger,
        sampler=sampler,
        trainer=trainer,
        watchdog=watchdog or Watchdog(config.stall_timeout_s),
        on_step=on_step,
        on_gauges=on_gauges,
        timeline=timeline,
        adaptive=adaptive.controller(config),
    )


def engine_settings(config: Config, canary_tolerance: float | None) -> EngineSettings:
    return EngineSettings(
        groups_per_step=config.prompt_groups_per_step,
        chunks_per_step=config.pipeline_chunks_per_step,
        max_staleness=config.staleness.max_staleness,
        on_stale=config.staleness.on_stale,
        hard_bound=config.staleness.policy == "wait" or config.staleness.on_stale != "train",
        sync_interval=config.publish.weight_sync_interval,
        publish_timeout_s=config.publish.timeout_s,
        canary_tolerance=canary_tolerance,
        max_steps=config.max_steps,
        skip_steps=config.trainer.skip_steps,
    )


def steps_at_most(config: Config, rows: int) -> int:
    """Optimizer steps of a run whose data is trained to the end: what the learning-rate schedule counts on."""
    prompts = min(rows, config.data.max_rows or rows) * config.data.epochs
    by_data = -(-prompts // config.prompt_groups_per_step)
    return min(by_data, config.max_steps or by_data)
