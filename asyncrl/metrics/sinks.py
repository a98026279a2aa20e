"""Where step records go: a file in the run folder, always, and the trackers that the user asked for.

`write` runs on the event loop once per optimizer step, so a sink must only hand the record over.
The trackers all send from threads or processes of their own; the file is flushed to the system,
not to the disk. A run that is resumed goes on in the same files (rewind.py has taken back what was undone) and in the
same run of each tracker.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from asyncrl.config import Config, WandbConfig
from asyncrl.errors import ConfigError
from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.metrics.names import StepRecord


class MetricSink(Protocol):
    """Takes the record of each step."""

    def write(self, record: StepRecord) -> None:
        """Hand one record over. Does not wait for disk or network."""

    def evaluated(self, record: StepRecord) -> None:
        """Hand over what an evaluation found. Its axis is `eval_version`, which is older than the last step."""

    def close(self) -> None:
        """Send what is left. May wait. Called once."""


class JsonlSink:
    """`metrics.jsonl`: one line per step. `evaluations.jsonl`: one per evaluation, if there are any."""

    def __init__(self, folder: Path) -> None:
        self._file = JsonlFile(folder / "metrics.jsonl")
        self._evaluations = folder / "evaluations.jsonl"

    def write(self, record: StepRecord) -> None:
        self._file.write(record)

    def evaluated(self, record: StepRecord) -> None:
        with JsonlFile(self._evaluations) as file:
            file.write(record)

    def close(self) -> None:
        self._file.close()


class WandbSink:
    """Weights & Biases. What `where` leaves open its own variables say: `WANDB_PROJECT`, `WANDB_MODE=offline`, ...

    Its history cannot be taken back, and drops a step that is lower than the last. So the axis of a chart is the
    record's own `step`, and a step that was undone and taken again is there twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], where: WandbConfig, resumed: bool) -> None:
        wandb = _tracker("wandb", "wandb")
        known = folder / "wandb" / "run-id"  # `dir` is where wandb makes its folder of that name
        self._run = wandb.init(
            id=known.read_text(encoding="utf-8").strip() if resumed and known.exists() else None,
            resume="allow",
            entity=where.entity,
            project=where.project or os.environ.get("WANDB_PROJECT", "asyncrl"),
            name=where.run_name or folder.name,
            dir=folder,
            config=dict(settings),
            settings=wandb.Settings(console="off"),  # its capture of the terminal and the live view would fight
        )
        known.parent.mkdir(exist_ok=True)
        known.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._run.define_metric("eval_*", step_metric="eval_version")
        self._known: set[str] = set()

    def write(self, record: StepRecord) -> None:
        for name in record.keys() - self._known - {"step"}:
            self._run.define_metric(name, step_metric="step")
        self._known |= record.keys()
        self._run.log(dict(record))

    def evaluated(self, record: StepRecord) -> None:
        self._run.log(dict(record))

    def close(self) -> None:
        self._run.finish()


class TensorBoardSink:
    """TensorBoard event files in `tensorboard/`. Written with `tensorboard` alone, so that no torch is loaded."""

    def __init__(self, folder: Path, resumed_step: int | None) -> None:
        writer = _tracker("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._events = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = import_module("tensorboard.compat.proto.summary_pb2")
        self._writer = writer.EventFileWriter(str(folder / "tensorboard"))
        if resumed_step is not None:  # whoever reads the files forgets what they say from this step on
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.add_event(self._events.Event(step=resumed_step + 1, session_log=start, wall_time=time.time()))

    def write(self, record: StepRecord) -> None:
        self._add(record, int(record["step"]))

    def evaluated(self, record: StepRecord) -> None:
        self._add(record, int(record["eval_version"]))

    def _add(self, record: StepRecord, step: int) -> None:
        values = [self._summaries.Summary.Value(tag=name, simple_value=v) for name, v in _numbers(record).items()]
        summary = self._summaries.Summary(value=values)
        self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), summary=summary))

    def close(self) -> None:
        self._writer.close()


class TrackioSink:
    """Trackio: a local, free tracker with the calls of wandb. `TRACKIO_PROJECT` names the project.

    As with wandb, a step that was undone and taken again is there twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        trackio = _tracker("trackio", "trackio")
        project = os.environ.get("TRACKIO_PROJECT", "asyncrl")
        resume = "allow" if resumed else "never"
        self._run = trackio.init(project=project, name=folder.name, config=dict(settings), resume=resume)

    def write(self, record: StepRecord) -> None:
        values = {name: value for name, value in record.items() if name != "step"}  # a word of its own there
        self._run.log(values, step=int(record["step"]))

    def evaluated(self, record: StepRecord) -> None:
        self._run.log(dict(record), step=int(record["eval_version"]))

    def close(self) -> None:
        self._run.finish()


class SinkList:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, record: StepRecord) -> None:
        for sink in self._sinks:
            sink.write(record)

    def evaluated(self, record: StepRecord) -> None:
        for sink in self._sinks:
            sink.evaluated(record)

    def close(self) -> None:
        """Close every sink, also when one of them raises."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


def open_sinks(trackers: Sequence[str], folder: Path, config: Config, resumed_step: int | None = None) -> SinkList:
    """`metrics.jsonl` and the trackers of `config.trackers`.

    `resumed_step`: the optimizer steps that the run has behind it, where it goes on from a checkpoint; `rewind` has
    been called. None: it begins.
    Blocks while a tracker starts (wandb: seconds), so call it before the loop does anything.
    Raises `ConfigError` when a tracker is not installed.
    """
    settings = config.model_dump(mode="json")
    with ExitStack() as opened:
        sinks: list[MetricSink] = []
        for name in dict.fromkeys(trackers):
            sinks.append(_open_tracker(name, folder, settings, config.wandb, resumed_step))
            opened.callback(sinks[-1].close)
        sinks.append(JsonlSink(folder))
        opened.pop_all()
    return SinkList(sinks)


def _open_tracker(
    name: str, folder: Path, settings: Mapping[str, Any], where: WandbConfig, resumed_step: int | None
) -> MetricSink:
    resumed = resumed_step is not None
    match name:
        case "wandb":
            return WandbSink(folder, settings, where, resumed)
        case "tensorboard":
            return TensorBoardSink(folder, resumed_step)
        case "trackio":
            return TrackioSink(folder, settings, resumed)
    raise ConfigError(f"trackers: there is no tracker {name!r}. Use 'wandb', 'tensorboard' or 'trackio'.")


def _tracker(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"trackers asks for {package!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'asyncrl[{package}]'"
        ) from error


def _numbers(record: StepRecord) -> dict[str, float]:
    return {k: v for k, v in record.items() if not isinstance(v, str) and math.isfinite(v) and k != "step"}
