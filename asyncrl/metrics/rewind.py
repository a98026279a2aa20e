"""Takes back what a run wrote after the step that it goes on from, so that each step stands there once.

What is taken out is kept in `logs/undone/`: it happened, but the run does not stand on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from asyncrl.private import private

AXES: Mapping[str, str] = {"metrics.jsonl": "step", "evaluations.jsonl": "eval_version", "rollouts.jsonl": "step"}
"""File of a run folder -> the field that says which optimizer step a record belongs to."""


def rewind(folder: Path, step: int | None) -> None:
    """Leave in the run folder's records those of the first `step` optimizer steps alone. None: it begins anew, so not
    even what was evaluated before the first.

    A last line that was cut off by the end of the process goes too. Killed half-way, it can be done again.

    Raises:
        OSError: a file cannot be written.
    """
    for name, axis in AXES.items():
        if (folder / name).exists():
            _take_back(folder / name, folder / "logs" / "undone" / name, axis, step)


def _take_back(path: Path, undone: Path, axis: str, step: int | None) -> None:
    undone.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.unfinished")
    with path.open("rb") as lines, open(beside, "wb", opener=private) as kept, undone.open("ab") as taken:
        for line in lines:
            (kept if _belongs(line, axis, step) else taken).write(line.rstrip(b"\n") + b"\n")
        _sync(taken)
        _sync(kept)
    beside.replace(path)
    if not undone.stat().st_size:
        undone.unlink()


def _belongs(line: bytes, axis: str, step: int | None) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # cut off
        return False
    return step is not None and bool(record[axis] <= step)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
