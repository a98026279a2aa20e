"""Checkpoints while a run goes on: when one is due, and how it comes to the disk without training waiting for it.

    consumes    a `RunState`, and the trainer's snapshot
    produces    folders (storage/checkpoints.py)
    waits for   the copy of the weights, and nothing else; the disk has `timeout_s`
    woken by    the engine after a step; the end of the run

A disk that is full costs a warning and that checkpoint; the last good one stays, and the next is tried when it is due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import structlog

from asyncrl.config import CheckpointConfig
from asyncrl.errors import CheckpointError, DataError, EngineError
from asyncrl.metrics.jsonl import encode
from asyncrl.run_state import RunState
from asyncrl.storage.checkpoints import Checkpoint, Checkpoints, write_file
from asyncrl.storage.samples import decode_groups, encode_groups
from asyncrl.storage.timeline import Timeline
from asyncrl.types import Trainer
from asyncrl.workers import Threads

T = TypeVar("T")
Reason = Literal["interval", "final", "failure"]

LEAST_S = 60.0
SHARE = 0.01
"""Where no interval is set: at most once in `LEAST_S`, and at most this share of the time is spent standing still."""

log = structlog.get_logger(__name__)


def is_due(config: CheckpointConfig, step: int, since_s: float, cost_s: float) -> bool:
    """Whether `step` is one to save: `since_s` after the last checkpoint, for which training stood still `cost_s`."""
    if config.interval is None:
        return since_s >= max(LEAST_S, cost_s / SHARE)
    return config.interval > 0 and step % config.interval == 0


@dataclass(slots=True)
class Checkpointer:
    """Owns the checkpoint that is being written."""

    folder: Checkpoints
    trainer: Trainer
    config: CheckpointConfig
    every_steps: int
    """Only multiples of it are saved: steps whose weights are the sampler's too (`publish.weight_sync_interval`)."""
    flush: Callable[[], Awaitable[None]]
    """Brings the ledger to the disk."""
    about: Callable[[], Mapping[str, Any]]
    """What else `state.json` holds: the data, the evaluations."""
    life: int
    say: Callable[[str], None]
    last: Checkpoint | None = None
    """The newest that is whole."""
    timeline: Timeline | None = None
    cost_s: float = 0.0
    """How long training stood still for the last one."""
    _waiting: int = 0
    """Finished groups in the last one."""
    _due: bool = False
    _last_at: float = field(default_factory=time.monotonic)
    _began_at: float = 0.0
    _task: asyncio.Task[None] | None = None
    _threads: Threads = field(default_factory=lambda: Threads(1))

    def due(self, step: int) -> bool:
        """Whether to save after `step`."""
        since_s = time.monotonic() - self._last_at
        if self.config.interval is None:
            late = time.monotonic() - self._began_at > self.config.timeout_s  # then `save` says so
            self._due = is_due(self.config, step, since_s, self.cost_s) and (late or not self._writes)
        else:
            self._due |= is_due(self.config, step, since_s, self.cost_s)
        return self._due and step % self.every_steps == 0

    @property
    def _writes(self) -> bool:
        return self._task is not None and not self._task.done()

    async def save(self, state: RunState, reason: Reason = "interval") -> None:
        """Returns when the trainer may go on; the rest comes to the disk meanwhile.

        Where the one before is still being written, it is waited for: the steps are named, and `keep_every` counts on
        them. Where they are not, none is `due` meanwhile.

        Raises:
            EngineError: the one before did not come to the disk within `checkpoint.timeout_s`.
        """
        await self.written()
        self._due = False
        self._began_at = self._last_at = time.monotonic()
        about = {**self.about(), "life": self.life}  # as it is now, not when the disk is done
        try:
            unfinished = await self._on_disk(self.folder.begin, state.step)
            written = await self.trainer.save_state(unfinished / "trainer")
        except OSError as error:
            self._given_up(state.step, error)
            return
        self.cost_s = time.monotonic() - self._began_at
        self._task = asyncio.create_task(
            self._write(state, about, unfinished, written, reason), name=f"asyncrl checkpoint of step {state.step}"
        )

    async def finish(self, state: RunState, reason: Reason) -> None:
        """The last one of this life. Returns when it is on the disk; where there is one already that knows as much, it
        is that one.

        Raises:
            EngineError: as `save`.
        """
        await self.written()
        if self.last is None or self.last.step != state.step or len(state.groups) > self._waiting:
            await self.save(state, reason)
            await self.written()

    def raise_failure(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()

    async def written(self) -> None:
        """Wait for the one that is being written.

        Raises:
            EngineError: it did not come to the disk within `checkpoint.timeout_s`.
        """
        if self._task is None:
            return
        left_s = max(0.0, self._began_at + self.config.timeout_s - time.monotonic())
        done, _ = await asyncio.wait([self._task], timeout=left_s)
        if not done:  # it stays the one that is written: nothing else can be, and each wait for it ends here
            raise too_slow(self.folder, self.config)
        self._task.result()

    async def _write(
        self,
        state: RunState,
        about: Mapping[str, Any],
        unfinished: Path,
        written: Awaitable[None],
        reason: Reason,
    ) -> None:
        try:
            await self._on_disk(_write_loop, state, about, unfinished)
            await written
            await self.flush()
            entry = {
                "reason": reason,
                "life": self.life,
                "groups_waiting": len(state.groups),
                "ledger_position": state.loop["ledger"]["position"],
            }
            self.last = await self._on_disk(commit, self.folder, self.config, state.step, entry)
            self._waiting = len(state.groups)
        except OSError as error:
            self._given_up(state.step, error)
        else:
            self._tell(state.step, time.monotonic() - self._began_at)

    def _tell(self, step: int, seconds: float) -> None:
        log.info("checkpoint", step=step, seconds=round(seconds, 3), stood_still_s=round(self.cost_s, 4))
        if self.timeline is not None:
            now = asyncio.get_running_loop().time()
            self.timeline.span("checkpoint", f"checkpoint of {step}", now - seconds, now, step=step)

    async def _on_disk(self, call: Callable[..., T], *arguments: Any) -> T:
        """In a daemon thread: a disk that never answers does not hold up the end of the process either."""
        outcome = await self._threads.run(partial(call, *arguments), "a checkpoint", 2 * self.config.timeout_s)
        return outcome.unwrap()

    def _given_up(self, step: int, error: OSError) -> None:
        self.say(given_up(self.folder, step, error, self.last.step if self.last is not None else None))


# How one ends, with or without an event loop


def commit(folder: Checkpoints, config: CheckpointConfig, step: int, entry: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint of `step` is on the disk: give it its name, and remove old ones. Blocks."""
    committed = folder.commit(step, entry)
    try:
        folder.prune(config.keep_last, config.keep_every)
    except OSError as error:  # it is there, whatever becomes of the old ones
        log.warning("old checkpoints could not be removed", error=repr(error))
    return committed


def given_up(folder: Checkpoints, step: int, error: OSError, last_step: int | None) -> str:
    """The disk did not take the checkpoint of `step`. Not fatal while the run folder is there: the last good one, that
    of `last_step`, stays. Returns what the user should know.

    Raises:
        EngineError: the run folder is gone.
    """
    folder.abandon(step)
    if not folder.run.is_dir():
        raise EngineError(f"the run folder {folder.run} is gone, so nothing of this run could be kept.") from error
    log.info("a checkpoint could not be written", step=step, error=repr(error))
    kept = f"the newest is that of step {last_step}" if last_step is not None else "there is none yet"
    return f"warning: the checkpoint of step {step} could not be written ({error.strerror or error}); {kept}"


def too_slow(folder: Checkpoints, config: CheckpointConfig) -> EngineError:
    return EngineError(
        f"a checkpoint was not on the disk after checkpoint.timeout_s={config.timeout_s:g} s. "
        f"Is the disk of {folder.run} all right? A slow one needs a higher limit."
    )


def _write_loop(state: RunState, about: Mapping[str, Any], unfinished: Path) -> None:
    write_file(unfinished / "groups.bin", encode_groups(state.groups))
    write_file(unfinished / "state.json", encode({**about, "loop": state.loop}).encode())


def load_state(checkpoint: Checkpoint) -> RunState:
    """The loop's part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read.
    """
    loop = checkpoint.state()["loop"]
    try:
        groups = decode_groups(checkpoint.groups.read_bytes())
    except (OSError, DataError) as error:
        raise CheckpointError(f"{checkpoint.groups} cannot be read: {error} Name another checkpoint.") from None
    return RunState(checkpoint.step, loop, groups)
