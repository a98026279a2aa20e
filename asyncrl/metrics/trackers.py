"""The trackers that users may ask for, each over the package of its name.

Steps, evaluations and rollouts have axes of their own. A run that is resumed goes on in the same run of each tracker;
only TensorBoard can forget what was undone.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from asyncrl.config import WandbConfig
from asyncrl.errors import ConfigError
from asyncrl.metrics.detached import Axis, Record, Tracker


def open_tracker(
    name: str, folder: Path, settings: Mapping[str, Any], where: WandbConfig, resumed: Mapping[Axis, int] | None
) -> Tracker:
    """The tracker of this name. Blocks while it starts (wandb: seconds).

    `resumed`: where each axis stands, in a run that goes on. None: it begins.
    Raises `ConfigError` when it is not installed, or does not start.
    """
    try:
        with _without_input():
            match name:
                case "wandb":
                    return WandbTracker(folder, settings, where, resumed is not None)
                case "tensorboard":
                    return TensorBoardTracker(folder, resumed)
                case "trackio":
                    return TrackioTracker(folder, settings, resumed is not None)
    except ConfigError:
        raise
    except Exception as error:  # of somebody else's package: an account, a network, a folder
        hint = " WANDB_MODE=offline needs neither an account nor a network." if name == "wandb" else ""
        raise ConfigError(
            f"trackers asks for {name!r}, which does not start: {str(error).rstrip('.') or repr(error)}.{hint}"
        ) from error
    raise ConfigError(f"trackers: there is no tracker {name!r}. Use 'wandb', 'tensorboard' or 'trackio'.")


class WandbTracker:
    """Weights & Biases. What `where` leaves open its own variables say: `WANDB_PROJECT`, `WANDB_MODE=offline`, ...

    Its history cannot be taken back, and drops a step that is lower than the last. So the axis of a chart is a field
    of the record, and a step that was undone and taken again is there twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], where: WandbConfig, resumed: bool) -> None:
        wandb = _import("wandb", "wandb")
        known = folder / "wandb" / "run-id"  # `dir` is where wandb makes its folder of that name
        self._run = wandb.init(
            id=known.read_text(encoding="utf-8").strip() if resumed and known.exists() else None,
            resume="allow",
            entity=where.entity,
            project=where.project or os.environ.get("WANDB_PROJECT", "asyncrl"),
            name=where.run_name or folder.name,
            dir=folder,
            config=dict(settings),
            # Its capture of the terminal and the live view would fight; its table of metrics hides how the run ended.
            settings=wandb.Settings(console="off", quiet=True),
        )
        known.parent.mkdir(exist_ok=True)
        known.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._known: set[str] = set()

    def log(self, axis: Axis, record: Record) -> None:
        for name in record.keys() - self._known - {axis}:
            self._run.define_metric(name, step_metric=axis)
        self._known |= record.keys()
        self._run.log(dict(record))

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in `tensorboard/`, those of the rollout side in `tensorboard/rollouts/`: what a resumed
    run forgets is a stretch of the axis, and theirs is another one. Written without torch.
    """

    def __init__(self, folder: Path, resumed: Mapping[Axis, int] | None) -> None:
        self._file_writer = _import("tensorboard.summary.writer.event_file_writer", "tensorboard").EventFileWriter
        self._events = import_module("tensorboard.compat.proto.event_pb2")
        self._summaries = import_module("tensorboard.compat.proto.summary_pb2")
        self._folder = folder / "tensorboard"
        self._resumed = resumed or {}
        self._writers: dict[Path, Any] = {}
        self._writer("step")

    def log(self, axis: Axis, record: Record) -> None:
        writer = self._writer(axis)
        values = [self._summaries.Summary.Value(tag=name, simple_value=v) for name, v in _numbers(record, axis).items()]
        summary = self._summaries.Summary(value=values)
        writer.add_event(self._events.Event(step=int(record[axis]), wall_time=time.time(), summary=summary))
        writer.flush()  # a disk that does not take it shows now, and whoever watches need not wait for two minutes

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()

    def _writer(self, axis: Axis) -> Any:
        folder = self._folder / "rollouts" if axis == "rollouts_ended" else self._folder
        if folder not in self._writers:
            self._writers[folder] = self._file_writer(str(folder))
            if axis in self._resumed:  # whoever reads the files forgets what they say from there on
                start = self._events.SessionLog(status=self._events.SessionLog.START)
                begins = self._events.Event(step=self._resumed[axis] + 1, session_log=start, wall_time=time.time())
                self._writers[folder].add_event(begins)
        return self._writers[folder]


class TrackioTracker:
    """Trackio: a local, free tracker with the calls of wandb. `TRACKIO_PROJECT` names the project.

    As with wandb, a step that was undone and taken again is there twice.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        trackio = _import("trackio", "trackio")
        project = os.environ.get("TRACKIO_PROJECT", "asyncrl")
        resume = "allow" if resumed else "never"
        self._run = trackio.init(project=project, name=folder.name, config=dict(settings), resume=resume)

    def log(self, axis: Axis, record: Record) -> None:
        values = {name: value for name, value in record.items() if name != "step"}  # a word of its own there
        self._run.log(values, step=int(record[axis]))

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _without_input() -> Iterator[None]:
    """A tracker that would ask for a key says that there is none: nobody can answer below the live view."""
    terminal = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"trackers asks for {package!r}, which cannot be imported ({error}). "
            f"Install it with: pip install 'asyncrl[{package}]'"
        ) from error


def _numbers(record: Record, axis: Axis) -> dict[str, float]:
    return {k: v for k, v in record.items() if not isinstance(v, str) and math.isfinite(v) and k != axis}
