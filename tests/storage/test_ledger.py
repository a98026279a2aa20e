"""The ledger: what it refuses, and that any history of kills and resumes leaves one that adds up."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from asyncrl.storage.audit import Account
from asyncrl.storage.ledger import Key, Ledger
from asyncrl.storage.ledger_file import Bounds, LedgerStore, read_ledger


class TestWhatItRefuses:
    """Faults of the engine."""

    def test_a_draw_that_is_admitted_twice(self) -> None:
        ledger = Ledger()
        ledger.admit((0, 0), 0, version=0)
        with pytest.raises(AssertionError, match=r"\(0, 0\) was admitted twice"):
            ledger.admit((0, 0), 1, version=0)

    def test_a_draw_that_ends_twice(self) -> None:
        ledger = Ledger()
        ledger.admit((0, 0), 0, version=0)
        ledger.finished((0, 0), 0, [0.0, 1.0])
        ledger.trained((0, 0), 1)
        for end in (lambda: ledger.filtered((0, 0)), lambda: ledger.rejected((0, 0), "stale")):
            with pytest.raises(AssertionError, match="not pending"):
                end()
        with pytest.raises(AssertionError, match="had not finished"):
            ledger.trained((0, 0), 2)

    def test_a_draw_that_finishes_twice(self) -> None:
        ledger = Ledger()
        ledger.admit((0, 0), 0, version=0)
        ledger.finished((0, 0), 0, [0.0])
        with pytest.raises(AssertionError, match="finished twice"):
            ledger.finished((0, 0), 0, [0.0])

    def test_a_draw_that_is_rolled_out_twice_at_once(self) -> None:
        ledger = Ledger()
        with pytest.raises(AssertionError, match="not pending"):
            ledger.requeue((0, 7), 2, version=0)
        ledger.admit((0, 0), 0, version=0)
        with pytest.raises(AssertionError, match="being rolled out already"):
            ledger.requeue((0, 0), 1, version=0)

    def test_a_draw_that_finishes_though_a_kill_cut_it_off(self) -> None:
        ledger, before = Ledger(), Ledger()
        before.admit((0, 0), 0, version=0)
        ledger.restore(before.state())
        with pytest.raises(AssertionError, match="this process has not begun it"):
            ledger.finished((0, 0), 0, [1.0])


def test_a_requeued_prompt_is_admitted_once() -> None:
    ledger = Ledger()
    ledger.admit((0, 0), 0, version=0)
    ledger.finished((0, 0), 0, [0.0])
    ledger.requeue((0, 0), 5, version=3)
    assert ledger.sequences == {(0, 0): 5}
    ledger.finished((0, 0), 3, [0.0])
    ledger.trained((0, 0), 4)
    ledger.close()
    assert ledger.summary() == {
        "admitted": 1, "trained": 1, "filtered": 0, "rejected": 0, "pending": 0, "requeued": 1,
    }  # fmt: skip


def test_a_restored_ledger_is_the_one_that_was_saved() -> None:
    ledger, later = Ledger(), Ledger()
    for row in range(5):
        ledger.admit((2, row), row, version=1)
    ledger.finished((2, 0), 1, [0.5])
    ledger.finished((2, 1), 1, [0.5])
    ledger.trained((2, 0), 2)
    ledger.rejected((2, 2), "1 of 4 rollouts survived")
    state = json.loads(json.dumps(ledger.state()))
    later.restore(state)
    assert later.state() == state
    assert later.position == ledger.position == 9
    later.requeue((2, 4), 5, version=2)
    later.finished((2, 4), 2, [0.5])
    later.trained((2, 1), 3)
    later.trained((2, 4), 3)
    assert later.summary() == ledger.summary() | {"trained": 3, "pending": 1}, "a restart is not a requeue"


MEMORY = Path("/dev/shm")
"""Hundreds of syncs to a disk that others use too would take a minute."""
GROUPS, STALENESS, ROWS, EPOCHS = 2, 3, 5, 2
BOUNDS = Bounds(GROUPS, STALENESS, ROWS, EPOCHS, max_steps=None)


class Lives(RuleBasedStateMachine):
    """A run as the scheduler and the engine write it into the ledger: killed, resumed, resumed from far back."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.loop = asyncio.new_event_loop()
        self.random = Random(0)
        self.checkpoints: list[dict[str, Any]] = []
        self.begin(None)

    def teardown(self) -> None:
        self.it_adds_up()
        self.store.close()
        self.loop.close()
        shutil.rmtree(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / "ledger.db"

    def begin(self, checkpoint: dict[str, Any] | None) -> None:
        position = checkpoint["ledger"]["position"] if checkpoint is not None else None
        self.store = LedgerStore.open(self.path, resumed_at=position, bounds=BOUNDS)
        self.ledger = Ledger(self.store)
        self.step = self.drawn = self.sequence = 0
        self.running: dict[Key, int] = {}
        self.finished: dict[Key, int] = {}
        self.again: list[Key] = []
        if checkpoint is None:
            return
        self.ledger.restore(checkpoint["ledger"])
        self.step, self.drawn, self.sequence = checkpoint["step"], checkpoint["drawn"], checkpoint["sequence"]
        self.finished = {(epoch, row): version for epoch, row, version in checkpoint["finished"]}
        self.again = [key for key in self.ledger.sequences if key not in self.finished]

    def pick(self, keys: dict[Key, int]) -> Key:
        return self.random.choice(sorted(keys))

    @initialize(seed=st.integers(0, 1 << 30))
    def choose(self, seed: int) -> None:
        self.random.seed(seed)

    @precondition(lambda self: self.again or self.drawn < ROWS * EPOCHS)
    @rule(count=st.integers(1, 4))
    def admit(self, count: int) -> None:
        for _ in range(count):
            version, sequence = self.step, self.sequence
            if self.again:
                key = self.again.pop(0)
                self.ledger.requeue(key, sequence, version)
            elif self.drawn < ROWS * EPOCHS:
                key = divmod(self.drawn, ROWS)
                self.drawn += 1
                self.ledger.admit(key, sequence, version)
            else:
                break
            self.sequence += 1
            self.running[key] = version

    @precondition(lambda self: self.running)
    @rule()
    def finish(self) -> None:
        key = self.pick(self.running)
        self.finished[key] = version = self.running.pop(key)
        self.ledger.finished(key, version, [self.random.random() for _ in range(3)])

    @precondition(lambda self: self.running)
    @rule()
    def fail(self) -> None:
        key = self.pick(self.running)
        del self.running[key]
        self.ledger.rejected(key, "1 of 4 rollouts survived")

    @precondition(lambda self: self.running)
    @rule()
    def filter(self) -> None:
        key = self.pick(self.running)
        del self.running[key]
        self.ledger.filtered(key)

    @precondition(lambda self: self.finished)
    @rule()
    def train(self) -> None:
        """One optimizer step; what has become too old is rolled out again, or dropped."""
        batch = []
        for key, version in sorted(self.finished.items(), key=lambda found: found[1])[:GROUPS]:
            del self.finished[key]
            if self.step - version <= STALENESS:
                batch.append(key)
            elif self.random.random() < 0.5:
                self.again.append(key)
            else:
                self.ledger.rejected(key, "stale")
        self.step += bool(batch)
        for key in batch:
            self.ledger.trained(key, self.step)

    @rule()
    def checkpoint(self) -> None:
        state = {
            "ledger": self.ledger.state(),
            "step": self.step,
            "drawn": self.drawn,
            "sequence": self.sequence,
            "finished": [[*key, version] for key, version in self.finished.items()],
        }
        self.loop.run_until_complete(self.ledger.flush())
        self.checkpoints.append(json.loads(json.dumps(state)))

    @rule(which=st.sampled_from([0, 0, 0, 1, 2, 99]), lost=st.integers(0, 12))
    def kill_and_resume(self, which: int, lost: int) -> None:
        """The newest checkpoint, an earlier one, or the start. What no checkpoint waited for may be lost."""
        saved = max((found["ledger"]["position"] for found in self.checkpoints), default=0)
        self.store.close()
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("DELETE FROM events WHERE id > max(?, (SELECT max(id) FROM events) - ?)", (saved, lost))
            connection.execute("UPDATE lives SET ended_at = NULL WHERE life = (SELECT max(life) FROM lives)")
            connection.commit()
        self.begin(self.checkpoints[-1 - which] if which < len(self.checkpoints) else None)

    @rule()
    def it_adds_up(self) -> None:
        self.loop.run_until_complete(self.ledger.flush())
        with read_ledger(self.path) as reader:
            account = Account(reader.lives())
            account.read(reader.events())
        data_ended = self.drawn == ROWS * EPOCHS and not self.ledger.pending
        assert account.conclude(data_ended=data_ended) == []
        assert account.summary() == self.ledger.summary()
        assert account.step == self.step


def test_any_history_adds_up() -> None:
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
