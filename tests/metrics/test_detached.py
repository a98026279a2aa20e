"""A tracker that fails or hangs costs the run a warning."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from asyncrl.metrics import detached
from asyncrl.metrics.detached import Detached

LIMIT_S = 30.0


class Tracker:
    """Takes records until it `fails` (with the number of the record) or `hangs` (until it is let go)."""

    def __init__(self, fails: int | None = None, hangs: int | None = None) -> None:
        self.fails, self.hangs = fails, hangs
        self.taken: list[Any] = []
        self.closed = threading.Event()
        self.let_go = threading.Event()
        self.stuck = threading.Event()

    def log(self, axis: str, record: Any) -> None:
        if record["step"] == self.fails:
            raise ConnectionError("no route to host")
        if record["step"] == self.hangs:
            self.stuck.set()
            self.let_go.wait(LIMIT_S)
        self.taken.append((axis, record["step"]))

    def close(self) -> None:
        self.closed.set()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with capture_logs() as logs:
        yield logs


def test_records_come_in_their_order_and_before_the_end(logged: list[Any]) -> None:
    tracker = Tracker()
    sink = Detached("wandb", tracker)
    for step in range(500):
        sink.log("step", {"step": step})
    sink.log("eval_version", {"step": 7})
    sink.close()
    assert tracker.taken == [*(("step", step) for step in range(500)), ("eval_version", 7)]
    assert tracker.closed.is_set()
    assert logged == []


def test_what_changes_later_is_written_as_it_was() -> None:
    tracker = Tracker(hangs=0)
    sink = Detached("wandb", tracker)
    record = {"step": 0}
    sink.log("step", record)
    assert tracker.stuck.wait(LIMIT_S)
    second = {"step": 1}
    sink.log("step", second)
    second["step"] = 99
    tracker.let_go.set()
    sink.close()
    assert tracker.taken == [("step", 0), ("step", 1)]


def test_one_that_fails_is_left_out_with_one_warning(logged: list[Any]) -> None:
    tracker = Tracker(fails=2)
    sink = Detached("wandb", tracker)
    for step in range(5):
        sink.log("step", {"step": step})
    sink.close()
    assert tracker.taken == [("step", 0), ("step", 1)]
    assert tracker.closed.is_set(), "it may still have something to save"
    (warning,) = logged
    assert "wandb" in warning["event"]
    assert "no route to host" in warning["reason"]


def test_one_that_hangs_holds_nothing_up(logged: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detached, "MOST_WAITING", 10)
    monkeypatch.setattr(detached, "STUCK_LIMIT_S", 0.01)
    tracker = Tracker(hangs=0)
    sink = Detached("trackio", tracker)
    sink.log("step", {"step": 0})
    assert tracker.stuck.wait(LIMIT_S)
    for step in range(1, 30):
        sink.log("step", {"step": step})
    sink.close()
    (warning,) = logged
    assert "trackio" in warning["event"]
    assert "10 records" in warning["reason"]
    tracker.let_go.set()
    assert tracker.closed.wait(LIMIT_S), "its thread ends as soon as it can"
    assert tracker.taken == [("step", 0)], "nothing more, once it was left out"


def test_one_that_does_not_come_to_its_end_is_left_behind(logged: list[Any]) -> None:
    tracker = Tracker(hangs=0)
    sink = Detached("wandb", tracker, close_limit_s=0.05)
    sink.log("step", {"step": 0})
    sink.close()
    (warning,) = logged
    assert "within 0.05 s" in warning["reason"]
    tracker.let_go.set()


def test_one_that_fails_at_its_end_is_named(logged: list[Any]) -> None:
    class Failing(Tracker):
        def close(self) -> None:
            raise OSError("disk full")

    Detached("tensorboard", Failing()).close()
    (warning,) = logged
    assert "disk full" in warning["reason"]
