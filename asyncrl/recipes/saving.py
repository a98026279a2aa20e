"""The checkpoints of a run without an event loop: when one is due, and how it comes to the disk.

The learner makes a copy of its state and goes on; a thread of its own writes the copy. A checkpoint gets its name
after a later step, once everything of it is on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from asyncrl.checkpointing import Reason, commit, given_up, is_due, too_slow
from asyncrl.config import CheckpointConfig
from asyncrl.errors import TrainerError
from asyncrl.metrics.jsonl import encode
from asyncrl.storage.checkpoints import Checkpoints, write_file

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Writing:
    """A checkpoint on its way to the disk."""

    step: int
    reason: Reason
    written: Future[None]
    began: float


@dataclass(slots=True)
class Saver:
    """Owns the checkpoint that is being written."""

    folder: Checkpoints
    config: CheckpointConfig
    save_state: Callable[[Path], Future[None]]
    """Copies the learner's state, and writes the copy to a folder meanwhile."""
    life: int
    say: Callable[[str], None]
    last_step: int | None = None
    """Of the newest checkpoint that is whole."""
    _last_at: float = field(default_factory=time.monotonic)
    _stood_still_s: float = 0.0
    _writing: _Writing | None = None

    def stepped(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """An optimizer step was taken: name the checkpoint that has come to the disk, and begin one if it is due.

        Raises:
            EngineError: a checkpoint was not on the disk within `checkpoint.timeout_s`, or the run folder is gone.
        """
        if self._writing is not None and self._writing.written.done():
            self._settle()
        if self._is_due(step):
            self._settle()
            self._begin(step, state(), "interval")

    def finish(self, step: int, state: Callable[[], Mapping[str, Any]], reason: Reason) -> None:
        """The last one. Returns when it is on the disk; where its step has one already, it is that one.

        Raises:
            EngineError: as `stepped`, and a `TrainerError` where the weights are not worth keeping.
        """
        self._settle()
        if self.config.final and step and step != self.last_step:
            self._begin(step, state(), reason)
            self._settle()

    def _is_due(self, step: int) -> bool:
        now = time.monotonic()
        due = is_due(self.config, step, now - self._last_at, self._stood_still_s)
        if self.config.interval is None and self._writing is not None:  # no step is named: none need wait for the disk
            return due and now - self._writing.began > self.config.timeout_s  # then `_settle` says so
        return due

    def _begin(self, step: int, state: Mapping[str, Any], reason: Reason) -> None:
        began = time.monotonic()
        try:
            unfinished = self.folder.begin(step)
            write_file(unfinished / "state.json", encode({**state, "life": self.life}).encode())
            written = self.save_state(unfinished / "trainer")
        except OSError as error:
            self._given_up(step, error)
        else:
            self._writing = _Writing(step, reason, written, began)
        self._last_at = time.monotonic()
        self._stood_still_s = self._last_at - began

    def _settle(self) -> None:
        """Wait until the checkpoint that is being written is on the disk, and give it its name."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.written.result(max(0.0, writing.began + self.config.timeout_s - time.monotonic()))
            commit(self.folder, self.config, writing.step, {"reason": writing.reason, "life": self.life})
        except TimeoutError:  # before OSError, which it is too
            self._writing = writing  # it stays that: nothing else can be written, and each wait for it ends here
            raise too_slow(self.folder, self.config) from None
        except TrainerError:
            self.folder.abandon(writing.step)
            raise
        except OSError as error:
            self._given_up(writing.step, error)
        else:
            self.last_step = writing.step
            seconds = round(time.monotonic() - writing.began, 3)
            log.info("checkpoint", step=writing.step, seconds=seconds, stood_still_s=round(self._stood_still_s, 4))

    def _given_up(self, step: int, error: OSError) -> None:
        self.say(given_up(self.folder, step, error, self.last_step))
