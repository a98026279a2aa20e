"""The loop behind `sft_loop`, `dpo_loop` and `orpo_loop`, and what it leaves behind: a run folder like every run's.

rows -> units, tokenised once -> measure held-out -> step, step, ... -> save -> measure held-out

A run that is resumed takes the same way, and loads a checkpoint before its first step.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.checkpointing import Reason
from asyncrl.config import Config as EngineConfig
from asyncrl.data import Cursor, Rows, load_rows
from asyncrl.errors import AsyncRLError, ConfigError, StepFailed
from asyncrl.exits import CUT_SHORT
from asyncrl.interrupt import Interrupt, say, stop_on_signals
from asyncrl.lives import Resume
from asyncrl.metrics.sinks import open_sinks
from asyncrl.model_facts import load_tokenizer, read_facts
from asyncrl.recipes.checkpoints import wanted
from asyncrl.recipes.dataset import Encode, Encoding, Units, batches, encode_rows, steps_of
from asyncrl.recipes.examples import Encoder
from asyncrl.recipes.saving import Saver
from asyncrl.recipes.settings import SupervisedConfig
from asyncrl.recipes.start import Start, open_run
from asyncrl.recipes.view import Mode, RunView
from asyncrl.storage.checkpoints import Checkpoints
from asyncrl.storage.folder import full_disk_named
from asyncrl.storage.log import open_log
from asyncrl.streams import streams_that_last

if TYPE_CHECKING:
    from asyncrl.recipes.learner import Learner, Objective


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended."""

    run_dir: Path
    steps: int
    """Optimizer steps taken."""
    data: Mapping[str, int]
    """What became of the rows: `rows` read, `units` trained, `skipped`, `truncated`, `empty`."""
    wall_s: float
    """Training alone: without loading, tokenising and measuring."""
    interrupted: bool
    """A signal ended the run before its time."""
    before: Mapping[str, float] | None
    """`loss` (and metrics of pairs) on the held-out rows before training; None without held-out rows."""
    after: Mapping[str, float] | None
    """... and after it."""
    export_name: str = "model"

    @property
    def model_dir(self) -> Path:
        """The trained model or adapter, as `transformers`, `peft` and vLLM open it."""
        return self.run_dir / self.export_name

    def summary(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "steps": self.steps,
            "data": dict(self.data),
            "wall_s": round(self.wall_s, 3),
            "interrupted": self.interrupted,
            "held_out_before": None if self.before is None else dict(self.before),
            "held_out_after": None if self.after is None else dict(self.after),
        }


@dataclass(frozen=True, slots=True)
class Recipe:
    """What tells the three recipes apart."""

    name: str
    encode: Callable[[Encoder], Encode]
    objective: Callable[[], Objective]
    """Made late: it needs torch."""
    pairs: bool


def run(
    recipe: Recipe,
    config: SupervisedConfig,
    rows: Rows | None,
    evaluation_rows: Rows | None,
    *,
    view: Mode = "auto",
    title: str | None = None,
    resume: Resume | None = None,
) -> Result:
    """Train from rows. Blocks until the run has ended.

    Raises:
        UserError: a setting, a row, a checkpoint, the model or its chat template cannot be used.
        EngineError: the run could not go on.
        KeyboardInterrupt: after a Ctrl-C, once what was trained has been saved.
        SystemExit: after another signal that asks for an end, likewise; `exits.py` has the codes.
    """
    engine = config.engine_config()
    stop = Interrupt()
    data, held_out = _open_rows(config, rows, evaluation_rows)
    facts = read_facts(engine.model, engine.max_seq_len)
    with (
        streams_that_last(),
        open_run(recipe.name, config, engine, data, wanted(resume, engine.run_dir)) as start,
        open_log(start.folder.log),
        RunView(title or recipe.name, view) as shown,
    ):
        shown.note(f"run folder: {start.folder.root}")
        encoder = Encoder(load_tokenizer(engine.model))
        encoding = Encoding(recipe.encode(encoder), recipe.pairs, facts.max_seq_len, config.on_too_long)
        units = _encode(data, encoding, config.max_rows, shown, "dataset")
        held_out_units = None if held_out is None else _encode(held_out, encoding, None, shown, "held-out dataset")
        work = _Run(recipe, config, engine, start, shown, units, held_out_units)
        with stop_on_signals(stop), _bounded(stop, engine.stop_timeout_s):
            try:
                with full_disk_named(start.folder.root):
                    result = work.run(stop)
            except AsyncRLError as error:
                work.conclude_failure(error)
                raise
    stop.raise_if_requested()
    return result


@contextmanager
def _bounded(stop: Interrupt, limit_s: float) -> Iterator[None]:
    """End the process where a stop that was asked for does not come to its end: a step or a disk that hangs."""

    def end() -> None:
        say(f"the stop has not come to its end within stop_timeout_s={limit_s:g} s")
        os._exit(CUT_SHORT)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    stop.stop = timer.start
    try:
        yield
    finally:
        timer.cancel()


def _open_rows(config: SupervisedConfig, rows: Rows | None, held_out: Rows | None) -> tuple[Rows, Rows | None]:
    if rows is None and config.dataset is None:
        raise ConfigError("there is no data. Set `dataset` to a JSONL file, or pass rows= to main.")
    chosen = config.evaluation_dataset if held_out is None else held_out
    train = rows if rows is not None else config.dataset
    assert train is not None
    return load_rows(train), None if chosen is None else load_rows(chosen)


def _encode(rows: Rows, encoding: Encoding, max_rows: int | None, shown: RunView, name: str) -> Units:
    count = min(len(rows), max_rows or len(rows))
    units = encode_rows(rows, encoding, count, lambda places: shown.watch(f"tokenising the {name}", places), name)
    if lost := units.lost():
        shown.note(f"{name}: {lost}")
    return units


@dataclass(slots=True)
class _Run:
    """One life of a run from tokenised rows to its summary."""

    recipe: Recipe
    config: SupervisedConfig
    engine: EngineConfig
    start: Start
    shown: RunView
    units: Units
    held_out: Units | None
    step: int = field(init=False)
    """Optimizer steps taken, those of earlier lives too."""
    cursor: Cursor = field(init=False)
    """Where the data stand after them."""
    elapsed_s: float = field(init=False)
    before: Mapping[str, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.step, self.cursor, self.elapsed_s = self.start.step, self.start.cursor, self.start.state["elapsed_s"]

    def run(self, stop: Interrupt) -> Result:
        from asyncrl.recipes.learner import Learner

        config, folder = self.config, self.start.folder
        total = self.step + steps_of(len(self.units.units), config.batch_size, config.epochs, self.cursor)
        total = min(total, config.max_steps or total)
        self._say_what_is_ahead(total)
        objective = self.recipe.objective()
        learner = Learner(self.engine, objective, total)
        self.before = self._begin(learner, stop, again=objective.reference)
        self._train(learner, total, stop)
        interrupted = stop.requested  # from here on a signal gives up the measurement alone
        after = None if interrupted else self._measure(learner, stop, "after training")
        result = Result(
            run_dir=folder.root,
            steps=self.step,
            data=self.units.counts(),
            wall_s=self.elapsed_s,
            interrupted=interrupted or stop.requested,
            before=self.before,
            after=after,
            export_name=folder.export_name,
        )
        folder.write_summary(result.summary())
        end = "stopped cleanly" if result.interrupted else "finished"
        model = f"model: {result.model_dir}" if self.engine.save_model else "the model was not saved"
        self.shown.note(f"{end} after {self.step} steps in {self.elapsed_s:.0f} s; {model}")
        if result.interrupted and Checkpoints(folder.root).all():
            self.shown.note(f"go on with it: asyncrl resume {folder.root} (from Python: main with the same log_path)")
        return result

    def _say_what_is_ahead(self, total: int) -> None:
        start = self.start
        if self.engine.checkpoint.interval == 0:
            self.shown.note("warning: dcp_save_interval is 0: a run that is killed cannot be resumed")
        if start.checkpoint is not None:
            ahead = f"steps {self.step + 1} to {total} are ahead" if self.step < total else "nothing is left to train"
            self.shown.note(f"resumed from {start.checkpoint.folder.name}: {ahead}")

    def _begin(self, learner: Learner, stop: Interrupt, *, again: bool) -> Mapping[str, float] | None:
        """Bring the learner to where this life begins; returns what the very beginning measured.

        `again`: what the beginning says of the held-out rows is needed once more, since it is the reference.
        """
        start, before = self.start, self.start.state["before"]
        if start.checkpoint is None or again:
            if (weights := start.first_weights()) is not None:
                learner.start_from(weights.trainer)
            before = self._measure(learner, stop, "before training")
        if start.checkpoint is not None:
            learner.load_state(start.checkpoint.trainer)
        return before  # type: ignore[no-any-return]

    def _train(self, learner: Learner, total: int, stop: Interrupt) -> None:
        """Step by step; whatever ends it, what was trained is saved. Before the first step nobody would want it."""
        folder, resumed_step = self.start.folder, self.start.step if self.start.life else None
        saver = Saver(
            Checkpoints(folder.root),
            self.engine.checkpoint,
            learner.save_state,
            self.start.life,
            self.shown.note,
            last_step=resumed_step,
        )
        with closing(open_sinks(self.engine.trackers, folder.root, self.engine, resumed_step)) as sinks:
            try:
                for record in self.shown.steps(total, self._records(learner, total, stop)):
                    sinks.write(record)
                    saver.stepped(self.step, self._state)
            except BaseException:
                self._save_after_failure(learner, saver)
                raise
            if self.step or stop.requested:
                self._save(learner, saver, "final")

    def _save(self, learner: Learner, saver: Saver, reason: Reason) -> None:
        try:
            saver.finish(self.step, self._state, reason)
        finally:  # a disk that is too slow for the checkpoint may be good enough for the model
            if self.engine.save_model:
                learner.save(self.start.folder.model)

    def _save_after_failure(self, learner: Learner, saver: Saver) -> None:
        """What can be saved still. That it cannot is said, and is not what the run ends with."""
        if not self.step:
            return
        try:
            self._save(learner, saver, "failure")
        except (AsyncRLError, OSError) as error:
            self.shown.note(f"warning: not all could be saved after the failure: {error}")

    def _records(self, learner: Learner, total: int, stop: Interrupt) -> Iterator[Mapping[str, float]]:
        config, began, failed = self.config, time.monotonic() - self.elapsed_s, 0
        work = batches(
            self.units.units,
            batch_size=config.batch_size,
            epochs=config.epochs,
            shuffle=config.shuffle,
            seed=config.seed,
            start=self.cursor,
        )
        for cursor, batch in work:
            if stop.requested or self.step >= total:
                return
            started = time.monotonic()
            try:
                metrics = learner.step(batch)
            except StepFailed as error:
                failed += 1
                if failed > self.engine.trainer.skip_steps:
                    raise
                self.shown.note(f"warning: a batch was left out: {error}")
                continue
            now, failed = time.monotonic(), 0
            self.step, self.cursor, self.elapsed_s = self.step + 1, cursor, now - began
            times = {"time_s": self.elapsed_s, "step_s": now - started}
            yield {"step": self.step, "epoch": cursor.epoch, **times, "units": len(batch), **metrics}

    def _state(self) -> dict[str, Any]:
        """What the next life must know. The order of the data follows from the seed."""
        return {
            "recipe": self.recipe.name,
            "data": dict(self.start.data),
            "cursor": [self.cursor.epoch, self.cursor.position],
            "elapsed_s": self.elapsed_s,
            "before": self.before,
            "init_from": self.start.state["init_from"],
        }

    def _measure(self, learner: Learner, stop: Interrupt, when: str) -> Mapping[str, float] | None:
        if self.held_out is None:
            return None
        found = learner.measure(self.held_out.units, lambda: stop.requested)
        if found is not None:
            told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            self.shown.note(f"held-out {when}: {told} ({len(self.held_out.units)} rows)")
        return found

    def conclude_failure(self, error: AsyncRLError) -> None:
        """Leave a summary of a run that failed after it had trained something."""
        if self.step:
            with suppress(OSError):  # a full disk is reported already
                self.start.folder.write_summary({"steps": self.step, "error": f"{type(error).__name__}: {error}"})
