"""Where records go: files in the run folder, always, and the trackers that the user asked for.

`SinkList` is used on the event loop: the files are flushed to the system, not to the disk, and each tracker has a
thread of its own (detached.py). A run that is resumed goes on in the same files (rewind.py has taken back what was
undone).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from asyncrl.config import Config
from asyncrl.metrics.detached import Axis, Detached, Record
from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.metrics.names import StepRecord
from asyncrl.metrics.trackers import open_tracker

FILES: Mapping[Axis, str] = {
    "step": "metrics.jsonl",
    "eval_version": "evaluations.jsonl",
    "rollouts_ended": "producer.jsonl",
}


class Sink(Protocol):
    """Takes records. `log` does not wait for a network, nor for a disk that does not answer."""

    def log(self, axis: Axis, record: Record) -> None: ...

    def close(self) -> None:
        """Send what is left. May wait. Called once."""


class JsonlSink:
    """One line per record. `metrics.jsonl` is there from the start, the others from their first record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {"step": JsonlFile(folder / FILES["step"])}

    def log(self, axis: Axis, record: Record) -> None:
        if axis not in self._files:
            self._files[axis] = JsonlFile(self._folder / FILES[axis])
        self._files[axis].write(record)

    def close(self) -> None:
        with ExitStack() as stack:  # each, also where a full disk has kept a line of another from being written
            for file in self._files.values():
                stack.callback(file.close)


class SinkList:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, record: StepRecord) -> None:
        """Hand the record of an optimizer step over."""
        self._log("step", record)

    def evaluated(self, record: StepRecord) -> None:
        """Hand over what an evaluation found. Its axis is `eval_version`, which is older than the last step."""
        self._log("eval_version", record)

    def produced(self, record: StepRecord) -> None:
        """Hand over how rollouts went. Their axis is `rollouts_ended`."""
        self._log("rollouts_ended", record)

    def close(self) -> None:
        """Close every sink, also when one of them raises."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def _log(self, axis: Axis, record: StepRecord) -> None:
        for sink in self._sinks:
            sink.log(axis, record)


def open_sinks(trackers: Sequence[str], folder: Path, config: Config, resumed_step: int | None = None) -> SinkList:
    """The files of records, and the trackers of `config.trackers`.

    `resumed_step`: the optimizer steps that the run has behind it, where it goes on from a checkpoint; `rewind` has
    been called. None: it begins.
    Blocks while a tracker starts (wandb: seconds), so call it before the loop does anything.
    Raises `ConfigError` when a tracker is not installed, or does not start.
    """
    settings = config.model_dump(mode="json")
    resumed: dict[Axis, int] | None = None
    if resumed_step is not None:
        resumed = {"step": resumed_step, "eval_version": resumed_step, "rollouts_ended": _rollouts_before(folder)}
    with ExitStack() as opened:
        sinks: list[Sink] = []
        for name in dict.fromkeys(trackers):
            sinks.append(Detached(name, open_tracker(name, folder, settings, config.wandb, resumed)))
            opened.callback(sinks[-1].close)
        sinks.append(JsonlSink(folder))
        opened.pop_all()
    return SinkList(sinks)


def _rollouts_before(folder: Path) -> int:
    """Those of earlier lives, by the last record that they left."""
    path = folder / FILES["rollouts_ended"]
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["rollouts_ended"]) if lines else 0
