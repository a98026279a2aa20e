"""Workloads: described, and read from timelines that were cut off, retried, or went several ways at once."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from asyncrl.errors import DataError
from asyncrl.planning.recorded import workload_of
from asyncrl.planning.workload import Attempt, Call, Turn, Workload
from asyncrl.reports.run_data import RunData, load_run
from asyncrl.storage.timeline import ATTEMPT, CUT_OFF, DONE, FAILED, TIMED_OUT, Timeline
from tests.planning.simulated_run import pool, signal_share

NAN = float("nan")


def recorded(folder: Path, *attempts: tuple[dict[str, float], list[tuple[float, ...]]]) -> RunData:
    """A run folder with these attempts: their columns, where they are not 0, and their calls."""
    (folder / "run").mkdir()
    (folder / "run" / "config.toml").write_text('model = "none"\n')
    timeline = Timeline(folder / "run" / "timeline")
    timeline.starts(100.0, 100.0)
    for columns, calls in attempts:
        row = {"reward": NAN, "turns": len(calls)} | columns
        times = {name: row.get(name, 0.0) + 100.0 for name in ("admitted", "began", "ended")}
        values = [times.get(name, row.get(name, 0.0)) for name in ATTEMPT]
        flat = [value for call in calls for value in (call[0] + 100.0, call[1] + 100.0, *call[2:])]
        timeline.attempt(values, flat)
    timeline.close()
    return load_run(folder / "run")


def test_turns_are_what_was_between_them(tmp_path: Path) -> None:
    calls = [(1.0, 2.0, 10, 5, 0), (4.0, 5.0, 18, 7, 0)]
    about = {"began": 0.5, "ended": 8.0, "outcome": DONE, "reward": 0.25, "tokens": 25, "loss_tokens": 12}
    workload = workload_of(recorded(tmp_path, (about, calls)))
    (attempt,) = workload.attempts
    assert attempt == Attempt(
        (Turn(0.5, (Call(10, 10, 5),)), Turn(2.0, (Call(3, 18, 7),))), 3.0, "done", 0.25, tokens=25, loss_tokens=12
    )
    assert attempt.idle_s == pytest.approx(5.5)
    assert attempt.drawn == 12


def test_calls_beside_each_other_are_one_turn(tmp_path: Path) -> None:
    """A rewritten history brings nothing along: its whole prompt is fresh."""
    calls = [(1.0, 4.0, 10, 5, 0), (1.5, 3.0, 10, 8, 0), (6.0, 7.0, 4, 2, 0)]
    workload = workload_of(recorded(tmp_path, ({"ended": 7.0, "outcome": DONE}, calls)))
    first, second = workload.attempts[0].turns
    assert [call.drawn for call in first.calls] == [5, 8]
    assert second == Turn(2.0, (Call(4, 4, 2),))


def test_members_keep_their_attempts_and_evaluations_stay_out(tmp_path: Path) -> None:
    run = recorded(
        tmp_path,
        ({"member": 1, "ended": 1.0, "outcome": FAILED}, []),
        ({"member": 0, "ended": 2.0, "outcome": DONE, "reward": 1.0}, []),
        ({"member": 1, "attempt": 1, "began": 1.0, "ended": 4.0, "outcome": DONE, "reward": 0.0}, []),
        ({"sequence": 1, "ended": 9.0, "outcome": TIMED_OUT}, []),
        ({"sequence": 2, "ended": 9.0, "outcome": DONE, "evaluation": 4}, []),
    )
    workload = workload_of(run)
    outcomes = [[[attempt.outcome for attempt in member] for member in row] for row in workload.rows]
    assert outcomes == [[["done"], ["failed", "done"]], [["timed out"]]]
    assert signal_share(workload) == 0.5


def test_what_was_cut_off_takes_longer_than_it_had(tmp_path: Path) -> None:
    """Cut off at 5 s among rollouts of 1, 6 and 9: it is one of the latter. A mean over what had ended would be low."""
    ended = [
        ({"sequence": number, "ended": seconds, "outcome": DONE}, []) for number, seconds in enumerate((1.0, 6.0, 9.0))
    ]
    cut = [({"sequence": 3 + number, "ended": 5.0, "outcome": CUT_OFF}, []) for number in range(100)]
    oldest = ({"sequence": 200, "ended": 50.0, "outcome": CUT_OFF}, [])
    workload = workload_of(recorded(tmp_path, *ended, *cut, oldest))
    seconds = [attempt.idle_s for attempt in workload.attempts]
    assert seconds[:3] == [1.0, 6.0, 9.0]
    assert set(seconds[3:-1]) == {6.0, 9.0}
    assert np.mean(seconds[3:-1]) == pytest.approx(7.5, abs=0.6)
    assert seconds[-1] == 50.0


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has ended, so there is nothing"):
        workload_of(recorded(tmp_path, ({"ended": 5.0, "outcome": CUT_OFF}, [])))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.toml").write_text('model = "none"\n')
    with pytest.raises(DataError, match="no timeline"):
        workload_of(load_run(tmp_path / "old"))
    with pytest.raises(DataError, match="no rollout to learn"):
        Workload(())


def test_what_people_ask_of_a_workload() -> None:
    def draw(rng: random.Random) -> Attempt:
        return Attempt.of_turns([(rng.random(), 100, 50), (1.0, 20, 30)], after_s=2.0, reward=rng.random())

    workload = pool(draw, rows=500)
    assert workload.rollouts == 2000
    assert workload.mean_idle_s == pytest.approx(3.5, abs=0.05)
    assert workload.mean_drawn == 80
    attempt = workload.attempts[0]
    assert (attempt.tokens, attempt.loss_tokens, attempt.prompt) == (200, 80, 100)
    assert [turn.calls[0].context for turn in attempt.turns] == [100, 170]
    assert workload.mean_tokens == 200


def test_rows_take_turns() -> None:
    workload = pool(lambda rng: Attempt((), rng.random()), rows=10, members=3)
    order = workload.order(seed=1, count=100)
    assert sorted(order) == sorted(list(range(10)) * 10)
    assert order != workload.order(seed=2, count=100)
    row = workload.rows[0]
    assert [workload.member(0, 0, index) for index in range(5)] == [*row, row[0], row[1]]
    assert workload.member(0, 1, 0) == row[1]
