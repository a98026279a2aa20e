"""The ledger's file: nothing that was flushed is lost, whatever happens, and what cannot be written is told."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.errors import CheckpointError, DataError, EngineError
from asyncrl.storage import ledger_file
from asyncrl.storage.audit import Account
from asyncrl.storage.ledger import Ledger
from asyncrl.storage.ledger_file import Bounds, Event, LedgerStore, Life, read_ledger

Open = Callable[..., LedgerStore]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "what? a 100% run" / "ledger.db"


@pytest.fixture
def open_store(path: Path) -> Iterator[Open]:
    path.parent.mkdir()
    opened: list[LedgerStore] = []

    def open_store(resumed_at: int | None = None, bounds: Bounds | None = None) -> LedgerStore:
        opened.append(LedgerStore.open(path, resumed_at=resumed_at, bounds=bounds))
        return opened[-1]

    yield open_store
    for store in opened:
        with suppress(EngineError):  # that is what the test was about
            store.close()


def read(path: Path) -> tuple[list[Life], list[Event]]:
    with read_ledger(path) as reader:
        return reader.lives(), list(reader.events())


def take_away(path: Path, replaced: bool) -> None:
    path.rename(path.with_name("elsewhere.db"))
    if replaced:
        path.touch()


def admit(ledger: Ledger, rows: range) -> None:
    for row in rows:
        ledger.admit((0, row), row, version=0)


class TestWhatIsKept:
    async def test_every_column(self, path: Path, open_store: Open) -> None:
        began = time.time()
        ledger = Ledger(open_store())
        ledger.admit((1, 7), 40, version=3)
        ledger.finished((1, 7), 3, [0.25, 1.0, -1e-9])
        ledger.requeue((1, 7), 41, version=5)
        ledger.rejected((1, 7), 'step 9 failed: "out" of memory; é\n')
        await ledger.flush()
        _, events = read(path)
        assert [event[2:] for event in events] == [
            (0, 1, 7, 40, "admitted", 3, None, None, None, False),
            (0, 1, 7, 40, "finished", 3, None, "[0.25, 1.0, -1e-09]", None, False),
            (0, 1, 7, 41, "requeued", 5, None, None, None, False),
            (0, 1, 7, 41, "rejected", None, None, None, 'step 9 failed: "out" of memory; é\n', False),
        ]
        assert [event.id for event in events] == [1, 2, 3, 4]
        times = [began, *(event.time for event in events), time.time()]
        assert times == sorted(times)

    async def test_many_events_stay_in_their_order(self, path: Path, open_store: Open) -> None:
        """More than one statement takes, and more than one transaction."""
        ledger = Ledger(open_store())
        for rows in (range(1000), range(1000, 1001), range(1001, 2777)):
            admit(ledger, rows)
            await ledger.flush()
        admit(ledger, range(2777, 3000))
        ledger.close()
        _, events = read(path)
        assert [(event.id, event.row) for event in events] == [(row + 1, row) for row in range(3000)]

    async def test_a_flush_waits_for_events_that_came_while_others_were_written(
        self, path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are handed over, and flushed, while the thread stands between two looks at what there is."""
        honest, standing, go_on = ledger_file._taken, threading.Event(), threading.Event()

        def slow(waiting: Any) -> list[Any]:
            taken = honest(waiting)
            if not standing.is_set():
                standing.set()
                go_on.wait(10)
            return taken

        ledger = Ledger(open_store())
        monkeypatch.setattr(ledger_file, "_taken", slow)
        await asyncio.to_thread(standing.wait, 10)
        admit(ledger, range(10))
        flush = asyncio.create_task(ledger.flush())
        await asyncio.sleep(0)
        go_on.set()
        await flush
        assert len(read(path)[1]) == 10

    async def test_it_is_read_while_it_is_written(self, path: Path, open_store: Open) -> None:
        ledger = Ledger(open_store())
        admit(ledger, range(10))
        await ledger.flush()
        with read_ledger(path) as reader:
            admit(ledger, range(10, 20))
            await ledger.flush()
            assert len(list(reader.events())) == 10, "a reader sees one moment"
        assert len(read(path)[1]) == 20

    async def test_nobody_else_can_read_it(self, path: Path, open_store: Open) -> None:
        before = os.umask(0)
        try:
            ledger = Ledger(open_store())
            admit(ledger, range(10))
            await ledger.flush()
        finally:
            os.umask(before)
        files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert files == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}

    async def test_a_run_that_has_ended_leaves_one_file(self, path: Path, open_store: Open) -> None:
        ledger = Ledger(open_store())
        admit(ledger, range(10))
        ledger.close()
        assert [file.name for file in path.parent.iterdir()] == ["ledger.db"]
        ledger.close()
        await ledger.flush()
        with read_ledger(path) as reader:
            assert len(list(reader.events())) == 10
            assert [file.name for file in path.parent.iterdir()] == ["ledger.db"], "also in a folder that is read-only"

    async def test_a_reader_does_not_hold_up_the_end(self, path: Path, open_store: Open) -> None:
        ledger = Ledger(open_store())
        admit(ledger, range(10))
        await ledger.flush()
        with read_ledger(path) as reader:
            ledger.finished((0, 0), 0, [1.0])
            ledger.close()
            assert len(list(reader.events())) == 10
        lives, events = read(path)
        assert (len(events), lives[0].ended_at is None) == (11, False)


class TestLives:
    async def test_what_came_after_the_checkpoint_is_undone(self, path: Path, open_store: Open) -> None:
        first = Ledger(open_store())
        admit(first, range(3))
        state = first.state()
        admit(first, range(3, 5))
        first.close()
        second = Ledger(open_store(resumed_at=state["position"]))
        second.restore(state)
        for row in range(3):
            second.requeue((0, row), 3 + row, version=1)
        second.admit((0, 3), 6, version=1)
        second.close()
        lives, events = read(path)
        assert [(life.life, life.resumed_from, life.stands_until < 100) for life in lives] == [
            (0, 0, True),
            (1, 3, False),
        ]
        assert lives[0].stands_until == 3
        assert [event.undone for event in events] == [False] * 3 + [True] * 2 + [False] * 4
        assert [event.state for event in events][5:] == ["restarted"] * 3 + ["admitted"]
        assert [event.id for event in events] == list(range(1, 10)), "numbers go on over what is undone"
        assert [(life.pid, life.ended_at is not None) for life in lives] == [(os.getpid(), True)] * 2

    async def test_going_on_from_what_had_been_undone(self, path: Path, open_store: Open) -> None:
        """A checkpoint of life 0 that life 1 had set aside: life 1 is no part of the run any more."""
        first = Ledger(open_store())
        admit(first, range(2))
        early = first.state()
        admit(first, range(2, 4))
        late = first.state()
        first.close()
        second = Ledger(open_store(resumed_at=early["position"]))
        second.restore(early)
        second.admit((0, 2), 2, version=0)
        second.close()
        third = Ledger(open_store(resumed_at=late["position"]))
        third.restore(late)
        third.requeue((0, 3), 4, version=0)
        third.close()
        lives, events = read(path)
        assert [event.undone for event in events] == [False] * 4 + [True, False]
        assert [life.stands_until for life in lives][:2] == [4, 0]

    async def test_a_new_start_undoes_everything(self, path: Path, open_store: Open) -> None:
        for resumed_at in (None, 0, None):
            ledger = Ledger(open_store(resumed_at=resumed_at))
            assert ledger.state()["position"] == 0
            admit(ledger, range(2))
            ledger.close()
        assert [event.undone for event in read(path)[1]] == [True] * 4 + [False] * 2

    def test_a_checkpoint_behind_the_end_of_the_file(self, path: Path, open_store: Open) -> None:
        ledger = Ledger(open_store())
        admit(ledger, range(5))
        ledger.close()
        with pytest.raises(CheckpointError, match=r"made at event 6 .* ends at event 5.*earlier checkpoint"):
            open_store(resumed_at=6)
        assert len(read(path)[0]) == 1, "a life that could not begin is none"
        path.unlink()
        with pytest.raises(CheckpointError, match="ends at event 0"):
            open_store(resumed_at=5)

    async def test_what_a_life_is_held_to(self, path: Path, open_store: Open) -> None:
        config = Config(model="none", prompt_groups_per_step=3, data={"epochs": 2, "max_rows": 7}, max_steps=9)
        open_store(bounds=Bounds.of(config, rows=100))
        config = Config(model="none", staleness={"policy": "pace"})
        open_store(bounds=Bounds.of(config, rows=100))
        assert [life.bounds for life in read(path)[0]] == [
            Bounds(3, 4, 7, 2, 9),
            Bounds(config.prompt_groups_per_step, None, 100, 1, None),
        ]


class TestOtherFiles:
    def test_there_is_none(self, path: Path) -> None:
        with pytest.raises(DataError, match="there is no ledger"), read_ledger(path):
            pass

    def test_a_text_file(self, path: Path, open_store: Open) -> None:
        path.write_text("epoch,row\n" * 100)
        with pytest.raises(DataError, match=r"is no ledger: file is not a database.*another run_dir"):
            open_store()
        with pytest.raises(DataError, match="cannot be read: file is not a database"), read_ledger(path):
            pass
        assert path.read_text().startswith("epoch,row")

    def test_the_database_of_something_else(self, path: Path, open_store: Open) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE events (id)")
        with pytest.raises(DataError, match="not a ledger of asyncrl"):
            open_store()
        with pytest.raises(DataError, match="not a ledger of asyncrl"), read_ledger(path):
            pass

    def test_a_ledger_of_a_newer_asyncrl(self, path: Path, open_store: Open) -> None:
        open_store().close()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version = {ledger_file.FORMAT + 1}")
        with pytest.raises(DataError, match=r"written by a newer asyncrl.*Upgrade"):
            open_store()
        with pytest.raises(DataError, match="written by a newer asyncrl"), read_ledger(path):
            pass

    def test_a_file_that_was_made_and_not_begun(self, path: Path, open_store: Open) -> None:
        """A process that was killed at the worst moment."""
        path.touch()
        with pytest.raises(DataError, match="is empty"), read_ledger(path):
            pass
        assert open_store().life == 0

    def test_a_folder_that_is_not_there(self, path: Path) -> None:
        with pytest.raises(EngineError, match="cannot be written"):
            LedgerStore.open(path, resumed_at=None)


class TestWhatCannotBeWritten:
    """`store._connection` is the thread's: it is only touched here while the thread sleeps, before anything waits."""

    async def test_a_full_disk(self, path: Path, open_store: Open) -> None:
        store = open_store()
        ledger = Ledger(store)
        admit(ledger, range(5))
        await ledger.flush()
        store._connection.execute("PRAGMA max_page_count = 8")
        admit(ledger, range(5, 3000))
        with pytest.raises(EngineError, match=r"ledger.db cannot be written: database or disk is full. Make room"):
            await ledger.flush()
        for call in (lambda: ledger.admit((1, 0), 9, 0), lambda: ledger.filtered((0, 0)), ledger.close):
            with pytest.raises(EngineError, match="disk is full"):
                call()
        ledger.close()
        lives, events = read(path)
        assert len(events) == 5, "a transaction is there whole, or not at all"
        assert lives[0].ended_at is None

    @pytest.mark.parametrize("replaced", [False, True])
    async def test_the_file_is_taken_away(self, path: Path, open_store: Open, replaced: bool) -> None:
        ledger = Ledger(open_store())
        admit(ledger, range(5))
        await ledger.flush()
        take_away(path, replaced)
        admit(ledger, range(5, 10))
        with pytest.raises(EngineError, match="it was removed" if not replaced else "removed or replaced"):
            await ledger.flush()
        with pytest.raises(EngineError, match="see what became of the run folder"):
            ledger.close()

    async def test_the_next_call_tells_without_a_flush(self, path: Path, open_store: Open) -> None:
        ledger = Ledger(open_store())
        take_away(path, replaced=False)
        with pytest.raises(EngineError, match="it was removed"):
            await self.admit_for_ever(ledger)

    async def admit_for_ever(self, ledger: Ledger) -> None:
        for row in itertools.count():
            admit(ledger, range(row, row + 1))
            await asyncio.sleep(0.01)

    async def test_a_disk_that_stands_still(
        self, path: Path, open_store: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another process holds the file: as long as that lasts, nothing is written, and SQLite waits."""
        store = open_store()
        monkeypatch.setattr(ledger_file, "MANY_WAITING", 1000)
        monkeypatch.setattr(ledger_file, "DISK_LIMIT_S", 0.3)
        ledger = Ledger(store)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            admit(ledger, range(1))
            with pytest.raises(EngineError, match="the disk does not take the ledger"):
                await ledger.flush()
            with pytest.raises(EngineError, match=r"1,000 events wait for .*ledger\.db"):
                admit(ledger, range(1, 2000))
            with pytest.raises(EngineError, match="the disk does not take the ledger"):
                ledger.close()
            other.execute("ROLLBACK")
        store._thread.join(10)
        assert [event.row for event in read(path)[1]] == list(range(1001))


WRITER = """
import asyncio, sys
from pathlib import Path
from asyncrl.storage.ledger import Ledger
from asyncrl.storage.ledger_file import LedgerStore

async def main():
    ledger = Ledger(LedgerStore.open(Path(sys.argv[1]), resumed_at=None))
    row = 0
    while True:
        for row in range(row, row + 50):
            ledger.admit((0, row), row, 0)
            ledger.finished((0, row), 0, [0.0, 1.0])
        row += 1
        if row % 400 == 0:
            await ledger.flush()
            print(ledger.position, flush=True)
        await asyncio.sleep(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("flushes", [1, 4, 9])
def test_kill_9_leaves_all_that_was_flushed(path: Path, flushes: int) -> None:
    path.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        flushed = 0
        for _ in range(flushes):
            flushed = int(writer.stdout.readline())
        time.sleep(0.01 * flushes)
        writer.kill()
        flushed = max([flushed, *(int(line) for line in writer.stdout.read().splitlines() if line)])
    with read_ledger(path) as reader:
        account = Account(reader.lives())
        account.read(reader.events())
    assert account.conclude(data_ended=False) == []
    assert account.last >= flushed > 0
    assert account.lives[0].ended_at is None
    LedgerStore.open(path, resumed_at=flushed).close()
    assert sum(not event.undone for event in read(path)[1]) == flushed
