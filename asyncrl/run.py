"""The composition root: from a config to a running engine, and what it leaves behind.

    train(rollout, dataset=..., config=...) -> TrainResult
    evaluate(rollout, dataset=..., config=...) -> EvalResult

Only this module sees both sides, the event loop's and torch's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio

from asyncrl.assemble import steps_at_most
from asyncrl.config import Config
from asyncrl.data import Rows, load_rows
from asyncrl.ends import evaluated_weights, open_policy, open_sampler, split_adapter
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.interrupt import Interrupt, run_interruptible
from asyncrl.last_resort import LastResort
from asyncrl.lives import Resume, open_life
from asyncrl.measure import concurrency_alone, make_evaluator
from asyncrl.metrics.lag import LagMeter, watch_lag
from asyncrl.metrics.live import LiveView, Mode
from asyncrl.model_facts import load_tokenizer, read_facts
from asyncrl.result import TrainResult
from asyncrl.rollout.estimate import EvalResult
from asyncrl.rollout.evaluations import EvaluationFn, evaluation_function
from asyncrl.rollout.factory import RolloutSetup, open_rollout, require_rollout
from asyncrl.storage.folder import full_disk_named
from asyncrl.storage.log import open_log
from asyncrl.training_run import LOAD_LIMIT_S, TrainingRun
from asyncrl.watchdog import Watchdog
from asyncrl.workers import refuse_in_worker

__all__ = ["TrainResult", "evaluate", "evaluate_async", "train", "train_async"]


def train(
    rollout: Callable[..., Any],
    *,
    dataset: str | Path | Rows | None = None,
    config: Config,
    evaluation: str | Path | Rows | EvaluationFn | None = None,
    evaluation_samples: int | None = None,
    resume: Resume = False,
    view: Mode = "auto",
) -> TrainResult:
    """Train a model on what `rollout` returns. Blocks until the run has ended.

    Args:
        rollout: `async def rollout(prompt) -> RolloutSample | RolloutRun | None`, or a factory `make_rollout(setup)`.
        dataset: A JSONL file, a list of dicts, or anything with len() and [index]; `config.dataset` if left out.
        config: All settings.
        evaluation: Held-out rows, rolled out before and after training (and every `evaluation.interval` steps beside
            it) and never trained on; or an async function that measures in its own way: docs/evaluation.md.
            `config.evaluation.dataset` if left out.
        evaluation_samples: Rollouts of each held-out row; `config.evaluation.samples` if left out.
        resume: Go on with a run that ended early (docs/durability.md). True: from the newest checkpoint in
            `config.run_dir`, or from the start where there is none; or the name or path of a checkpoint.
        view: How progress is shown; `auto` is live in a terminal, plain lines elsewhere.

    Raises:
        UserError: a setting, the dataset, the model, the checkpoint, or what the rollout function returns cannot be
            used.
        EngineError: the run could not go on.
        KeyboardInterrupt: after a Ctrl-C, once what was trained has been published and saved.
        SystemExit: after another signal, likewise; its code is in `asyncrl.exits`.
    """
    return run_interruptible(
        lambda interrupt: train_async(
            rollout,
            dataset=dataset,
            config=config,
            evaluation=evaluation,
            evaluation_samples=evaluation_samples,
            resume=resume,
            view=view,
            interrupt=interrupt,
        )
    )


async def train_async(
    rollout: Callable[..., Any],
    *,
    dataset: str | Path | Rows | None = None,
    config: Config,
    evaluation: str | Path | Rows | EvaluationFn | None = None,
    evaluation_samples: int | None = None,
    resume: Resume = False,
    view: Mode = "auto",
    interrupt: Interrupt | None = None,
) -> TrainResult:
    """`train` for programs that have an event loop. Signals are the caller's: `interrupt` is how to pass them on."""
    refuse_in_worker()
    require_rollout(rollout)
    interrupt = interrupt or Interrupt()
    rows = load_rows(_dataset_of(config, dataset))
    measure = evaluation_function(evaluation, evaluation_samples, config.evaluation)
    with Watchdog(config.stall_timeout_s).phase("reading the settings of the model"):
        facts = await asyncio.to_thread(read_facts, config.model, config.max_seq_len)
    total_steps = steps_at_most(config, len(rows))
    _silence_progress_bars()
    with open_life(config, rows, resume) as life, open_log(life.folder.log):
        with LiveView(Path(config.model).name, total_steps, mode=view) as live:
            live.note(f"run folder: {life.folder.root}")
            from asyncrl.training.thread import ThreadedTrainer  # what its imports have to say goes into the log

            watchdog = Watchdog(config.stall_timeout_s, life.folder.root / "stalled.txt")
            live.doing = lambda: watchdog.doing
            run = TrainingRun(life.config, facts, life, live, interrupt, watchdog, ThreadedTrainer, total_steps)
            try:
                with (
                    full_disk_named(life.folder.root),
                    LastResort(watchdog, interrupt, config.stop_timeout_s),
                    watchdog.phase("opening what it needs"),  # whatever has no phase of its own
                ):
                    result = await run.run(rollout, rows, measure)
            except AsyncRLError as error:
                run.conclude_failure(error)
                raise
        with full_disk_named(life.folder.root):
            run.conclude(result)  # below the panel: what is said last is read first
    return result


def evaluate(
    rollout: Callable[..., Any],
    *,
    dataset: str | Path | Rows | None = None,
    config: Config,
    samples: int | None = None,
) -> EvalResult:
    """Mean reward of `config.model` (a model, or the folder of a LoRA adapter) on the rows of `dataset`.

    Left out, `dataset` is `config.evaluation.dataset` or else `config.dataset`, `samples` `config.evaluation.samples`.
    Raises: as `train`.
    """
    return run_interruptible(
        lambda interrupt: evaluate_async(rollout, dataset=dataset, config=config, samples=samples, interrupt=interrupt)
    )


async def evaluate_async(
    rollout: Callable[..., Any],
    *,
    dataset: str | Path | Rows | None = None,
    config: Config,
    samples: int | None = None,
    interrupt: Interrupt | None = None,
) -> EvalResult:
    """`evaluate` for programs that have an event loop."""
    refuse_in_worker()
    require_rollout(rollout)
    rows = load_rows(_dataset_of(config, dataset if dataset is not None else config.evaluation.dataset))
    config, adapter = split_adapter(config)
    logs = Path(config.run_dir or ".") / "evaluation"
    setup = RolloutSetup(config, logs, lambda: load_tokenizer(config.model))
    moves: Counter[str] = Counter()
    watchdog = Watchdog(config.stall_timeout_s)
    with (
        LastResort(watchdog, interrupt or Interrupt(), config.stop_timeout_s),
        watchdog.phase("evaluating", marks=moves.total),
    ):
        async with AsyncExitStack() as stack:
            facts = await asyncio.to_thread(read_facts, config.model, config.max_seq_len)
            with watchdog.phase("opening the sampler", limit_s=LOAD_LIMIT_S):
                sampler = await stack.enter_async_context(open_sampler(config, facts, logs))
            stack.callback(asyncio.create_task(watch_lag(LagMeter()), name="asyncrl lag monitor").cancel)
            function = await stack.enter_async_context(open_rollout(rollout, setup))
            if (weights := evaluated_weights(config, adapter, sampler)) is not None:
                await sampler.publish(weights)
            context = await stack.enter_async_context(open_policy(config, facts, sampler))
            return await make_evaluator(config, facts, function, context).run(
                rows,
                samples or config.evaluation.samples,
                room=anyio.Semaphore(concurrency_alone(config)),
                on_end=lambda: moves.update(ended=1),
                on_retry=lambda: moves.update(retried=1),
            )


# Parts


def _silence_progress_bars() -> None:
    """Those of `transformers` would write through the live view."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _dataset_of(config: Config, dataset: str | Path | Rows | None) -> str | Path | Rows:
    chosen = dataset if dataset is not None else config.dataset
    if chosen is None:
        raise ConfigError("no dataset was given. Pass dataset=..., or set `dataset` in the config.")
    return chosen
