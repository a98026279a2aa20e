"""Train again from the recorded samples of a run, without a sampler, to the same weights.

    result = replay("runs/20261121-090000-ab12", stop=11)
    result.trainer        a `TorchTrainer` as it stood after step 11: look into it, give it the next step
    result.differences()  what is not as it was; empty: the weights are those of the run, bit by bit

On one machine a CPU gives the same bits. A GPU does as far as its kernels do; another machine need not.
"""

from __future__ import annotations

import filecmp
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from asyncrl.assemble import engine_settings
from asyncrl.config import Config
from asyncrl.errors import ConfigError, DataError
from asyncrl.rollout.batch import Batch
from asyncrl.storage.checkpoints import Checkpoint, Checkpoints, resolve
from asyncrl.storage.folder import RunFolder, existing_run
from asyncrl.storage.samples import Record, Recording, read_samples
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import StepResult

COMPARED = ("loss", "grad_norm")
"""Metrics of a step in which any difference of weights or samples shows."""


@dataclass(frozen=True, slots=True)
class ReplayedStep:
    """One optimizer step, taken again."""

    step: int
    metrics: Mapping[str, float]
    recorded: Mapping[str, float]
    """What metrics.jsonl says of it. Empty: nothing."""

    def differences(self) -> list[str]:
        """Which of `COMPARED` are not what they were, in words."""
        return [
            f"{name} {self.metrics[name]!r} was {self.recorded[name]!r}"
            for name in COMPARED
            if name in self.recorded and self.recorded[name] != self.metrics[name]
        ]


@dataclass(frozen=True, slots=True)
class WeightsCheck:
    """The weights that came out, against ones that the run kept."""

    kept: Path
    """A checkpoint, or the exported model."""
    step: int
    differing: Sequence[str]
    """Names of weights and optimizer states, or of the model's files, that have another bit."""


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay came to."""

    trainer: TorchTrainer
    """As it stands after the last step."""
    config: Config
    steps: Sequence[ReplayedStep]
    checks: Sequence[WeightsCheck]
    """One for each checkpoint of a replayed step, and for the exported model where it is of the last one."""
    seconds: float

    def differences(self) -> list[str]:
        """All that is not as it was, the first step that differs first."""
        steps = [f"step {step.step}: {', '.join(found)}" for step in self.steps if (found := step.differences())]
        weights = [f"{check.kept}: {_some(check.differing)} differ" for check in self.checks if check.differing]
        return steps[:1] + weights


def replay(
    run: str | Path,
    *,
    start: str | None = None,
    stop: int | None = None,
    config: Config | None = None,
    on_step: Callable[[ReplayedStep], None] = lambda step: None,
) -> ReplayResult:
    """Take the optimizer steps of a run again, with the samples that they were given.

    Args:
        run: The run folder.
        start: A checkpoint of it to begin from, such as "step-000010". None: the start of the run.
        stop: The last step to take. None: the last one that is recorded.
        config: Other settings for the trainer, to see what they would have done. None: those of the run.
        on_step: Hears of each step as it is taken.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be used.
        ConfigError: `run` is no run folder, or `stop` is none of its steps.
        DataError: the samples are not there, or are damaged.
        EngineError: a step could not be taken.
    """
    began = time.monotonic()
    root = Path(run)
    checkpoint = Checkpoints(root).named(start) if start is not None else None
    records = steps_between(root, checkpoint.step if checkpoint is not None else 0, stop)
    recorded = _metrics(root)
    kept = {checkpoint.step: checkpoint for checkpoint in Checkpoints(root).all() if checkpoint.fault() is None}
    steps: list[ReplayedStep] = []
    checks: list[WeightsCheck] = []
    recording = records[0].recording
    with _threads(recording):
        trainer = _begin(recording, config, checkpoint, root)
        for record in records:
            if record.recording.settings != recording.settings:
                trainer = _move(trainer, record.recording, config, root)
            recording = record.recording
            result = take_step(trainer, record, config or config_of(recording))
            steps.append(ReplayedStep(record.step, result.metrics, recorded.get(record.step, {})))
            on_step(steps[-1])
            if record.step in kept:
                folder = kept[record.step].folder
                checks.append(WeightsCheck(folder, record.step, trainer.differences(folder / "trainer")))
        used = config or config_of(recording)
        checks += _check_export(trainer, RunFolder(root, used.export_name))
    return ReplayResult(trainer, used, steps, checks, time.monotonic() - began)


def take_step(trainer: TorchTrainer, record: Record, config: Config) -> StepResult:
    """One optimizer step on what was recorded of one, as the engine takes it.

    Raises:
        StepFailed: it cannot be taken, as the run may have found too (`record.failed`).
    """
    settings = engine_settings(config, None)
    batch = Batch(record.step - 1, settings.max_staleness, settings.on_stale, settings.hard_bound)
    for chunk in record.chunks():
        if sequences := batch.add(chunk):
            trainer.forward_backward(sequences)
    return trainer.optim_step()


def steps_between(root: Path, first: int, last: int | None) -> list[Record]:
    """The recorded steps after `first` up to `last` that were taken, without a gap.

    Raises: as `replay`.
    """
    taken = [record for record in read_samples(RunFolder(existing_run(root)).samples) if record.failed is None]
    newest = max((record.step for record in taken), default=0)
    last = newest if last is None else last
    if not first < last <= newest:
        raise ConfigError(
            f"there is nothing to replay after step {first} up to step {last}: of {root}, steps up to {newest} are "
            "recorded."
        )
    chosen = [record for record in taken if first < record.step <= last]
    if missing := set(range(first + 1, last + 1)) - {record.step for record in chosen}:
        raise DataError(
            f"of {root}, step {_some(sorted(missing))} is not recorded: record_samples was off, or the disk failed. "
            f"Start at a checkpoint of step {max(missing)} or later."
        )
    return chosen


def config_of(recording: Recording) -> Config:
    """The settings of a life of the run."""
    return Config(**recording.settings["config"])


def _begin(recording: Recording, config: Config | None, checkpoint: Checkpoint | None, root: Path) -> TorchTrainer:
    """The trainer as it stood before the first step."""
    trainer = _make(recording, config, root, resumed=checkpoint is not None)
    if checkpoint is not None:
        trainer.load_state_with_optimizer(checkpoint.trainer)
    return trainer


def _move(trainer: TorchTrainer, recording: Recording, config: Config | None, root: Path) -> TorchTrainer:
    """A trainer of another life's settings that goes on where `trainer` stands: what a resume does."""
    with TemporaryDirectory(prefix="asyncrl-replay-") as folder:
        trainer.save_state(Path(folder) / "trainer")
        torch.set_num_threads(recording.settings["torch_threads"])
        moved = _make(recording, config, root, resumed=True)
        moved.load_state_with_optimizer(Path(folder) / "trainer")
    return moved


def _make(recording: Recording, config: Config | None, root: Path, *, resumed: bool) -> TorchTrainer:
    """A trainer with the weights that the run began from, where they are needed."""
    used = config or config_of(recording)
    trainer = TorchTrainer(used, total_steps=recording.settings["total_steps"], weights_format="tensors")
    first = used.checkpoint.init_from
    if first is not None and (not resumed or used.kl_beta):  # a KL refers to them all along
        trainer.load_state(resolve(first, root.absolute().parent).trainer)
    return trainer


@contextmanager
def _threads(recording: Recording) -> Iterator[None]:
    """As many threads of torch as the run had: how a sum is cut among them decides about its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(recording.settings["torch_threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_export(trainer: TorchTrainer, folder: RunFolder) -> list[WeightsCheck]:
    """The exported model, where there is one of the step that `trainer` stands at."""
    try:
        exported = json.loads(folder.summary.read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError):  # the run has not ended, or not well
        return []
    if exported != trainer.step or not folder.model.is_dir():
        return []
    with TemporaryDirectory(prefix="asyncrl-replay-") as temporary:
        trainer.save_model(Path(temporary) / "model")
        return [WeightsCheck(folder.model, trainer.step, _differing_files(Path(temporary) / "model", folder.model))]


def _differing_files(first: Path, second: Path) -> list[str]:
    """Files of weights in `first` that `second` has not, or not the same."""
    names = sorted(path.name for path in first.glob("*.safetensors"))
    _, differing, missing = filecmp.cmpfiles(first, second, names, shallow=False)
    return differing + missing


def _metrics(root: Path) -> dict[int, dict[str, Any]]:
    """The record of each step; a last line that is still being written is left out."""
    try:
        lines = RunFolder(root).metrics.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[int(record["step"])] = record
    return found


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(map(str, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
