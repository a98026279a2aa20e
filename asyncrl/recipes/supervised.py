"""The loop behind `sft_loop`, `dpo_loop` and `orpo_loop`, and what it leaves behind: a run folder like every run's.

rows -> units, tokenised once -> measure held-out -> step, step, ... -> save -> measure held-out
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.config import Config as EngineConfig
from asyncrl.data import Rows, load_rows
from asyncrl.errors import AsyncRLError, ConfigError
from asyncrl.metrics.sinks import open_sinks
from asyncrl.model_facts import load_tokenizer, read_facts
from asyncrl.recipes.dataset import Encode, Encoding, Units, batches, encode_rows, steps_of
from asyncrl.recipes.examples import Encoder
from asyncrl.recipes.mapping import in_these_words
from asyncrl.recipes.settings import SupervisedConfig
from asyncrl.recipes.stop import StopWish, stop_on_signals
from asyncrl.recipes.view import Mode, RunView
from asyncrl.storage.folder import RunFolder
from asyncrl.storage.log import open_log

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
) -> Result:
    """Train from rows. Blocks until the run has ended.

    Raises:
        UserError: a setting, a row, the model or its chat template cannot be used.
        EngineError: the run could not go on.
        KeyboardInterrupt: after a Ctrl-C, once what was trained has been saved.
    """
    engine = config.engine_config()
    data, held_out = _open_rows(config, rows, evaluation_rows)
    facts = read_facts(engine.model, engine.max_seq_len)
    folder = _open_folder(engine, config)
    with open_log(folder.log), RunView(title or recipe.name, view) as shown:
        shown.note(f"run folder: {folder.root}")
        encoder = Encoder(load_tokenizer(engine.model))
        encoding = Encoding(recipe.encode(encoder), recipe.pairs, facts.max_seq_len, config.on_too_long)
        units = _encode(data, encoding, config.max_rows, shown, "dataset")
        held_out_units = None if held_out is None else _encode(held_out, encoding, None, shown, "held-out dataset")
        work = _Run(recipe, config, engine, folder, shown, units, held_out_units)
        with stop_on_signals() as stop:
            try:
                result = work.run(stop)
            except AsyncRLError as error:
                work.conclude_failure(error)
                raise
    if result.interrupted:
        raise KeyboardInterrupt
    return result


def _open_folder(engine: EngineConfig, config: SupervisedConfig) -> RunFolder:
    try:
        return RunFolder.create(engine, config)
    except ConfigError as error:
        raise ConfigError(in_these_words(str(error), config.fields())) from None


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
    """One run from tokenised rows to its summary."""

    recipe: Recipe
    config: SupervisedConfig
    engine: EngineConfig
    folder: RunFolder
    shown: RunView
    units: Units
    held_out: Units | None
    step: int = field(default=0, init=False)

    def run(self, stop: StopWish) -> Result:
        from asyncrl.recipes.learner import Learner

        config = self.config
        total = steps_of(len(self.units.units), config.batch_size, config.epochs, config.max_steps)
        learner = Learner(self.engine, self.recipe.objective(), total)
        before = self._measure(learner, stop, "before training")
        began = time.monotonic()
        self._train(learner, total, stop)
        wall_s = time.monotonic() - began
        interrupted = stop.said  # from here on a signal gives up the measurement alone
        after = None if interrupted else self._measure(learner, stop, "after training")
        result = Result(
            run_dir=self.folder.root,
            steps=self.step,
            data=self.units.counts(),
            wall_s=wall_s,
            interrupted=interrupted or stop.said,
            before=before,
            after=after,
            export_name=self.folder.export_name,
        )
        self.folder.write_summary(result.summary())
        end = "stopped cleanly" if result.interrupted else "finished"
        self.shown.note(f"{end} after {self.step} steps in {wall_s:.0f} s; model: {result.model_dir}")
        return result

    def _train(self, learner: Learner, total: int, stop: StopWish) -> None:
        """Step by step; whatever ends it, what was trained is saved. Before the first step nobody would want it."""
        sinks = open_sinks(self.engine.trackers, self.folder.root, self.engine)
        try:
            for record in self.shown.steps(total, self._records(learner, total, stop)):
                self.step = int(record["step"])
                sinks.write(record)
        finally:
            sinks.close()
            if self.step or stop.said:
                learner.save(self.folder.model)

    def _records(self, learner: Learner, total: int, stop: StopWish) -> Iterator[Mapping[str, float]]:
        config, began = self.config, time.monotonic()
        work = batches(
            self.units.units,
            batch_size=config.batch_size,
            epochs=config.epochs,
            shuffle=config.shuffle,
            seed=config.seed,
        )
        for step, (epoch, batch) in zip(range(1, total + 1), work, strict=False):
            if stop():
                return
            started = time.monotonic()
            metrics = learner.step(batch)
            now = time.monotonic()
            times = {"time_s": now - began, "step_s": now - started}
            yield {"step": step, "epoch": epoch, **times, "units": len(batch), **metrics}

    def _measure(self, learner: Learner, stop: StopWish, when: str) -> Mapping[str, float] | None:
        if self.held_out is None:
            return None
        found = learner.measure(self.held_out.units, stop)
        if found is not None:
            told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            self.shown.note(f"held-out {when}: {told} ({len(self.held_out.units)} rows)")
        return found

    def conclude_failure(self, error: AsyncRLError) -> None:
        """Leave a summary of a run that failed after it had trained something."""
        if self.step:
            with suppress(OSError):  # a full disk is reported already
                self.folder.write_summary({"steps": self.step, "error": f"{type(error).__name__}: {error}"})
