"""Ledgers for tests: a run folder that adds up, made by the ledger itself, and what became of the draws of any."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from asyncrl.storage.audit import ENDS
from asyncrl.storage.audit_run import audit_run
from asyncrl.storage.checkpoints import Checkpoint, Checkpoints
from asyncrl.storage.folder import RunFolder
from asyncrl.storage.ledger import Key, Ledger
from asyncrl.storage.ledger_file import Bounds, LedgerStore, read_ledger

BOUNDS = Bounds(groups_per_step=2, max_staleness=1, rows=5, epochs=2, max_steps=None)
"""10 draws: 8 are trained in 4 steps, one is filtered, one rejected."""


class Run:
    """Writes what an engine would write."""

    def __init__(self, root: Path, bounds: Bounds = BOUNDS) -> None:
        self.folder = RunFolder(root)
        self.bounds = bounds
        self.steps = 0

    def begin(self, checkpoint: Checkpoint | None = None) -> Ledger:
        state = checkpoint.state()["loop"]["ledger"] if checkpoint is not None else None
        self.store = LedgerStore.open(
            self.folder.ledger, resumed_at=state["position"] if state else None, bounds=self.bounds
        )
        self.ledger = Ledger(self.store)
        if state is not None and checkpoint is not None:
            self.ledger.restore(state)
            self.steps = checkpoint.step
            lines = self.folder.metrics.read_text().splitlines(keepends=True)
            self.folder.metrics.write_text("".join(lines[: self.steps]))
        return self.ledger

    def train(self, *keys: Key) -> None:
        self.steps += 1
        for key in keys:
            self.ledger.trained(key, self.steps)
        with self.folder.metrics.open("a") as metrics:
            metrics.write(json.dumps({"step": self.steps, "loss": 0.5}) + "\n")

    def save(self, **changes: Any) -> Checkpoint:
        checkpoints = Checkpoints(self.folder.root)
        state = self.ledger.state()
        asyncio.run(self.ledger.flush())
        unfinished = checkpoints.begin(self.steps)
        found = {"life": self.store.life, "loop": {"step": self.steps, "ledger": state | changes}}
        (unfinished / "state.json").write_text(json.dumps(found))
        entry = {"life": self.store.life, "ledger_position": state["position"]}
        return checkpoints.commit(self.steps, entry)

    def end(self, **summary: Any) -> None:
        self.ledger.close()
        found = {"steps": self.steps, "interrupted": False, "ended_early": None, "ledger": self.ledger.summary()}
        self.folder.write_summary(found | summary)


def admit(ledger: Ledger, *keys: Key, version: int = 0, first: int = 0) -> None:
    for sequence, key in enumerate(keys, start=first):
        ledger.admit(key, sequence, version)


def finish(ledger: Ledger, *keys: Key, version: int = 0) -> None:
    for key in keys:
        ledger.finished(key, version, [0.0, 1.0])


def make_run(root: Path) -> Run:
    """Life 0 takes three steps, but its checkpoint is of the second; life 1 takes the third again, and the fourth."""
    run = Run(root)
    ledger = run.begin()
    admit(ledger, (0, 0), (0, 1), (0, 2), (0, 3))
    finish(ledger, (0, 0), (0, 1), (0, 3))
    run.train((0, 0), (0, 3))
    admit(ledger, (0, 4), (1, 0), version=1, first=4)
    ledger.filtered((0, 4))
    finish(ledger, (0, 2))
    run.train((0, 1), (0, 2))
    admit(ledger, (1, 1), version=2, first=6)
    finish(ledger, (1, 0), version=1)
    saved = run.save()
    admit(ledger, (1, 2), version=2, first=7)
    finish(ledger, (1, 1), (1, 2), version=2)
    run.train((1, 0), (1, 1))
    ledger.close()
    ledger = run.begin(saved)
    ledger.requeue((1, 1), 7, version=2)
    admit(ledger, (1, 2), (1, 3), (1, 4), version=2, first=8)
    finish(ledger, (1, 1), (1, 2), (1, 4), version=2)
    ledger.rejected((1, 3), "1 of 4 rollouts survived")
    run.train((1, 0), (1, 1))
    run.save()
    run.train((1, 2), (1, 4))
    run.end()
    return run


def tamper(root: Path, statement: str, *values: Any) -> None:
    """Change the ledger behind its back."""
    with closing(sqlite3.connect(RunFolder(root).ledger)) as connection:
        assert connection.execute(statement, values).rowcount > 0, f"{statement!r} changes nothing"
        connection.commit()


def fates(root: Path) -> dict[Key, str]:
    """What became of each draw of a run, which must add up: its end, or `pending`."""
    audit = audit_run(root)
    assert audit.faults == []
    with read_ledger(RunFolder(root).ledger) as reader:
        states = {(event.epoch, event.row): event.state for event in reader.events() if not event.undone}
    return {key: state if state in ENDS else "pending" for key, state in states.items()}
