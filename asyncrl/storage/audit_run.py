"""A run folder against its ledger: metrics, checkpoints and the summary must tell the same story.

What a process left that was killed may lag behind, so files are compared as far as they must agree: the checkpoints
always, since the ledger is on the disk before them; metrics and the summary when the last life has come to its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.errors import CheckpointError, DataError
from asyncrl.storage.audit import Account, Fault
from asyncrl.storage.checkpoints import Checkpoints
from asyncrl.storage.folder import RunFolder
from asyncrl.storage.ledger_file import Life, read_ledger


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found in one run folder."""

    account: Account
    faults: list[Fault]
    """Empty: all is accounted for."""
    data_ended: bool
    """The run is over, and nothing but its data ended it: every draw has been proved to have ended once."""

    @property
    def lives(self) -> list[Life]:
        return list(self.account.lives)


@dataclass(frozen=True, slots=True)
class _Saved:
    """A checkpoint and what it says of the ledger."""

    name: str
    step: int
    life: int
    position: int
    counts: Mapping[str, int] | None
    """None: it is only known from the listing."""


def audit_run(root: Path) -> Audit:
    """Check that every prompt of the run in `root` is accounted for. The run may be going on.

    Raises:
        DataError: there is no ledger, or it cannot be read.
    """
    folder = RunFolder(root)
    faults: list[Fault] = []
    # Before the ledger, which is on the disk before a checkpoint is: it reaches to all that are found.
    listed, kept = list(_listed(root)), list(_kept(root, faults))
    with read_ledger(folder.ledger) as ledger:
        lives = ledger.lives()
        marks = {saved.position for saved in [*listed, *kept]} | {life.resumed_from for life in lives}
        account = Account(lives, marks)
        account.read(ledger.events())
    faults += _checkpoints(account, root, listed, kept)
    summary = _summary(folder, account)
    data_ended = summary is not None and _ended_by_data(summary, account)
    faults += _records(account, folder, summary)
    return Audit(account, [*account.conclude(data_ended=data_ended), *faults], data_ended)


# Checkpoints


def _listed(root: Path) -> Iterator[_Saved]:
    for entry in _json_lines(Checkpoints(root).listing):
        if (position := entry.get("ledger_position")) is not None:
            yield _Saved(entry["name"], entry["step"], entry["life"], position, None)


def _kept(root: Path, faults: list[Fault]) -> Iterator[_Saved]:
    for checkpoint in Checkpoints(root).all():
        fault = checkpoint.fault()
        try:
            state = checkpoint.state()
        except CheckpointError as error:
            state, fault = {}, str(error)
        if fault is not None:
            if checkpoint.folder.is_dir():  # else it has been removed meanwhile, in favour of newer ones
                faults.append(Fault("checkpoint", f"{checkpoint.folder.name} is not whole: {fault}"))
        elif "loop" in state:
            ledger = state["loop"]["ledger"]
            yield _Saved(checkpoint.folder.name, checkpoint.step, state["life"], ledger["position"], ledger["counts"])


def _checkpoints(account: Account, root: Path, listed: list[_Saved], kept: list[_Saved]) -> Iterator[Fault]:
    until = {life.life: life.stands_until for life in account.lives}
    in_lineage = [saved for saved in [*listed, *kept] if saved.position <= until.get(saved.life, 0)]
    for saved in in_lineage:
        tally = account.tallies.get(saved.position)
        where = f"{saved.name} was made at event {saved.position}"
        if tally is None:
            yield Fault("checkpoint", f"{where}, but the ledger ends at event {account.last}")
        elif tally.step != saved.step:
            yield Fault("checkpoint", f"{where}, where the ledger is at step {tally.step}")
        elif saved.counts is not None and saved.counts != tally.counts:
            yield Fault("checkpoint", f"{where}, where the ledger counts {tally.counts}; it says {saved.counts}")
    newest = next((saved for saved in reversed(listed) if saved in in_lineage), None)
    if newest is not None and not (Checkpoints(root).folder / newest.name).is_dir():
        yield Fault("checkpoint", f"{newest.name} is the newest that is listed, but its folder is gone")


# Records


def _summary(folder: RunFolder, account: Account) -> dict[str, Any] | None:
    """That of the last life. None: it has not ended, or has left none."""
    last = account.lives[-1] if account.lives else None
    if last is None or last.ended_at is None or not folder.summary.is_file():
        return None
    if folder.summary.stat().st_mtime < last.started_at:  # that of an earlier life
        return None
    found = json.loads(folder.summary.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None


def _ended_by_data(summary: Mapping[str, Any], account: Account) -> bool:
    bounds = account.lives[-1].bounds
    if "error" in summary or summary.get("interrupted") or summary.get("ended_early") or bounds is None:
        return False
    return bounds.max_steps is None or summary["steps"] < bounds.max_steps


def _records(account: Account, folder: RunFolder, summary: Mapping[str, Any] | None) -> Iterator[Fault]:
    steps = [record.get("step") for record in _json_lines(folder.metrics)]
    recorded = len(steps)
    wrong = next((place for place, step in enumerate(steps, start=1) if step != place), None)
    if wrong is not None:
        yield Fault("records", f"line {wrong} of {folder.metrics.name} is of step {steps[wrong - 1]}")
    if account.lives and account.lives[-1].ended_at is not None and account.step - recorded not in (0, 1):
        # The step that ended a run in a failure has no record.
        yield Fault("records", f"the ledger is at step {account.step}, {folder.metrics.name} at step {recorded}")
    if summary is None or "error" in summary:
        return
    if not account.step == summary["steps"] == recorded:
        yield Fault(
            "records",
            f"the ledger has {account.step} steps, {folder.metrics.name} {recorded}, {folder.summary.name} "
            f"{summary['steps']}",
        )
    if summary["ledger"] != account.summary():
        yield Fault("records", f"the ledger counts {account.summary()}, {folder.summary.name} {summary['ledger']}")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; none where there is no file. A last line that was cut off is left out.

    Raises `DataError` for a line that is none.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break
            try:
                found = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON: {error}. Expected what a run writes.") from None
            if isinstance(found, dict):
                yield found
