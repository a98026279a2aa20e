"""The ledger's file: every event of every life of a run, in SQLite.

    lives     one row per process that worked on the run, and the event that it went on from
    events    one row per change of a draw; the columns of `Event`
    lineage   the lives that the newest one stands on, each up to the event that the next went on from
    history   events, and whether they are undone: no part of the lineage

Nothing is ever changed or removed: what a resume takes back is undone because of the new life's row alone. The
event loop appends to a deque, and a thread writes what has gathered in one transaction. A transaction is synced to the
disk before it counts as written, so that neither kill -9 nor a power cut leaves more than a missing tail.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from asyncrl.config import Config
from asyncrl.errors import CheckpointError, DataError, EngineError
from asyncrl.storage.checkpoints import sync
from asyncrl.storage.ledger import Entry

APPLICATION_ID = 0x41524C4C
"""In the header of the file: an SQLite file without it is not ours."""
FORMAT = 1
NO_END = 2**62
EVENTS = ("id", "time", "life", "epoch", "row", "sequence", "state", "version", "step", "rewards", "reason")
SCHEMA = f"""
CREATE TABLE lives (
    life INTEGER PRIMARY KEY, started_at REAL NOT NULL, ended_at REAL, pid INTEGER NOT NULL,
    resumed_from INTEGER NOT NULL, bounds TEXT
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, time REAL NOT NULL, life INTEGER NOT NULL, epoch INTEGER NOT NULL, row INTEGER NOT NULL,
    sequence INTEGER NOT NULL, state TEXT NOT NULL, version INTEGER, step INTEGER, rewards TEXT, reason TEXT
);
CREATE VIEW lineage AS WITH RECURSIVE stands (life, last) AS (
    SELECT max(life), {NO_END} FROM lives
    UNION ALL
    SELECT events.life, lives.resumed_from FROM stands
        JOIN lives ON lives.life = stands.life JOIN events ON events.id = lives.resumed_from
) SELECT * FROM stands;
CREATE VIEW history AS SELECT {", ".join(f"events.{name}" for name in EVENTS)}, events.id > coalesce(last, 0) AS undone
    FROM events LEFT JOIN lineage ON lineage.life = events.life;
"""

WRITE_EVERY_S = 0.25
"""Short for whoever reads along, long against the sync that each transaction costs."""
MANY_WAITING, MOST_WAITING = 10_000, 1_000_000
"""Events that wait for the disk. From the first number on it must have taken some lately; over the second, which is
300 MB, it is too slow for the run."""
CHUNK = 512
"""Events of one statement. Binding them holds the interpreter lock for some 0.2 ms; writing them does not hold it."""
DISK_LIMIT_S = 60.0
"""Longest time that the disk may take nothing while many events, a flush or the end of a run wait for it."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a life of a run was held to, for the audit."""

    groups_per_step: int
    max_staleness: int | None
    """None: not a hard bound."""
    rows: int
    """Of the dataset, after `data.max_rows`."""
    epochs: int
    max_steps: int | None

    @classmethod
    def of(cls, config: Config, rows: int) -> Bounds:
        """Of a run of `config` over a dataset of `rows` rows."""
        hard = config.staleness.policy == "wait"
        return cls(
            groups_per_step=config.prompt_groups_per_step,
            max_staleness=config.staleness.max_staleness if hard else None,
            rows=min(rows, config.data.max_rows or rows),
            epochs=config.data.epochs,
            max_steps=config.max_steps,
        )


@dataclass(frozen=True, slots=True)
class Life:
    """One process that worked on the run."""

    life: int
    started_at: float
    """s since 1970."""
    ended_at: float | None
    """None: it is running, or was killed."""
    pid: int
    resumed_from: int
    """The event that it went on from. 0: it began at the start."""
    stands_until: int
    """The last of its events that may be in the lineage, as if it had gone on for ever where it is the newest life. 0:
    all that it did is undone."""
    bounds: Bounds | None


class Event(NamedTuple):
    """One change of one draw."""

    id: int
    """1, 2, ... over all lives."""
    time: float
    """s since 1970."""
    life: int
    epoch: int
    row: int
    sequence: int
    """Place in the order of admission."""
    state: str
    """`admitted`, `requeued`, `restarted`, `finished`, `trained`, `filtered` or `rejected`."""
    version: int | None
    """The weights that were live when the group began."""
    step: int | None
    """That trained it."""
    rewards: str | None
    """One per member, a JSON list."""
    reason: str | None
    undone: bool = False
    """It is not part of what the run stands on."""

    @property
    def draw(self) -> str:
        return f"row {self.row} of epoch {self.epoch}"


class LedgerStore:
    """Owns the file while a life lasts, and the thread that writes it. Made by `open`.

    A write that fails (a full disk, a file that was taken away) is told by every call that follows.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, life: int, position: int) -> None:
        self.path = path
        self.life = life
        self.position = position
        self._connection = connection
        self._identity = _identity(path)
        self._waiting: deque[Entry] = deque()
        self._flushes: deque[Future[None]] = deque()
        self._hurry = threading.Event()
        self._closing = False
        self._written_at = time.monotonic()
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="asyncrl ledger", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, *, resumed_at: int | None, bounds: Bounds | None = None) -> LedgerStore:
        """Begin a life. It goes on from event `resumed_at` of the lives before; 0 or None: from the start.

        Raises:
            CheckpointError: the file does not reach to `resumed_at`.
            DataError: the file is no ledger, or one of a newer asyncrl.
            EngineError: the file cannot be made or written.
        """
        resumed_from = resumed_at or 0
        with ExitStack() as undo:
            try:
                connection = _connect_to_write(path)
                undo.callback(connection.close)
                _lay_out(connection, path)
                life, position = _begin_life(connection, path, resumed_from, bounds)
                sync(path.parent)
            except (sqlite3.Error, OSError) as error:
                raise _cannot_write(path, _reason(error)) from error
            undo.pop_all()
        return cls(path, connection, life, position)

    def write(self, entry: Entry) -> None:
        """Take an event. Returns at once.

        Raises:
            EngineError: an earlier one could not be written, or the disk has stood still for too long.
        """
        assert not self._closing, "the ledger is closed"
        if self._failure is not None or len(self._waiting) >= MANY_WAITING:
            self._look()
        self._waiting.append(entry)

    async def flush(self) -> None:
        """Return when everything that was taken is on the disk.

        Raises:
            EngineError: it could not be written, or not within `DISK_LIMIT_S`.
        """
        written: Future[None] = Future()
        self._flushes.append(written)
        self._hurry.set()
        if self._failure is not None:  # only now: until it is set, the thread answers whoever asks
            raise _cannot_write(self.path, self._failure)
        if self._closing:
            return
        try:
            async with asyncio.timeout(DISK_LIMIT_S):
                await asyncio.wrap_future(written)
        except TimeoutError:
            raise self._stands_still() from None
        except sqlite3.Error as error:
            raise _cannot_write(self.path, str(error)) from None

    def close(self) -> None:
        """Write the rest and end the life. Blocks until it is on the disk: little is left after a `flush`.

        Raises:
            EngineError: as `flush`.
        """
        if self._closing:
            return
        self._closing = True
        self._hurry.set()
        self._thread.join(DISK_LIMIT_S)
        if self._thread.is_alive():
            raise self._stands_still()
        if self._failure is not None:
            raise _cannot_write(self.path, self._failure)

    def _look(self) -> None:
        """Raises `EngineError` where nothing more may be handed over."""
        if self._failure is not None:
            raise _cannot_write(self.path, self._failure)
        if len(self._waiting) >= MOST_WAITING or time.monotonic() - self._written_at > DISK_LIMIT_S:
            raise self._stands_still()

    def _stands_still(self) -> EngineError:
        return EngineError(
            f"the disk does not take the ledger: {len(self._waiting):,} events wait for {self.path}, and nothing is "
            "written. Look at the disk (or the network behind it), then resume the run from its last checkpoint."
        )

    # The thread

    def _run(self) -> None:
        asked: list[Future[None]] = []
        try:
            while True:
                self._hurry.wait(WRITE_EVERY_S)
                self._hurry.clear()
                last = self._closing  # before the deque is emptied: nothing is handed over after it
                asked = _taken(self._flushes)
                self._write(_taken(self._waiting), last=last)
                self._written_at = time.monotonic()
                _answer(asked, None)
                if last:
                    break
        except Exception as error:  # whatever ends this thread must be told
            self._failure = _reason(error)
            _answer([*asked, *_taken(self._flushes)], sqlite3.OperationalError(self._failure))
        finally:
            with suppress(sqlite3.Error):  # the transaction that failed is rolled back
                self._connection.close()

    def _write(self, entries: list[Entry], *, last: bool) -> None:
        if _identity(self.path) != self._identity:  # SQLite would go on writing what nobody can open any more
            raise FileNotFoundError("it was removed or replaced while the run went on")
        if entries or last:
            self._connection.execute("BEGIN IMMEDIATE")
            rest = iter(entries)
            size = min(CHUNK, self._connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER) // len(EVENTS))
            while chunk := tuple(islice(rest, size)):
                places = ",".join(["(?,?,?,?,?,?,?,?,?,?,?)"] * len(chunk))
                # One statement for all: the lock is given up once per statement, and hard to get back from a busy loop.
                self._connection.execute(
                    f"INSERT INTO events VALUES {places}", tuple(chain.from_iterable(map(_row, chunk)))
                )
            if last:
                self._connection.execute("UPDATE lives SET ended_at = ? WHERE life = ?", (time.time(), self.life))
            self._connection.execute("COMMIT")
        if last:
            with suppress(sqlite3.OperationalError):  # somebody reads it just now: all is written, in two files
                self._connection.execute("PRAGMA journal_mode = DELETE")


class LedgerReader:
    """A ledger as it stood at one moment, also while a run writes it."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def lives(self) -> list[Life]:
        found = self._connection.execute(
            "SELECT life, started_at, ended_at, pid, resumed_from, coalesce(last, 0), bounds "
            "FROM lives LEFT JOIN lineage USING (life) ORDER BY life"
        )
        return [
            Life(life, started_at, ended_at, pid, since, until, Bounds(**json.loads(bounds)) if bounds else None)
            for life, started_at, ended_at, pid, since, until, bounds in found
        ]

    def events(self, row: int | None = None) -> Iterator[Event]:
        """In the order in which they happened, undone ones too; those of all rows, or of one."""
        where, values = ("", ()) if row is None else ("WHERE row = ?", (row,))
        return map(Event._make, self._connection.execute(f"SELECT * FROM history {where} ORDER BY id", values))

    def counts(self) -> dict[str, int]:
        """How many events of the lineage there are of each state."""
        return dict(self._connection.execute("SELECT state, count(*) FROM history WHERE NOT undone GROUP BY state"))

    def trained_in(self) -> dict[int, int]:
        """The optimizer step that trained each group of the lineage, by its place in the order of admission."""
        where = "WHERE NOT undone AND state = 'trained'"
        return dict(self._connection.execute(f"SELECT sequence, step FROM history {where}"))

    def some_draws(self, one_in: int) -> Iterator[Event]:
        """The events of the lineage of one draw in `one_in`, always the same ones, chosen without regard to the order
        of the data."""
        chosen = f"((row + epoch * 1000003) * 2654435761 & 4294967295) >> 8 & 65535 < {65536 / one_in}"
        where = f"WHERE NOT undone AND {chosen} ORDER BY id"
        return map(Event._make, self._connection.execute(f"SELECT * FROM history {where}"))


@contextmanager
def read_ledger(path: Path) -> Iterator[LedgerReader]:
    """Open a ledger to read it.

    Raises:
        DataError: there is none, it is another file, damaged, or of a newer asyncrl.
    """
    if not path.is_file():
        raise DataError(f"there is no ledger {path}. A run writes it from its first prompt on.")
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as connection:
            connection.isolation_level = None
            connection.execute("BEGIN")
            if _is_empty(connection):
                raise DataError(f"the ledger {path} is empty: its run ended before it had begun.")
            _require_ours(connection, path)
            yield LedgerReader(connection)
    except sqlite3.Error as error:
        raise DataError(f"{path} cannot be read: {error}. Expected the ledger of a run, an SQLite file.") from None


def _connect_to_write(path: Path) -> sqlite3.Connection:
    """Only the user who started the run can read the file; SQLite gives its companions the same permissions."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return sqlite3.connect(path, DISK_LIMIT_S, isolation_level=None, check_same_thread=False)


def _lay_out(connection: sqlite3.Connection, path: Path) -> None:
    try:
        if not (new := _is_empty(connection)):
            _require_ours(connection, path)
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:  # not SQLite's format, or damaged
        raise DataError(f"{path} is no ledger: {error}. Move it away, or choose another run_dir.") from None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    if new:
        connection.executescript(
            f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; {SCHEMA} COMMIT;"
        )


def _is_empty(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) = 0 FROM sqlite_master").fetchone()[0])


def _require_ours(connection: sqlite3.Connection, path: Path) -> None:
    found, version = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
    if found != APPLICATION_ID:
        raise DataError(f"{path} is an SQLite file, but not a ledger of asyncrl. Move it away, or choose another run.")
    if version > FORMAT:
        raise DataError(
            f"{path} was written by a newer asyncrl: its format is {version}, and this one reads up to {FORMAT}. "
            "Upgrade asyncrl."
        )


def _begin_life(
    connection: sqlite3.Connection, path: Path, resumed_from: int, bounds: Bounds | None
) -> tuple[int, int]:
    """Returns the number of the new life, and that of the last event before it."""
    connection.execute("BEGIN IMMEDIATE")
    last = connection.execute("SELECT coalesce(max(id), 0) FROM events").fetchone()[0]
    life = connection.execute("SELECT coalesce(max(life) + 1, 0) FROM lives").fetchone()[0]
    if resumed_from > last:
        raise CheckpointError(
            f"the checkpoint was made at event {resumed_from} of the ledger, but {path} ends at event {last}: it is "
            "not the ledger of that run, or has lost its end. Put the right one there, resume from an earlier "
            "checkpoint, or start a new run from the weights (checkpoint.init_from)."
        )
    described = json.dumps(asdict(bounds)) if bounds is not None else None
    values = (life, time.time(), None, os.getpid(), resumed_from, described)
    connection.execute("INSERT INTO lives VALUES (?, ?, ?, ?, ?, ?)", values)
    connection.execute("COMMIT")
    return life, last


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return "it was removed" if isinstance(error, FileNotFoundError) else str(error.strerror)
    return str(error)


def _cannot_write(path: Path, reason: str) -> EngineError:
    return EngineError(
        f"the ledger {path} cannot be written: {reason}. Make room, or see what became of the run folder; a run goes "
        "on from its last checkpoint with resume=True."
    )


def _row(entry: Entry) -> tuple[object, ...]:
    """As SQLite takes it."""
    *others, rewards, reason = entry
    return (*others, None if rewards is None else json.dumps(rewards), reason)


def _taken(waiting: deque[Entry] | deque[Future[None]]) -> list:  # type: ignore[type-arg]
    """What is in it now. Others may append meanwhile."""
    return [waiting.popleft() for _ in range(len(waiting))]


def _answer(asked: Iterable[Future[None]], error: Exception | None) -> None:
    for written in asked:
        if not written.set_running_or_notify_cancel():
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)
