"""What was trained on, in the order in which it was: enough to train again (`asyncrl replay`).

    RUN/samples/life-0.bin      frames (packing.py): first what this life was, then one for each optimizer step
    RUN/samples/life-1.bin      a resume begins a new file; what it takes back stays in the old one

Encoding a step takes longer than the event loop may stand still, so a thread does it; `write` only hands it over.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, BinaryIO

import structlog

from asyncrl.errors import DataError, EngineError
from asyncrl.private import private
from asyncrl.storage.groups import columns_of, decode_groups, encode_groups, groups_of
from asyncrl.storage.packing import HEAD, Facts, Torn, pack, read_columns, read_facts
from asyncrl.types import Group

__all__ = ["Record", "Recording", "SampleRecorder", "decode_groups", "encode_groups", "read_samples"]

NAME = re.compile(r"life-(\d+)\.bin")
MOST_WAITING = 32
"""Steps that may wait for the disk. Each holds its samples in memory."""
DISK_LIMIT_S = 60.0
"""Longest time that a flush or the end of a run waits for the disk."""


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Step:
    step: int
    chunks: Sequence[Sequence[Group]]
    failed: str | None


class SampleRecorder:
    """Owns the file of one life, and the thread that writes it.

    A write that fails (a full disk) is told by every call that follows.
    """

    def __init__(self, folder: Path, *, after_step: int, settings: Mapping[str, Any]) -> None:
        """This life goes on after `after_step`: what was recorded of later steps is undone.

        `settings`: what else the trainer of this life was made from, as JSON holds it.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        number = max((number for number, _ in _files(folder)), default=-1) + 1
        self.path = folder / f"life-{number}.bin"
        self._file = _create(self.path)
        self._file.write(pack({"after_step": after_step, "settings": settings}, {}))
        self._file.flush()
        self._jobs: SimpleQueue[_Step | Future[None] | None] = SimpleQueue()
        self._failure: Exception | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="asyncrl samples", daemon=True)
        self._thread.start()

    def write(self, step: int, chunks: Sequence[Sequence[Group]], *, failed: str | None = None) -> None:
        """Take what optimizer step `step` was given: the groups of each `forward_backward`. They must not change any
        more. `failed`: why the step was given up. Returns at once.

        Raises:
            EngineError: an earlier one could not be written, or the disk has stood still for too long.
        """
        assert not self._closed, "the recorder is closed"
        if self._failure is not None:
            raise self._cannot_write()
        if self._jobs.qsize() >= MOST_WAITING:
            raise self._stands_still()
        self._jobs.put(_Step(step, [list(chunk) for chunk in chunks], failed))

    async def flush(self) -> None:
        """Return when everything that was taken is on the disk.

        Raises:
            EngineError: it could not be written, or not within `DISK_LIMIT_S`.
        """
        if self._closed:
            return
        written: Future[None] = Future()
        written.set_running_or_notify_cancel()  # whoever gives up waiting must not cancel it
        self._jobs.put(written)
        if self._failure is not None:  # only now: until it is set, the thread answers whoever asks
            raise self._cannot_write()
        try:
            async with asyncio.timeout(DISK_LIMIT_S):
                await asyncio.wrap_future(written)
        except TimeoutError:
            raise self._stands_still() from None
        if self._failure is not None:
            raise self._cannot_write()

    def close(self) -> None:
        """Write the rest. Blocks until it is on the disk.

        Raises:
            EngineError: as `flush`.
        """
        if self._closed:
            return
        self._closed = True
        self._jobs.put(None)
        self._thread.join(DISK_LIMIT_S)
        if self._thread.is_alive():
            raise self._stands_still()
        if self._failure is not None:
            raise self._cannot_write()

    def _run(self) -> None:
        try:
            with self._file as file:
                while (job := self._jobs.get()) is not None:
                    if isinstance(job, _Step):
                        file.write(_frame(job))
                        file.flush()
                    else:
                        os.fsync(file.fileno())
                        job.set_result(None)
                    del job  # an idle thread must not keep the last step alive
                os.fsync(file.fileno())
        except Exception as error:  # whatever ends this thread must be told
            self._failure = error
            if isinstance(job, Future):
                job.set_result(None)
            for waiting in _taken(self._jobs):
                if isinstance(waiting, Future):
                    waiting.set_result(None)

    def _cannot_write(self) -> EngineError:
        error = self._failure
        reason = error.strerror or error if isinstance(error, OSError) else repr(error)
        return EngineError(
            f"what is trained on cannot be recorded in {self.path}: {reason}. Make room, or mend the disk, and resume "
            "the run; with record_samples=false nothing is recorded, and the run cannot be replayed."
        )

    def _stands_still(self) -> EngineError:
        return EngineError(
            f"the disk does not take what is trained on: {self._jobs.qsize()} steps wait for {self.path}. Look at the "
            "disk (or the network behind it), then resume the run; with record_samples=false nothing is recorded."
        )


def _create(path: Path) -> BinaryIO:
    return open(path, "xb", opener=private)


def _frame(job: _Step) -> bytes:
    sizes = [len(chunk) for chunk in job.chunks]
    facts = {"step": job.step, "failed": job.failed, "chunks": sizes}
    return pack(facts, columns_of(chain.from_iterable(job.chunks)))


def _taken(jobs: SimpleQueue[Any]) -> Iterator[Any]:
    try:
        while True:
            yield jobs.get_nowait()
    except Empty:
        return


@dataclass(frozen=True, slots=True)
class Recording:
    """What one life of a run recorded."""

    path: Path
    after_step: int
    """Optimizer steps behind the weights that it began with."""
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """What one optimizer step was given."""

    recording: Recording
    step: int
    """Its number, from 1."""
    failed: str | None
    """Why it was given up: its weights are those of the step before. None: it was taken."""
    _position: int
    _facts: Facts

    def chunks(self) -> list[list[Group]]:
        """The groups of each `forward_backward`, in their order. Reads the file.

        Raises:
            DataError: it is damaged.
        """
        path = self.recording.path
        with path.open("rb") as file:
            file.seek(self._position + self._facts.start)
            body = file.read(self._facts.columns_bytes)
        try:
            groups = iter(groups_of(read_columns(self._facts, body)))
        except DataError as error:
            raise DataError(
                f"{path}: what step {self.step} was given cannot be read: {error} The file was changed, or its disk is "
                "failing. Replay later steps from a checkpoint: --from step-..."
            ) from None
        return [[next(groups) for _ in range(size)] for size in self._facts.own["chunks"]]


def read_samples(folder: Path) -> list[Record]:
    """All steps that the run stands on, those that were given up too, in their order. What is still being written, or
    was cut off by the end of the process, is left out.

    Raises:
        DataError: there are none.
    """
    found: list[Record] = []
    for _, path in sorted(_files(folder)) if folder.is_dir() else ():
        frames = _frames(path)
        _, first = next(frames, (0, None))
        if first is None:
            continue  # the process ended before it had begun
        recording = Recording(path, first.own["after_step"], first.own["settings"])
        found = [record for record in found if record.step <= recording.after_step]
        found += [
            Record(recording, facts.own["step"], facts.own["failed"], position, facts) for position, facts in frames
        ]
    if not found:
        raise DataError(
            f"{folder} holds no recorded samples. A run writes them after each step, unless it has "
            "record_samples = false."
        )
    return found


def _frames(path: Path) -> Iterator[tuple[int, Facts]]:
    """Where each whole frame begins, and its facts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        position = 0
        while position < size:
            file.seek(position)
            try:
                facts = _facts_at(file)
            except Torn:
                return
            except DataError as error:  # a power cut can leave anything behind what was synced
                log.warning("the rest of a file of samples cannot be read", path=str(path), at=position, why=str(error))
                return
            if position + facts.frame_bytes > size:
                return
            yield position, facts
            position += facts.frame_bytes


def _facts_at(file: IO[bytes]) -> Facts:
    head = file.read(HEAD.size)
    if len(head) == HEAD.size:
        head += file.read(HEAD.unpack(head)[1])
    return read_facts(head)


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    """The number of each life, and its file."""
    for path in folder.iterdir():
        if match := NAME.fullmatch(path.name):
            yield int(match[1]), path
