"""The composition root: from a config to a running engine, and what it leaves behind.

    train(rollout, dataset=..., config=...) -> TrainResult
    evaluate(rollout, dataset=..., config=...) -> EvalResult

Only this module sees both sides, the event loop's and torch's.
"""

from __future__ import annotations

import asyncio
import errno
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import structlog

from asyncrl.agents.endpoint import Endpoint
from asyncrl.agents.policy import PolicyContext
from asyncrl.agents.transcript import as_metrics
from asyncrl.assemble import assemble, steps_at_most
from asyncrl.config import Config
from asyncrl.data import Rows, load_rows
from asyncrl.ends import adapter_weights, canary_tolerance, choose_sampler, open_sampler, split_adapter, torch_threads
from asyncrl.engine import Engine, Record, calm_collector
from asyncrl.errors import AsyncRLError, ConfigError, EngineError
from asyncrl.interrupt import Interrupt, run_interruptible
from asyncrl.measure import beside, concurrency_alone, make_evaluator, policies
from asyncrl.metrics.live import LiveView, Mode
from asyncrl.metrics.report import where_time_went
from asyncrl.metrics.sinks import SinkList, open_sinks
from asyncrl.model_facts import ModelFacts, load_tokenizer, read_facts
from asyncrl.result import TrainResult
from asyncrl.rollout.batch import Batch
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.estimate import EvalResult
from asyncrl.rollout.evaluations import Evaluated, EvaluationFn, Evaluations, evaluation_function
from asyncrl.rollout.factory import RolloutSetup, open_rollout, require_rollout
from asyncrl.storage.folder import RunFolder
from asyncrl.storage.ledger_file import Bounds, LedgerStore
from asyncrl.storage.log import open_log
from asyncrl.storage.rollouts import RolloutLog
from asyncrl.types import Probe, Sampler, SamplingParams, Trainer
from asyncrl.workers import refuse_in_worker

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
PROBE_TOKENS = 16

__all__ = ["TrainResult", "evaluate", "evaluate_async", "train", "train_async"]

log = structlog.get_logger(__name__)


def train(
    rollout: Callable[..., Any],
    *,
    dataset: str | Path | Rows | None = None,
    config: Config,
    evaluation: str | Path | Rows | EvaluationFn | None = None,
    evaluation_samples: int | None = None,
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
        view: How progress is shown; `auto` is live in a terminal, plain lines elsewhere.

    Raises:
        UserError: a setting, the dataset, the model, or what the rollout function returns cannot be used.
        EngineError: the run could not go on.
        KeyboardInterrupt: after a Ctrl-C, once what was trained has been published and saved.
    """
    result = run_interruptible(
        lambda interrupt: train_async(
            rollout,
            dataset=dataset,
            config=config,
            evaluation=evaluation,
            evaluation_samples=evaluation_samples,
            view=view,
            interrupt=interrupt,
        )
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return result


async def train_async(
    rollout: Callable[..., Any],
    *,
    dataset: str | Path | Rows | None = None,
    config: Config,
    evaluation: str | Path | Rows | EvaluationFn | None = None,
    evaluation_samples: int | None = None,
    view: Mode = "auto",
    interrupt: Interrupt | None = None,
) -> TrainResult:
    """`train` for programs that have an event loop. Signals are the caller's: `interrupt` is how to pass them on."""
    refuse_in_worker()
    require_rollout(rollout)
    rows = load_rows(_dataset_of(config, dataset))
    measure = evaluation_function(evaluation, evaluation_samples, config.evaluation)
    facts = await asyncio.to_thread(read_facts, config.model, config.max_seq_len)
    folder = RunFolder.create(config)
    total_steps = steps_at_most(config, len(rows))
    _silence_progress_bars()
    with open_log(folder.log), LiveView(Path(config.model).name, total_steps, mode=view) as live:
        live.note(f"run folder: {folder.root}")
        run = _TrainingRun(config, facts, folder, live, interrupt or Interrupt(), total_steps)
        try:
            with _full_disk_named(folder.root):
                result = await run.run(rollout, rows, measure)
        except AsyncRLError as error:
            run.conclude_failure(error)
            raise
    run.conclude(result)
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
    facts = await asyncio.to_thread(read_facts, config.model, config.max_seq_len)
    logs = Path(config.run_dir or ".") / "evaluation"
    setup = RolloutSetup(config, logs, lambda: load_tokenizer(config.model))
    async with open_sampler(config, facts, logs) as sampler, open_rollout(rollout, setup) as function:
        if adapter is not None:
            await sampler.publish(adapter_weights(adapter, sampler))
        async with _open_policy(config, facts, sampler) as context:
            evaluator = make_evaluator(config, facts, function, context)
            room = anyio.Semaphore(concurrency_alone(config))
            return await evaluator.run(rows, samples or config.evaluation.samples, room=room)


@dataclass(slots=True)
class _TrainingRun:
    """One training run from an open run folder to its summary."""

    config: Config
    facts: ModelFacts
    folder: RunFolder
    live: LiveView
    interrupt: Interrupt
    total_steps: int
    records: list[Record] = field(default_factory=list)

    async def run(self, rollout: Callable[..., Any], rows: Rows, measure: EvaluationFn | None) -> TrainResult:
        config, folder = self.config, self.folder
        async with AsyncExitStack() as stack:
            trainer, sampler = await self._open_ends(stack)
            setup = RolloutSetup(config, folder.root, lambda: load_tokenizer(config.model))
            function = await stack.enter_async_context(open_rollout(rollout, setup))
            context = await stack.enter_async_context(_open_policy(config, self.facts, sampler))
            sinks = open_sinks(config.trackers, folder.root, config)
            stack.callback(sinks.close)
            rollouts = _rollout_log(config, folder)
            stack.callback(rollouts.close)
            engine = self._engine(stack, function, rows, sampler, trainer, context, sinks, rollouts)
            evaluator = make_evaluator(config, self.facts, function, context, rollouts.write_evaluated)
            evaluations = await stack.enter_async_context(
                beside(engine, measure, evaluator, config=config, sinks=sinks, live=self.live)
            )
            await self._check_ends_agree(engine, trainer)
            before = await self._evaluate(evaluations.before)
            wall_s = await self._train(engine, trainer, evaluations)
            after = await self._evaluate_after(evaluations)
        return TrainResult(
            run_dir=folder.root,
            steps=engine.step,
            rollouts=engine.scheduler.finished_rollouts,
            wall_s=wall_s,
            worst_staleness=engine.worst_staleness,
            ledger=engine.ledger.summary(),
            interrupted=self.interrupt.requested,
            before=before.result if before is not None else None,
            after=after.result if after is not None else None,
            evaluations=tuple(evaluations.done),
            best=evaluations.best,
            evaluations_missed=evaluations.skipped + evaluations.given_up,
            ended_early=engine.scheduler.patience.lost,
            export_name=config.export_name,
        )

    async def _open_ends(self, stack: AsyncExitStack) -> tuple[Trainer, Sampler]:
        """The trainer first: a GPU that both share must show vLLM what is left."""
        from asyncrl.training.thread import ThreadedTrainer

        kind, reason = choose_sampler(self.config)
        self.live.note(f"sampler: {kind} ({reason})")
        published = self.folder.root / "weights"
        stack.callback(shutil.rmtree, published, ignore_errors=True)  # what is worth keeping is in model/
        trainer = await stack.enter_async_context(
            ThreadedTrainer(
                self.config,
                total_steps=self.total_steps,
                weights_format="files" if kind == "vllm" else "tensors",
                publish_folder=published,
                torch_threads=torch_threads(self.config),
            )
        )
        return trainer, await stack.enter_async_context(open_sampler(self.config, self.facts, self.folder.root))

    def _engine(
        self,
        stack: AsyncExitStack,
        function: Any,
        rows: Rows,
        sampler: Sampler,
        trainer: Trainer,
        context: PolicyContext,
        sinks: SinkList,
        rollouts: RolloutLog,
    ) -> Engine:
        config = self.config
        bounds = Bounds.of(config, len(rows))
        ledger_store = LedgerStore.open(self.folder.root / "ledger.db", resumed_at=None, bounds=bounds)
        stack.callback(ledger_store.close)

        def on_step(record: Record, batch: Batch) -> None:
            record |= as_metrics(context.totals)
            context.totals.clear()
            self.records.append(record)
            sinks.write(record)
            rollouts.write(int(record["step"]), batch.trained)
            self.live.step(record)

        return assemble(
            config,
            function,
            rows,
            sampler=sampler,
            trainer=trainer,
            make_policy=policies(context),
            on_step=on_step,
            contract=Contract(self.facts.vocabulary, self.facts.max_seq_len),
            canary_tolerance=canary_tolerance(config),
            ledger_store=ledger_store,
        )

    async def _check_ends_agree(self, engine: Engine, trainer: Trainer) -> None:
        """The canary of version 0: do sampler and trainer hold the same model at all?

        A warm start is version 0 too: until it is loaded, the sampler holds the bare base model.
        """
        if self.config.lora.warm_start is not None:
            await engine.publication.hot_load(await trainer.save_weights_for_sampler())
        tokens = tuple((7 * i + 3) % self.facts.vocabulary for i in range(PROBE_TOKENS))
        logprobs = (await trainer.forward([tokens]))[0]
        await engine.publication.check_canary(Probe(tokens, tuple(logprobs)), 0)

    async def _evaluate(self, measure: Callable[[], Awaitable[Evaluated | None]]) -> Evaluated | None:
        return None if self.interrupt.requested else await measure()

    async def _evaluate_after(self, evaluations: Evaluations) -> Evaluated | None:
        """A Ctrl-C here gives up the evaluation alone: what was trained is saved, and has its summary."""
        task = asyncio.current_task()
        assert task is not None
        try:
            return await self._evaluate(evaluations.after)
        except asyncio.CancelledError:
            if not (self.interrupt.requested and task is self.interrupt.task):
                raise
            task.uncancel()
            return None

    async def _train(self, engine: Engine, trainer: Trainer, evaluations: Evaluations) -> float:
        """Run the engine; whatever ends it, what was trained is saved. Returns the seconds it took."""
        began = time.monotonic()

        def stop() -> None:
            evaluations.cancel()
            engine.stop()

        self.interrupt.stop = stop
        if self.interrupt.requested:
            stop()
        try:
            with calm_collector():
                await engine.run()
        finally:
            evaluations.training_is_over()
            try:
                await self._save(engine, trainer, failed=sys.exc_info()[0] is not None)
            finally:
                self.interrupt.stop = None
                engine.ledger.close()
        return time.monotonic() - began

    async def _save(self, engine: Engine, trainer: Trainer, *, failed: bool) -> None:
        """The model of the last step. A run that fails before its first one has none that anybody would want."""
        if (failed and not engine.step) or not self.config.save_model:
            return
        await trainer.save_model(self.folder.model)
        if failed:
            self.live.note(f"the run failed; the model of step {engine.step} is in {self.folder.model}")

    def conclude(self, result: TrainResult) -> None:
        """Write the summary, and say how it went and where the time went."""
        self.folder.write_summary(result.summary())
        if self.records:
            self.live.note(where_time_went(self.records))
        for remark in (result.why_nothing_was_trained(), result.what_was_better()):
            if remark:
                self.live.note(remark)
        self.live.note(result.last_words(saved=self.config.save_model))

    def conclude_failure(self, error: AsyncRLError) -> None:
        """Leave a summary of a run that failed after it had trained something."""
        if self.records:
            with suppress(OSError):  # a full disk is reported already
                self.folder.write_summary(
                    {"steps": self.records[-1]["step"], "error": f"{type(error).__name__}: {error}"}
                )


# Parts


@asynccontextmanager
async def _open_policy(config: Config, facts: ModelFacts, sampler: Sampler) -> AsyncIterator[PolicyContext]:
    """What the rollouts of a run share, their endpoint open as long as the block."""
    sampling = config.sampling
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=facts.stop_token_ids,
    )
    async with Endpoint(config.endpoint) as endpoint:
        yield PolicyContext(
            sampler,
            params=params,
            max_seq_len=facts.max_seq_len,
            load_tokenizer=lambda: load_tokenizer(config.model),
            chat=config.chat,
            endpoint=endpoint,
            seed=config.seed if config.deterministic else None,
        )


def _rollout_log(config: Config, folder: RunFolder) -> RolloutLog:
    loaded: list[Any] = []

    def decode(tokens: list[int]) -> str:
        if not loaded:
            loaded.append(load_tokenizer(config.model))  # its own: tokenizers are not for two threads at once
        return str(loaded[0].decode(tokens))

    return RolloutLog(folder.rollouts, decode, config.log_rollouts)


@contextmanager
def _full_disk_named(root: Path) -> Iterator[None]:
    """Say which folder cannot be written. The user's own `OSError`s have become `RolloutFailed` before."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise EngineError(
            f"the run folder {root} cannot be written: {error.strerror}. Make room, or set run_dir to another disk; "
            "what the folder holds up to here can be used."
        ) from error


def _silence_progress_bars() -> None:
    """Those of `transformers` would write through the live view."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _dataset_of(config: Config, dataset: str | Path | Rows | None) -> str | Path | Rows:
    chosen = dataset if dataset is not None else config.dataset
    if chosen is None:
        raise ConfigError("no dataset was given. Pass dataset=..., or set `dataset` in the config.")
    return chosen
