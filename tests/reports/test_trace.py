"""The trace of a run: what a viewer is given, checked against the rules of its format."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.cli.main import main
from asyncrl.reports.recorded import Recorded, Window
from asyncrl.reports.run_data import Records
from asyncrl.reports.trace import Event, Lanes, trace_events, write_trace
from asyncrl.storage.timeline import ATTEMPT_TYPE, CALL_TYPE, LifeTimes

WHOLE = Window()
TIMES = st.integers(-20, 200).map(lambda tick: tick * 0.0007)  # many are equal, and none is a whole number of µs


def life(
    attempts: list[dict[str, float]], calls: list[list[tuple[float, ...]]], spans: list[dict[str, Any]] | None = None
) -> LifeTimes:
    rows = np.zeros(len(attempts), ATTEMPT_TYPE)
    for index, attempt in enumerate(attempts):
        for name, value in (attempt | {"turns": len(calls[index])}).items():
            rows[index][name] = value
    turns = np.array([len(each) for each in calls], int)
    flat = np.array([call for each in calls for call in each], CALL_TYPE) if turns.sum() else np.zeros(0, CALL_TYPE)
    return LifeTimes(0, 0.0, 0.0, rows, flat, np.cumsum(turns) - turns, spans or [])


def steps(*ended: float) -> Records:
    before = [0.0, *ended][: len(ended)]
    columns = {
        "step": np.arange(1.0, len(ended) + 1),
        "time_s": np.array(ended, float),
        "step_s": np.array([end - begin for begin, end in zip(before, ended, strict=True)], float),
        "reward_mean": np.array([math.nan, *[0.5] * len(ended)][: len(ended)], float),
    }
    return Records(columns, len(ended))


def span(track: str, name: str, began: float, ended: float, **about: Any) -> dict[str, Any]:
    return {"track": track, "name": name, "began": began, "ended": ended, **about}


@st.composite
def recordings(draw: st.DrawFn) -> Recorded:
    """Rollouts that overlap as they like, with turns beside each other, outside of their rollout, and of no length."""
    attempts: list[dict[str, float]] = []
    calls: list[list[tuple[float, ...]]] = []
    for number in range(draw(st.integers(0, 12))):
        admitted, began, ended = sorted(draw(st.tuples(TIMES, TIMES, TIMES)))
        evaluation = draw(st.sampled_from([0, 0, 0, 3]))
        attempts.append(
            {
                **{"admitted": admitted, "began": began, "ended": ended, "row": number // 2, "member": number % 2},
                **{"sequence": -1 if evaluation else number // 2, "outcome": draw(st.integers(0, 4))},
                **{"attempt": draw(st.integers(0, 1)), "evaluation": evaluation, "tokens": number},
            }
        )
        turns = draw(st.lists(st.tuples(TIMES, TIMES), max_size=4))
        calls.append([(*sorted(turn), 5.0, float(draw(st.integers(0, 1))), draw(st.integers(-1, 2))) for turn in turns])
    spans = []
    for number in range(draw(st.integers(0, 4))):
        began, ended = sorted(draw(st.tuples(TIMES, TIMES)))
        spans.append(span("trainer", "optimizer", began, ended, step=number + 1))
        spans.append(span("evaluation", "evaluation of 3", began, ended, version=3))
    trained = {group: draw(st.integers(1, 5)) for group in range(draw(st.integers(0, 6)))}
    return Recorded([life(attempts, calls, spans)], steps(*sorted(draw(st.lists(TIMES, max_size=4)))), trained)


def slices(events: list[Event]) -> dict[int, list[Event]]:
    """By lane."""
    found: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["tid"]].append(event)
    return found


def lane_names(events: list[Event]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def assert_nests(lane: list[Event]) -> None:
    """As a viewer reads them: by begin, and of equals in the order of the file."""
    open_until: list[int] = []
    for event in sorted(lane, key=lambda event: event["ts"]):
        begin, end = event["ts"], event["ts"] + event["dur"]
        while open_until and open_until[-1] <= begin:
            open_until.pop()
        assert not open_until or end <= open_until[-1], f"{event} overlaps what ends at {open_until[-1]}"
        open_until.append(end)


class TestTheFormat:
    @given(recordings())
    def test_slices_of_a_lane_nest(self, recorded: Recorded) -> None:
        for lane in slices(trace_events(recorded, WHOLE)).values():
            assert_nests(lane)

    @given(recordings())
    def test_times_are_whole_microseconds_from_0_on(self, recorded: Recorded) -> None:
        for event in trace_events(recorded, WHOLE):
            times = [event[name] for name in ("ts", "dur") if name in event]
            assert all(type(time) is int and time >= 0 for time in times)

    @given(recordings())
    def test_every_rollout_is_there_once(self, recorded: Recorded) -> None:
        drawn = [
            (event["args"].get("group", -1), event["args"]["member"], event["args"]["attempt"], event["dur"])
            for event in trace_events(recorded, WHOLE)
            if event["ph"] == "X" and "outcome" in event.get("args", {})
        ]
        shift = max(0.0, -recorded.times.start)
        expected = [
            (
                *(int(row["sequence"]), int(row["member"]), int(row["attempt"]) + 1),
                math.floor((row["ended"] + shift) * 1e6) - math.floor((row["began"] + shift) * 1e6),
            )
            for row in recorded.lives[0].attempts
        ]
        assert sorted(drawn) == sorted(expected)

    @given(recordings())
    def test_every_turn_is_there_once(self, recorded: Recorded) -> None:
        drawn = [event for event in trace_events(recorded, WHOLE) if "turn" in event["name"] and event["ph"] == "X"]
        assert len(drawn) == len(recorded.lives[0].calls)

    @given(recordings())
    def test_arrows_have_two_ends_inside_of_slices_and_point_forward(self, recorded: Recorded) -> None:
        events = trace_events(recorded, WHOLE)
        lanes = slices(events)
        ends: dict[str, dict[int, Event]] = {"s": {}, "f": {}}
        for event in events:
            if event["ph"] in ends:
                assert event["id"] not in ends[event["ph"]]
                ends[event["ph"]][event["id"]] = event
                assert any(each["ts"] <= event["ts"] <= each["ts"] + each["dur"] for each in lanes[event["tid"]])
        assert ends["s"].keys() == ends["f"].keys()

    @given(recordings())
    def test_a_lane_is_of_one_process_and_none_has_the_number_of_one(self, recorded: Recorded) -> None:
        events = trace_events(recorded, WHOLE)
        where = {(event["tid"], event["pid"]) for event in events if "tid" in event}
        processes = {event["pid"] for event in events}
        assert len({thread for thread, _ in where}) == len(where)
        assert not processes & {thread for thread, _ in where}
        assert {thread for thread, _ in where} == set(lane_names(events))

    @given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=40))
    def test_as_few_lanes_as_the_most_that_overlap(self, made: list[tuple[int, int]]) -> None:
        times = sorted((begin, begin + took) for begin, took in made)
        lanes = Lanes()
        for begin, end in times:
            lanes.place(begin, end)
        assert lanes.count == max((sum(b <= at < e for b, e in times) for at, _ in times), default=0)

    def test_a_file_is_strict_json_gzipped_and_private(self, tmp_path: Path) -> None:
        recorded = Recorded([life([{"ended": 1.0, "reward": math.nan}], [[]])], steps(1.0), {})
        drawn = write_trace(recorded, WHOLE, tmp_path / "trace.json.gz")
        with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
            found = json.load(file, parse_constant=pytest.fail)
        assert len(found["traceEvents"]) == drawn.events
        assert found["traceEvents"] == json.loads(json.dumps(trace_events(recorded, WHOLE)))
        assert (tmp_path / "trace.json.gz").stat().st_mode & 0o777 == 0o600
        assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
