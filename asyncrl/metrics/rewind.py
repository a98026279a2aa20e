"""Takes back what a run wrote after the step that it goes on from, so that each step stands there once.

What is taken out is kept in `logs/undone/`: it happened, but the run does not stand on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from asyncrl.private import private

AXES: Mapping[str, str] = {
    "metrics.jsonl": "step",
    "evaluations.jsonl": "eval_version",
    "producer.jsonl": "rollout_step",
    "rollouts.jsonl": "step",
}
"""File of a run folder -> the field that says which optimizer step a record belongs to."""


def rewind(folder: Path, step: int | None, evaluated: Collection[int] | None = None) -> None:
    """Leave in the run folder's records those of the first `step` optimizer steps alone.

    Args:
        folder: The run's.
        step: None: it begins anew, so not even what was evaluated before the first step stays.
        evaluated: The versions whose evaluations the run knows; others may be measured again. None: all up to `step`.

    A last line that was cut off by the end of the process goes too. Killed half-way, it can be done again.

    Raises:
        OSError: a file cannot be written.
    """

    def stays(axis: str, record: Mapping[str, Any]) -> bool:
        if step is None or record[axis] > step:
            return False
        measured = axis == "eval_version" or record.get("evaluation", False)
        return evaluated is None or not measured or record[axis] in evaluated

    for name, axis in AXES.items():
        if (folder / name).is_file() and (folder / name).stat().st_size:
            _take_back(folder / name, folder / "logs" / "undone" / name, partial(stays, axis))


def _take_back(path: Path, undone: Path, stays: Callable[[Mapping[str, Any]], bool]) -> None:
    undone.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    with path.open("rb") as lines, open(beside, "wb", opener=private) as kept, undone.open("ab") as taken:
        for line in lines:
            (kept if _belongs(line, stays) else taken).write(line.rstrip(b"\n") + b"\n")
        _sync(taken)
        _sync(kept)
    beside.replace(path)
    if not undone.stat().st_size:
        undone.unlink()


def _belongs(line: bytes, stays: Callable[[Mapping[str, Any]], bool]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # cut off
        return False
    return stays(record)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
