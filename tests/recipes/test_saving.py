"""When training waits for the disk: never where it may choose its checkpoints itself, until the limit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from asyncrl import checkpointing
from asyncrl.config import CheckpointConfig
from asyncrl.errors import EngineError
from asyncrl.recipes.saving import Saver
from asyncrl.storage.checkpoints import Checkpoints


class SlowDisk:
    """What the learner's `save_state` began; the test says when it is written."""

    def __init__(self) -> None:
        self.begun: list[Future[None]] = []

    def save_state(self, folder: Path) -> Future[None]:
        folder.mkdir()
        self.begun.append(Future())
        return self.begun[-1]


def saver(run: Path, disk: SlowDisk, **settings: Any) -> Saver:
    return Saver(Checkpoints(run), CheckpointConfig(**settings), disk.save_state, 0, lambda text: None)


def state() -> Mapping[str, Any]:
    return {}


def test_a_disk_slower_than_the_steps_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "LEAST_S", 0.0)
    monkeypatch.setattr(checkpointing, "SHARE", 1e9)
    disk = SlowDisk()
    saving = saver(tmp_path, disk, timeout_s=3.0)
    began = time.monotonic()
    for step in (1, 2, 3):
        saving.stepped(step, state)
    assert time.monotonic() - began < 2.0
    assert len(disk.begun) == 1
    disk.begun[0].set_result(None)
    saving.stepped(4, state)
    assert saving.last_step == 1
    assert len(disk.begun) == 2


def test_a_disk_that_never_answers_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "LEAST_S", 0.0)
    monkeypatch.setattr(checkpointing, "SHARE", 1e9)
    disk = SlowDisk()
    saving = saver(tmp_path, disk, timeout_s=0.05)
    saving.stepped(1, state)
    time.sleep(0.06)
    with pytest.raises(EngineError, match=r"checkpoint\.timeout_s=0\.05 s"):
        saving.stepped(2, state)
    with pytest.raises(EngineError, match=r"checkpoint\.timeout_s=0\.05 s"):
        saving.finish(2, state, "failure")
    assert len(disk.begun) == 1, "the end of the run waited for the disk once more"


def test_steps_that_are_named_are_waited_for(tmp_path: Path) -> None:
    saving = saver(tmp_path, SlowDisk(), interval=1, timeout_s=0.05)
    saving.stepped(1, state)
    with pytest.raises(EngineError, match=r"checkpoint\.timeout_s=0\.05 s"):
        saving.stepped(2, state)
