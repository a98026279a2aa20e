"""One training run, from an open run folder to its summary."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncrl
from asyncrl.agents.policy import PolicyContext
from asyncrl.agents.transcript import as_metrics
from asyncrl.assemble import assemble
from asyncrl.checkpointing import Checkpointer, load_state
from asyncrl.collector import calm_collector
from asyncrl.config import Config
from asyncrl.data import Rows
from asyncrl.ends import canary_tolerance, choose_sampler, open_policy, open_sampler, torch_threads
from asyncrl.engine import Engine
from asyncrl.errors import AsyncRLError, EngineError, StepFailed
from asyncrl.interrupt import Interrupt
from asyncrl.lives import Life
from asyncrl.measure import beside, make_evaluator, policies
from asyncrl.metrics.bottleneck import where_time_went
from asyncrl.metrics.live import LiveView
from asyncrl.metrics.producer import Producer
from asyncrl.metrics.report import Account
from asyncrl.metrics.sinks import SinkList, open_sinks
from asyncrl.model_facts import ModelFacts, load_tokenizer
from asyncrl.result import TrainResult
from asyncrl.rollout.batch import Batch
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.evaluations import Evaluated, EvaluationFn, Evaluations
from asyncrl.rollout.factory import RolloutSetup, open_rollout
from asyncrl.run_state import restore
from asyncrl.step_record import Record
from asyncrl.storage.checkpoints import Checkpoints, resolve
from asyncrl.storage.rollouts import RolloutLog
from asyncrl.storage.samples import SampleRecorder
from asyncrl.storage.timeline import Timeline
from asyncrl.types import Probe, Sampler, Trainer
from asyncrl.watchdog import Watchdog

PROBE_TOKENS = 16
LOAD_LIMIT_S = 4 * 3600.0
"""For a model of any size, from the hub, over a slow line."""


@dataclass(slots=True)
class TrainingRun:
    """Owns what is open while a run goes on."""

    config: Config
    facts: ModelFacts
    life: Life
    live: LiveView
    interrupt: Interrupt
    watchdog: Watchdog
    make_trainer: Callable[..., Any]
    """`ThreadedTrainer`: the torch side is run.py's to see."""
    total_steps: int
    account: Account = field(default_factory=Account)
    recorder: SampleRecorder | None = None
    producer: Producer | None = None

    async def run(self, rollout: Callable[..., Any], rows: Rows, measure: EvaluationFn | None) -> TrainResult:
        config, folder = self.config, self.life.folder
        async with self._open() as stack:
            trainer, sampler = await self._open_ends(stack)
            with self.watchdog.phase("loading the checkpoint"):
                await self._load(trainer, sampler)
            setup = RolloutSetup(config, folder.root, lambda: load_tokenizer(config.model))
            with self.watchdog.phase("opening the rollout function"):
                function = await stack.enter_async_context(open_rollout(rollout, setup))
            context = await stack.enter_async_context(open_policy(config, self.facts, sampler))
            sinks = open_sinks(config.trackers, folder.root, config, self.life.step if self.life.number else None)
            stack.push_async_callback(asyncio.to_thread, sinks.close)
            rollouts = self._rollout_log()
            stack.callback(rollouts.close)
            engine = self._engine(stack, function, rows, sampler, trainer, context, sinks, rollouts)
            evaluator = make_evaluator(config, self.facts, function, context, rollouts.write_evaluated, engine.timeline)
            evaluations = await stack.enter_async_context(
                beside(engine, measure, evaluator, config=config, sinks=sinks, live=self.live)
            )
            engine.checkpoints = self._checkpointer(engine, trainer, evaluations)
            with self.watchdog.phase("bringing the sampler to the trainer's weights"):
                await self._bring_in_step(engine, trainer)
            before = await self._before(engine, evaluations)
            self._open_producer(engine, sinks)
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
            resumed_from=self.life.step if self.life.number else None,
            checkpoint=engine.checkpoints.last.folder if engine.checkpoints.last is not None else None,
        )

    # What is opened

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[AsyncExitStack]:
        """An exit stack; that it closes has a name and a limit too."""
        stack = AsyncExitStack()
        try:
            yield stack
        except BaseException:
            with self.watchdog.phase("closing what the run had open"):
                if not await stack.__aexit__(*sys.exc_info()):
                    raise
        else:
            with self.watchdog.phase("closing what the run had open"):
                await stack.aclose()

    async def _open_ends(self, stack: AsyncExitStack) -> tuple[Trainer, Sampler]:
        """The trainer first: a GPU that both share must show vLLM what is left."""
        kind, reason = choose_sampler(self.config)
        root = self.life.folder.root
        starts = kind == "vllm" and not self.config.sampler.urls
        self.live.note(f"sampler: {kind} ({reason})" + (f"; its log: {root / 'logs' / 'vllm-0.log'}" if starts else ""))
        published = root / "weights"
        shutil.rmtree(published, ignore_errors=True)  # of a life that was killed
        stack.callback(shutil.rmtree, published, ignore_errors=True)  # what is worth keeping is in model/
        with self.watchdog.phase("loading the model", limit_s=LOAD_LIMIT_S):
            trainer = await stack.enter_async_context(
                self.make_trainer(
                    self.config,
                    total_steps=self.total_steps,
                    weights_format="files" if kind == "vllm" else "tensors",
                    publish_folder=published,
                    torch_threads=torch_threads(self.config),
                )
            )
        with self.watchdog.phase("opening the sampler", limit_s=LOAD_LIMIT_S):
            return trainer, await stack.enter_async_context(open_sampler(self.config, self.facts, root))

    @property
    def _bare(self) -> bool:
        """The run began with the bare model, which the sampler has."""
        return self.config.lora.warm_start is None and self.config.checkpoint.init_from is None

    @property
    def _keeps_first(self) -> bool:
        """The sampler keeps the weights that the run began with, and the trainer has left them behind."""
        return self.life.checkpoint is not None and not self.config.publish.weight_sync_interval

    async def _load(self, trainer: Trainer, sampler: Sampler) -> None:
        """Bring the trainer to where the run, or another one, had come."""
        resumed, first = self.life.checkpoint, self.config.checkpoint.init_from
        if resumed is None and self.life.number:
            self.live.note("there is no checkpoint yet: the run begins again from its start")
        # A KL refers to them all along, and so may the sampler.
        if first is not None and (resumed is None or self.config.kl_beta or self._keeps_first):
            source = resolve(first, self.life.folder.root.parent)
            await trainer.load_state(source.trainer)
            if resumed is None:
                self.live.note(f"weights: those of {source.folder}; the optimizer starts anew")
        if self._keeps_first and not self._bare:
            await sampler.publish(await trainer.save_weights_for_sampler())
        if resumed is not None:
            step = await trainer.load_state_with_optimizer(resumed.trainer)
            assert step == self.life.step, f"{resumed.folder} holds the weights of step {step}"

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
        config, folder = self.config, self.life.folder
        recorder = self.recorder = self._open_recorder(stack) if config.record_samples else None

        def on_step(record: Record, batch: Batch) -> None:
            record |= as_metrics(context.totals)
            context.totals.clear()
            self.account.add(record)
            sinks.write(record)
            rollouts.write(int(record["step"]), batch.trained)
            if recorder is not None:
                recorder.write(int(record["step"]), batch.chunks)
            self.live.step(record)

        def on_failed_step(batch: Batch, error: StepFailed) -> None:
            self.live.note(f"warning: {error}")
            folder.write_diagnosis(batch.step + 1, str(error), batch.groups)
            if recorder is not None:
                recorder.write(batch.step + 1, batch.chunks, failed=str(error))

        engine = assemble(
            config,
            function,
            rows,
            sampler=sampler,
            trainer=trainer,
            make_policy=policies(context),
            on_step=on_step,
            contract=Contract(self.facts.vocabulary, self.facts.max_seq_len),
            canary_tolerance=canary_tolerance(config),
            ledger_store=self.life.store,
            watchdog=self.watchdog,
            timeline=self._open_timeline(stack),
        )
        engine.on_failed_step = on_failed_step
        return engine

    def _checkpointer(self, engine: Engine, trainer: Trainer, evaluations: Evaluations) -> Checkpointer:
        config, life = self.config, self.life
        if config.checkpoint.interval == 0:
            self.live.note(
                "warning: checkpoint.interval is 0, so no checkpoint is written on the way: a run that is killed "
                "cannot be resumed."
            )
        return Checkpointer(
            folder=Checkpoints(life.folder.root),
            trainer=trainer,
            config=config.checkpoint,
            every_steps=max(1, config.publish.weight_sync_interval),
            flush=lambda: self._flush(engine),
            about=lambda: {
                "asyncrl": asyncrl.__version__,
                "model": config.model,
                "init_from": config.checkpoint.init_from,
                "data": life.data,
                "evaluations": evaluations.found(),
            },
            life=life.number,
            say=self.live.note,
            last=life.checkpoint,
            timeline=engine.timeline,
        )

    async def _flush(self, engine: Engine) -> None:
        """Bring to the disk what a checkpoint stands on."""
        await engine.ledger.flush()
        if self.recorder is not None:
            with suppress(EngineError):  # the next step tells it; a checkpoint without samples is better than none
                await self.recorder.flush()

    def _open_timeline(self, stack: AsyncExitStack) -> Timeline:
        folder = self.life.folder.timeline if self.config.record_timeline else None
        timeline = Timeline(folder, self.life.number)
        stack.callback(timeline.close)
        return timeline

    def _open_producer(self, engine: Engine, sinks: SinkList) -> None:
        assert engine.timeline is not None
        self.producer = Producer(
            groups=self.config.prompt_groups_per_step,
            counts=engine.scheduler.counts,
            gauges=engine.account.gauges,
            elapsed_s=engine.elapsed_s,
            write=sinks.produced,
        )
        engine.timeline.on_flush = self.producer.take

    def _open_recorder(self, stack: AsyncExitStack) -> SampleRecorder:
        """With what a replay makes the same trainer from."""
        settings = {
            "config": self.config.model_dump(mode="json"),
            "total_steps": self.total_steps,
            "torch_threads": torch_threads(self.config),
        }
        recorder = SampleRecorder(self.life.folder.samples, after_step=self.life.step, settings=settings)
        stack.callback(recorder.close)
        return recorder

    def _rollout_log(self) -> RolloutLog:
        loaded: list[Any] = []

        def decode(tokens: list[int]) -> str:
            if not loaded:
                loaded.append(load_tokenizer(self.config.model))  # its own: tokenizers are not for two threads at once
            return str(loaded[0].decode(tokens))

        return RolloutLog(self.life.folder.rollouts, decode, self.config.log_rollouts)

    # What is done

    async def _bring_in_step(self, engine: Engine, trainer: Trainer) -> None:
        """Sampler, trainer and loop stand at the same step; the canary looks whether both ends hold the same model."""
        life = self.life
        if life.checkpoint is None and self._bare:
            tokens = tuple((7 * i + 3) % self.facts.vocabulary for i in range(PROBE_TOKENS))
            logprobs = (await trainer.forward([tokens]))[0]
            await engine.publication.check_canary(Probe(tokens, tuple(logprobs)), version=0)
        elif not self._keeps_first:
            await engine.publication.hot_load(await trainer.save_weights_for_sampler())
        if life.checkpoint is not None:
            state = await asyncio.to_thread(load_state, life.checkpoint)
            restore(engine, state)
            waiting = f", with {len(state.groups)} finished groups" if state.groups else ""
            self.live.note(f"resumed at step {state.step}{waiting}")

    async def _before(self, engine: Engine, evaluations: Evaluations) -> Evaluated | None:
        """The evaluation of the model that the run started from: this life's, or that of an earlier one."""
        if self.life.checkpoint is None:
            return await self._evaluate(evaluations, evaluations.before)
        evaluations.go_on(self.life.checkpoint.state()["evaluations"])
        return next((evaluated for evaluated in evaluations.done if evaluated.version == 0), None)

    async def _evaluate(
        self, evaluations: Evaluations, measure: Callable[[], Awaitable[Evaluated | None]]
    ) -> Evaluated | None:
        if self.interrupt.requested:
            return None
        with self.watchdog.phase("evaluation", marks=evaluations.marks):
            return await measure()

    async def _evaluate_after(self, evaluations: Evaluations) -> Evaluated | None:
        """A Ctrl-C here gives up the evaluation alone: what was trained is saved, and has its summary."""
        task = asyncio.current_task()
        assert task is not None
        try:
            return await self._evaluate(evaluations, evaluations.after)
        except asyncio.CancelledError:
            if not (self.interrupt.requested and task is self.interrupt.task):
                raise
            task.uncancel()
            return None

    async def _train(self, engine: Engine, trainer: Trainer, evaluations: Evaluations) -> float:
        """Run the engine; whatever ends it, what was trained is kept. Returns the seconds it took."""
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
            failed = sys.exc_info()[0] is not None
            evaluations.training_is_over()
            try:
                self._end_producer(engine)  # to the disk, which may be full
            finally:
                try:
                    await self._keep(engine, trainer, failed=failed)
                finally:
                    self.interrupt.stop = None
                    engine.ledger.close()
        return time.monotonic() - began

    def _end_producer(self, engine: Engine) -> None:
        if engine.timeline is not None and self.producer is not None:
            engine.timeline.flush()
            self.producer.close()

    async def _keep(self, engine: Engine, trainer: Trainer, *, failed: bool) -> None:
        """Checkpoint and model of the last step. A run that fails before its first one has none that anybody wants."""
        if failed and not engine.step:
            return
        first: AsyncRLError | OSError | None = None
        for what, keep in (("checkpoint", self._keep_checkpoint), ("model", self._keep_model)):
            try:
                with self.watchdog.phase(f"saving the {what}"):
                    await keep(engine, trainer, failed)
            except (AsyncRLError, OSError) as error:
                if failed or first is not None:  # beside the first cause
                    self.live.note(f"the {what} of step {engine.step} could not be saved: {error}")
                else:
                    first = error
        if first is not None:
            raise first

    async def _keep_checkpoint(self, engine: Engine, trainer: Trainer, failed: bool) -> None:
        checkpoints = engine.checkpoints
        assert checkpoints is not None
        if self.config.checkpoint.final and engine.step:
            await checkpoints.finish(engine.capture(), "failure" if failed else "final")
        else:
            await checkpoints.written()
        if failed and checkpoints.last is not None:
            self.live.note(f"the run failed; it can be resumed from {checkpoints.last.folder}")

    async def _keep_model(self, engine: Engine, trainer: Trainer, failed: bool) -> None:
        if self.config.save_model:
            await trainer.save_model(self.life.folder.model)
            if failed:
                self.live.note(f"the model of step {engine.step} is in {self.life.folder.model}")

    # How it ended

    def conclude(self, result: TrainResult) -> None:
        """Write the summary, and say how it went and where the time went."""
        self.live.catch_up()
        by_command = self.config.rollout_fn is not None and self.config.dataset is not None
        self.life.folder.write_summary(result.summary())
        if self.account.steps:
            self.live.note(where_time_went(self.account))
        for remark in (
            result.why_nothing_was_trained(),
            result.why_no_more(self.config.max_steps),
            result.what_was_better(),
            result.how_to_go_on(by_command=by_command),
        ):
            if remark:
                self.live.note(remark)
        self.live.note(result.last_words(saved=self.config.save_model))

    def conclude_failure(self, error: AsyncRLError) -> None:
        """Leave a summary of a run that failed after it had trained something."""
        if self.account.steps:
            with suppress(OSError):  # a full disk is reported already
                self.life.folder.write_summary(
                    {"steps": self.life.step + self.account.steps, "error": f"{type(error).__name__}: {error}"}
                )
