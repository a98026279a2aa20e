"""A run folder, read for a report: whatever is there, of a run that is over, goes on, has failed, or is old.

Step records are kept as columns, since a run may have a million of them. What a resume has taken back is left out.
"""

from __future__ import annotations

import json
import tomllib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asyncrl.errors import ConfigError, DataError
from asyncrl.metrics.report import Account
from asyncrl.storage.folder import RunFolder, existing_run
from asyncrl.storage.ledger_file import LedgerReader, read_ledger
from asyncrl.storage.logged import Rollout, read_rollouts
from asyncrl.storage.timeline import LifeTimes, read_timeline

STATES = ("trained", "filtered", "rejected")
FATES = (*STATES, "requeued", "restarted", "pending")
"""What became of a group: `requeued` and `restarted` groups were rolled out again, as other groups."""
MOST_DRAWS = 200_000
"""Draws whose fate is read one by one; of more, so many are chosen."""


@dataclass(frozen=True, slots=True)
class Records:
    """The records of a JSONL file as columns: `records["reward_mean"]` is an array [N], nan where it is absent."""

    columns: Mapping[str, np.ndarray]
    count: int

    def __len__(self) -> int:
        return self.count

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> np.ndarray:
        found = self.columns.get(name)
        return np.full(self.count, np.nan) if found is None else found


@dataclass(frozen=True, slots=True)
class Fates:
    """What became of groups, of a fair part of them where there are many."""

    keys: np.ndarray
    """[G] ascending: `key_of` the life that began it and its place in that life's order of admission."""
    fates: np.ndarray
    """[G] index into `FATES`."""

    def of(self, life: int, sequences: np.ndarray) -> np.ndarray:
        """The fate of each group [N] -> [N], -1 for those that were not looked up or are undone."""
        if not len(self.keys):
            return np.full(len(sequences), -1)
        keys = key_of(life, sequences.astype(np.int64))
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.fates[places], -1)


def key_of(life: int, sequence: Any) -> Any:
    """One number for a group of a run, of an int or an array."""
    return (life << 40) + sequence


@dataclass(frozen=True, slots=True)
class RunData:
    """Everything that a report says of one run."""

    root: Path
    settings: Mapping[str, Any]
    """As in config.toml, by their full names: `staleness.max_staleness` -> 4."""
    steps: Records
    """`metrics.jsonl`: one per optimizer step."""
    account: Account
    """Of the steps: where the time went."""
    evaluations: Records
    """`evaluations.jsonl`: one per evaluation, by `eval_version`."""
    timeline: Sequence[LifeTimes]
    """Empty where it was not recorded."""
    ledger: Mapping[str, int]
    """Draws that were admitted, trained, filtered, rejected, and are pending; empty where there is no ledger."""
    fates: Fates
    summary: Mapping[str, Any] | None
    """None: the run goes on, or was killed."""
    environment: Mapping[str, Any]
    heard_at: float | None
    """When the newest record of a step was written, s since 1970. None: there is none."""

    @property
    def name(self) -> str:
        return self.root.absolute().name

    @property
    def state(self) -> Literal["going on", "ended", "interrupted", "failed"]:
        """`going on` also where the process was killed: nobody wrote an end."""
        if self.summary is None:
            return "going on"
        if "error" in self.summary:
            return "failed"
        return "interrupted" if self.summary.get("interrupted") else "ended"

    def rollouts(self) -> Iterator[Rollout]:
        """Those that were logged in words, the newest group first. Read as they are asked for: it may be gigabytes.

        Raises `DataError` for a line that is not the log's.
        """
        path = RunFolder(self.root).rollouts
        return read_rollouts(path) if path.is_file() else iter(())


def load_run(folder: str | Path) -> RunData:
    """Read what a run has left up to now; nothing in the folder is changed.

    Raises:
        ConfigError: there is no such folder, or no run in it.
        DataError: a file in it is not what a run writes.
    """
    root = existing_run(folder)
    files = RunFolder(root)
    if not (files.config.is_file() or files.metrics.is_file()):
        raise ConfigError(
            f"{root} holds no run: there is neither a {files.config.name} nor a {files.metrics.name} in it. "
            "Name a run folder, such as runs/<time>."
        )
    account = Account()
    ledger, fates = _ledger(files)
    return RunData(
        root=root,
        settings=dict(flat(_toml(files.config))),
        steps=read_records(files.metrics, account.add),
        account=account,
        evaluations=read_records(files.evaluations),
        timeline=read_timeline(root),
        ledger=ledger,
        fates=fates,
        summary=_json(files.summary),
        environment=_json(files.environment) or {},
        heard_at=files.metrics.stat().st_mtime if files.metrics.is_file() else None,
    )


def read_records(path: Path, on_record: Callable[[Mapping[str, Any]], object] = lambda record: None) -> Records:
    """A file of flat JSON objects; without a file, no records. A last line that is still being written is left out.

    Raises `DataError` for any other line that is none.
    """
    columns: dict[str, array[float]] = {}
    count = 0
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    break
                record = _object(path, number, line)
                on_record(record)
                for name, value in record.items():
                    if isinstance(value, int | float):
                        column = columns.setdefault(name, array("d"))
                        column.extend([np.nan] * (count - len(column)))
                        column.append(value)
                count += 1
    for column in columns.values():
        column.extend([np.nan] * (count - len(column)))
    return Records({name: np.frombuffer(column) for name, column in columns.items()}, count)


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise DataError(
            f"{path}, line {number}: this is not a record ({str(found)[:80]}). Expected one JSON object per line, as "
            "a run writes them; take the line out to read the rest."
        )
    return found


def _ledger(files: RunFolder) -> tuple[dict[str, int], Fates]:
    if not files.ledger.is_file():
        return {}, Fates(np.zeros(0, np.int64), np.zeros(0, np.int64))
    with read_ledger(files.ledger) as ledger:
        counts = ledger.counts()
        ends = {state: counts.get(state, 0) for state in STATES}
        admitted = counts.get("admitted", 0)
        fates = _fates(ledger, -(-admitted // MOST_DRAWS) or 1)
    return {"admitted": admitted, **ends, "pending": admitted - sum(ends.values())}, fates


def _fates(ledger: LedgerReader, one_in: int) -> Fates:
    """A draw is a group from its beginning to its end, or until it is begun again."""
    begun: dict[tuple[int, int], int] = {}  # draw -> the group that it is now
    fates: dict[int, int] = {}
    for event in ledger.some_draws(one_in):
        draw = event.epoch, event.row
        if event.state in ("admitted", "requeued", "restarted"):
            if event.state != "admitted" and draw in begun:
                fates[begun[draw]] = FATES.index(event.state)
            begun[draw] = key_of(event.life, event.sequence)
            fates[begun[draw]] = FATES.index("pending")
        elif event.state in STATES and draw in begun:
            fates[begun[draw]] = FATES.index(event.state)
    keys = np.fromiter(sorted(fates), np.int64, len(fates))
    return Fates(keys, np.fromiter((fates[key] for key in keys.tolist()), np.int64, len(fates)))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:  # of TOML, or of UTF-8
        raise DataError(f"{path} cannot be read: {error}. Expected the settings of a run, as TOML.") from None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}. Expected a JSON object, as a run writes it.") from None
    return found if isinstance(found, dict) else None


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their full names: `staleness.max_staleness`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield above + name, value
