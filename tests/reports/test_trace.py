"""The trace of a run: what a viewer is given, checked against the rules of its format."""

from __future__ import annotations

import gzip
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.cli.main import main
from asyncrl.exits import USER_ERROR
from asyncrl.reports.recorded import Recorded, Window, read_recorded
from asyncrl.reports.run_data import Records
from asyncrl.reports.trace import Event, Lanes, trace_events, write_trace
from asyncrl.storage.timeline import ATTEMPT, ATTEMPT_TYPE, CALL_TYPE, LifeTimes, Timeline
from tests.storage.test_timeline import config, two_turns
from tests.storage.timed_run import timed_run

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
    @settings(max_examples=40)
    @given(recordings())
    def test_slices_of_a_lane_nest(self, recorded: Recorded) -> None:
        for lane in slices(trace_events(recorded, WHOLE)).values():
            assert_nests(lane)

    @settings(max_examples=40)
    @given(recordings())
    def test_times_are_whole_microseconds_from_0_on(self, recorded: Recorded) -> None:
        for event in trace_events(recorded, WHOLE):
            times = [event[name] for name in ("ts", "dur") if name in event]
            assert all(type(time) is int and time >= 0 for time in times)

    @settings(max_examples=40)
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

    @settings(max_examples=40)
    @given(recordings())
    def test_every_turn_is_there_once(self, recorded: Recorded) -> None:
        drawn = [event for event in trace_events(recorded, WHOLE) if "turn" in event["name"] and event["ph"] == "X"]
        assert len(drawn) == len(recorded.lives[0].calls)

    @settings(max_examples=40)
    @given(recordings())
    def test_arrows_have_two_ends_each_at_a_slice(self, recorded: Recorded) -> None:
        events = trace_events(recorded, WHOLE)
        lanes = slices(events)
        ends: dict[str, dict[int, Event]] = {"s": {}, "f": {}}
        for event in events:
            if event["ph"] in ends:
                assert event["id"] not in ends[event["ph"]]
                ends[event["ph"]][event["id"]] = event
                assert any(each["ts"] <= event["ts"] <= each["ts"] + each["dur"] for each in lanes[event["tid"]])
        assert ends["s"].keys() == ends["f"].keys()

    @settings(max_examples=40)
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


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """Of six rows, two rollouts each, three at a time."""
    folder = tmp_path_factory.mktemp("run")
    timed_run(
        folder, two_turns, config(concurrency={"min_window": 3, "max_window": 3}, data={"shuffle": False}), rows=6
    )
    return trace_events(read_recorded(folder), WHOLE)


class TestWhatIsDrawn:
    """Of real rollouts, in virtual time: 0.5 s of the model, 0.25 s of a tool, 0.5 s of the model."""

    def test_turns_and_tools_fill_a_rollout(self, events: list[Event]) -> None:
        names = lane_names(events)
        lanes = {names[thread]: lane for thread, lane in slices(events).items()}
        assert [event["name"] for event in lanes["slot 001"][:4]] == ["row 0 #0", "turn 1", "tools", "turn 2"]
        assert [event["dur"] for event in lanes["slot 001"][:4]] == [1_250_000, 500_000, 250_000, 500_000]
        assert {name for name in lanes if name.startswith("slot")} == {"slot 001", "slot 002", "slot 003"}

    def test_a_rollout_says_what_became_of_it(self, events: list[Event]) -> None:
        first = next(event for event in events if event["name"] == "row 0 #1")
        facts = {"outcome": "done", "row": 0, "epoch": 0, "member": 1, "attempt": 1, "group": 0, "reward": 1.0}
        assert facts.items() <= first["args"].items()
        assert (first["args"]["trained_in_step"], first["args"]["version"], first["args"]["turns"]) == (1, 0, 2)

    def test_the_trainer(self, events: list[Event]) -> None:
        names = lane_names(events)
        lanes = {names[thread]: lane for thread, lane in slices(events).items()}
        assert [event["name"] for event in lanes["steps"]] == ["step 1", "step 2", "step 3"]
        assert [event["name"] for event in lanes["hot-loads"]] == [f"hot-load of {step}" for step in (1, 2, 3)]
        assert [event["name"] for event in lanes["trainer"]][:3] == ["wait", "forward_backward", "optimizer"]
        assert lanes["lives"][0]["dur"] > 3_000_000

    def test_every_group_has_an_arrow_to_its_step(self, events: list[Event]) -> None:
        optimizer = {event["args"]["step"]: event for event in events if event["name"] == "optimizer"}
        begins = {event["id"]: event for event in events if event["ph"] == "s"}
        ends = {event["id"]: event for event in events if event["ph"] == "f"}
        assert set(begins) == set(ends) == set(range(6))
        for group, end in ends.items():
            assert begins[group]["ts"] < end["ts"]
            assert end["ts"] == optimizer[group // 2 + 1]["ts"]

    def test_rollouts_that_wait_for_a_slot(self, events: list[Event]) -> None:
        names = lane_names(events)
        waits = [e for e in events if e["ph"] == "X" and names[e["tid"]].startswith("waiting")]
        began = {e["name"]: e["ts"] for e in events if e["ph"] == "X" and names[e["tid"]].startswith("slot")}
        assert waits
        assert all(began[wait["name"]] == wait["ts"] + wait["dur"] for wait in waits)

    def test_curves(self, events: list[Event]) -> None:
        curves = defaultdict(list)
        for event in events:
            if event["ph"] == "C":
                curves[event["name"]].append(event["args"]["value"])
        assert len(curves["reward"]) == 3
        assert curves["reward"][0] == 0.5
        assert curves["staleness"][0] == 0.0

    def test_turns_beside_each_other_have_lanes_of_their_own(self) -> None:
        calls = [(0.0, 0.6, 1.0, 1.0, 0.0), (0.2, 0.9, 1.0, 1.0, 0.0), (0.7, 0.8, 1.0, 0.0, -1.0)]
        events = trace_events(Recorded([life([{"ended": 1.0}], [calls])], steps(), {}), WHOLE)
        names = lane_names(events)
        lanes = {names[t]: [event["name"] for event in lane] for t, lane in slices(events).items()}
        assert lanes["slot 001"] == ["row 0 #0", "turn 1", "tools", "turn 3 without an answer", "tools"]
        assert lanes["turns beside others"] == ["row 0 #0: turn 2"]

    def test_what_a_resume_took_back_is_left_out(self, tmp_path: Path) -> None:
        for number, origin, began, ends in ((0, 100.0, 100.0, (103.0, 109.0)), (1, 500.0, 505.0, (511.0,))):
            timeline = Timeline(tmp_path / "timeline", number)
            timeline.starts(origin, began)
            for end in ends:
                row = [0.0] * len(ATTEMPT)
                row[:3] = [end - 2, end - 2, end]
                timeline.attempt(row, [])
            timeline.span("trainer", "wait", began, began + 6.0, step=1)
            timeline.close()
        recorded = read_recorded(tmp_path)
        assert [list(each.attempts["ended"]) for each in recorded.lives] == [[3.0], [11.0]]
        assert recorded.undone == 1
        lives = [event for event in trace_events(recorded, WHOLE) if event["name"].startswith("life")]
        assert [(event["ts"], event["dur"]) for event in lives] == [(0, 5_000_000), (5_000_000, 6_000_000)]
        waits = [event for event in trace_events(recorded, WHOLE) if event["name"] == "wait"]
        assert [(event["ts"], event["dur"]) for event in waits] == [(0, 5_000_000), (5_000_000, 6_000_000)]


class TestTheCommand:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        timed_run(tmp_path, two_turns, config(concurrency={"min_window": 2, "max_window": 2}), rows=6)
        return tmp_path

    def test_it_writes_the_whole_run(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["trace", str(run)]) == 0
        said = capsys.readouterr().out
        assert "3 steps, 12 rollouts, at most 2 at once" in said
        assert "ui.perfetto.dev" in said
        assert (run / "trace.json.gz").exists()

    @pytest.mark.parametrize(
        ("asked", "steps", "rollouts"), [(["--step", "2"], 1, 4), (["--step", "2:3"], 2, 8), (["--to", "1.0"], 1, 2)]
    )
    def test_a_part_of_it(
        self, run: Path, capsys: pytest.CaptureFixture[str], asked: list[str], steps: int, rollouts: int
    ) -> None:
        assert main(["trace", str(run), *asked, "--out", str(run / "part.json")]) == 0
        drawn = [e for e in json.loads((run / "part.json").read_text())["traceEvents"] if e["ph"] == "X"]
        assert len([e for e in drawn if e["name"].startswith("step")]) == steps
        assert len([e for e in drawn if e["name"].startswith("row") and "outcome" in e["args"]]) >= rollouts

    def test_of_a_huge_run_the_end(
        self, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("asyncrl.cli.trace.MOST_EVENTS", 40)
        assert main(["trace", str(run)]) == 0
        said = capsys.readouterr().out
        assert "the end of the run" in said
        assert "--from" in said
        assert "12 rollouts" not in said

    @pytest.mark.parametrize(
        ("asked", "why"),
        [
            (["--step", "4"], "the run has steps 1 to 3"),
            (["--from", "1e6"], "there is nothing from 1e+06 s"),
            (["--from", "5", "--to", "1"], "there is nothing from 5 s to 1 s"),
            (["--from", "nan"], "there is nothing"),
            (["--step", "1", "--to", "1"], "give one of them"),
            (["--out", "nowhere/trace.json"], "there is no folder nowhere"),
            (["--out", "."], "is a folder"),
        ],
    )
    def test_what_cannot_be_drawn(
        self, run: Path, capsys: pytest.CaptureFixture[str], asked: list[str], why: str
    ) -> None:
        assert main(["trace", str(run), *asked]) == USER_ERROR
        assert why in " ".join(capsys.readouterr().err.split())
        assert not (run / "trace.json.gz").exists()

    @pytest.mark.parametrize("name", ["mine.toml", "mine.json.gz"])
    def test_it_writes_over_nothing_but_a_trace(
        self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        mine, trace = tmp_path / name, tmp_path / "trace.json.gz"
        mine.write_text("seed = 1")
        assert main(["trace", str(run), "--out", str(mine)]) == USER_ERROR
        assert "is another file" in capsys.readouterr().err
        assert mine.read_text() == "seed = 1"
        for _ in range(2):
            assert main(["trace", str(run), "--out", str(trace)]) == 0

    def test_a_run_without_a_timeline(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["trace", str(tmp_path)]) == USER_ERROR
        assert "record_timeline" in capsys.readouterr().err
