"""The timeline: what a run keeps of every rollout, whatever becomes of the disk and of the process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.config import RolloutConfig
from asyncrl.errors import RecoverableRolloutError
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.evaluation import Evaluator
from asyncrl.storage import timeline as module
from asyncrl.storage.timeline import (
    ATTEMPT,
    CALL,
    CUT_OFF,
    DONE,
    DROPPED,
    FAILED,
    TIMED_OUT,
    LifeTimes,
    Timeline,
    read_timeline,
)
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import ScriptedSampler
from asyncrl.types import SamplingParams
from tests.storage.timed_run import MODEL_S, TRAIN_S, timed_run

TOOL_S = 0.25


def config(**settings: object) -> Config:
    return Config(
        model="none",
        completions_per_prompt=2,
        prompt_groups_per_step=2,
        on_filtered="drop",
        **settings,  # type: ignore[arg-type]
    )


async def two_turns(prompt: Prompt) -> RolloutSample:
    """0.5 s of the model, 0.25 s of a tool, 0.5 s of the model."""
    tokens, logprobs, mask = [1, 2, 3], [0.0] * 3, [0] * 3
    for turn in range(2):
        if turn:
            await asyncio.sleep(TOOL_S)
        drawn = await prompt.policy.generate(tokens)
        tokens = [*tokens, *drawn.tokens]
        logprobs += drawn.logprobs
        mask += [1] * len(drawn.tokens)
    return RolloutSample(tokens, logprobs, mask, float(prompt.rollout_index))


def only(lives: list[LifeTimes]) -> LifeTimes:
    assert len(lives) == 1
    return lives[0]


class TestARun:
    def test_every_rollout_with_its_times_and_its_turns(self, tmp_path: Path) -> None:
        engine = timed_run(tmp_path, two_turns, config(concurrency={"min_window": 2, "max_window": 2}), rows=6)
        life = only(read_timeline(tmp_path))
        rows = life.attempts
        assert sorted(zip(rows["row"], rows["member"], strict=True)) == [(r, m) for r in range(6) for m in range(2)]
        assert engine.scheduler.finished_rollouts == len(rows) == 12
        assert (rows["outcome"] == DONE).all()
        np.testing.assert_allclose(rows["ended"] - rows["began"], 2 * MODEL_S + TOOL_S)
        np.testing.assert_allclose(rows["model_s"], 2 * MODEL_S)
        assert (rows["reward"] == rows["member"]).all()
        assert (rows["turns"] == 2).all()
        assert (np.diff(rows["ended"]) >= 0).all()
        assert rows["began"].max() > rows["admitted"].max() - 1e-9
        for index, row in enumerate(rows):
            first, second = life.calls[life.first_call[index] :][:2]
            assert (first["began"], second["ended"]) == (row["began"], row["ended"])
            np.testing.assert_allclose([first["ended"] - first["began"], second["began"] - first["ended"]], [0.5, 0.25])
            assert second["prompt_tokens"] == first["prompt_tokens"] + first["drawn_tokens"]
            assert row["tokens"] == second["prompt_tokens"] + second["drawn_tokens"]
            assert row["loss_tokens"] == first["drawn_tokens"] + second["drawn_tokens"] > 0

    def test_what_the_trainer_did(self, tmp_path: Path) -> None:
        timed_run(tmp_path, two_turns, config(), rows=6)
        life = only(read_timeline(tmp_path))
        took = {(span["name"], span.get("step")): span["ended"] - span["began"] for span in life.spans}
        assert [took["optimizer", step] for step in (1, 2, 3)] == pytest.approx([TRAIN_S] * 3)
        assert {("wait", 1), ("forward_backward", 2), ("export", 3), ("wait for hot-load", 3)} <= took.keys()
        assert sum(span["track"] == "publish" for span in life.spans) == 3

    def test_how_attempts_ended(self, tmp_path: Path) -> None:
        async def one_of_each(prompt: Prompt) -> RolloutSample | None:
            first = prompt.policy._session.endswith(".0")
            match prompt["row"], first:
                case 0, True:
                    return None
                case 1, True:
                    raise RecoverableRolloutError("again, please")
                case 2, True:
                    await asyncio.sleep(1000)
                case 3, _:
                    await asyncio.sleep(90)
            return await two_turns(prompt)

        settings = config(rollout={"timeout_s": 100.0}, staleness={"max_staleness": 8})
        engine = timed_run(
            tmp_path, one_of_each, settings, rows=4, stop=lambda engine: engine.scheduler.finished_rollouts == 4
        )
        life = only(read_timeline(tmp_path))
        ended = {(int(row["row"]), int(row["attempt"])): int(row["outcome"]) for row in life.attempts}
        assert ended[0, 0] == DROPPED
        assert ended[1, 0] == FAILED
        assert (ended[0, 1], ended[1, 1]) == (DONE, DONE)
        assert engine.scheduler.finished_rollouts == 4
        assert CUT_OFF in ended.values()
        again = life.attempts[life.attempts["attempt"] == 1]
        assert (again["began"] > again["admitted"]).all()

    def test_a_rollout_that_takes_too_long(self, tmp_path: Path) -> None:
        async def slow(prompt: Prompt) -> RolloutSample:
            if prompt["row"] == 1 and prompt.policy._session.endswith(".0"):
                await asyncio.sleep(1000)
            return await two_turns(prompt)

        timed_run(tmp_path, slow, config(rollout={"timeout_s": 20.0}), rows=2)
        rows = only(read_timeline(tmp_path)).attempts
        late = rows[rows["outcome"] == TIMED_OUT]
        np.testing.assert_allclose(late["ended"] - late["began"], 20.0)
        assert (late["row"] == 1).all()
        assert len(late) == 2
        assert np.isnan(late["reward"]).all()

    def test_evaluations(self, tmp_path: Path) -> None:
        async def measure() -> None:
            sampler = ScriptedSampler(latency_s=lambda request: MODEL_S)
            context = PolicyContext(sampler, params=SamplingParams(4), max_seq_len=100, load_tokenizer=lambda: None)
            timeline = Timeline(tmp_path / "timeline")
            loop = asyncio.get_running_loop()
            timeline.starts(loop.time(), loop.time())
            evaluator = Evaluator(
                rollout=two_turns,
                make_policy=lambda session, version: Policy(context, session, version),
                contract=Contract(),
                settings=RolloutConfig(),
                seed=0,
                timeline=timeline,
            )
            async with sampler:
                await evaluator.run([{"row": 0}, {"row": 1}], 2, room=asyncio.Semaphore(2), version=0)
            timeline.close()

        run_virtual(measure())
        rows = only(read_timeline(tmp_path)).attempts
        assert sorted(zip(rows["row"], rows["member"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert (rows["evaluation"] == 1).all()
        assert (rows["sequence"] == -1).all()
        np.testing.assert_allclose(sorted(rows["began"] - rows["admitted"]), [0, 0, 1.25, 1.25])


def write(folder: Path, attempts: int, life: int = 0) -> Timeline:
    """Attempt n has n % 3 turns, and every number of it and its turns says n."""
    timeline = Timeline(folder / "timeline", life)
    timeline.starts(0.0, 0.0)
    for number in range(attempts):
        turns = number % 3
        row = [float(number)] * len(ATTEMPT)
        row[ATTEMPT.index("turns")] = float(turns)
        timeline.attempt(row, [float(number)] * len(CALL) * turns)
        timeline.span("trainer", f"span {number}", number, number)
    return timeline


def assert_whole(life: LifeTimes) -> None:
    """What there is of a timeline that `write` wrote has not got mixed up."""
    assert list(life.attempts["row"]) == list(range(len(life.attempts)))
    for number, first in enumerate(life.first_call):
        assert list(life.calls["prompt_tokens"][first : first + number % 3]) == [number] * (number % 3)
    assert [span["name"] for span in life.spans] == [f"span {number}" for number in range(len(life.spans))]


class TestTheFiles:
    def test_only_their_user_can_read_them(self, tmp_path: Path) -> None:
        write(tmp_path, 3).close()
        folder = tmp_path / "timeline" / "life-0"
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}

    def test_each_life_has_its_own(self, tmp_path: Path) -> None:
        write(tmp_path, 3).close()
        later = Timeline(tmp_path / "timeline", 10)
        later.starts(100.0, 107.0)  # it goes on 7 s after the run began
        later.attempt([109.0] * len(ATTEMPT), [109.0, 110.0, 1.0, 1.0, 1.0] * 109)
        later.span("trainer", "wait", 107.0, 108.0)
        later.close()
        lives = read_timeline(tmp_path)
        assert [life.number for life in lives] == [0, 10]
        assert lives[1].began == 7.0
        assert list(lives[1].attempts["ended"]) == [9.0]
        assert lives[1].calls["ended"][0] == 10.0
        assert (lives[1].spans[0]["began"], lives[1].spans[0]["ended"]) == (0.0 + 7.0, 8.0)

    def test_without_one_there_are_no_lives(self, tmp_path: Path) -> None:
        (tmp_path / "timeline" / "life-x").mkdir(parents=True)
        assert read_timeline(tmp_path) == []

    @given(data=st.data(), attempts=st.integers(0, 12))
    def test_a_torn_end_is_left_out(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, attempts: int
    ) -> None:
        folder = tmp_path_factory.mktemp("torn")
        write(folder, attempts).close()
        for name in ("attempts.f8", "calls.f8", "spans.jsonl"):
            path = folder / "timeline" / "life-0" / name
            os.truncate(path, path.stat().st_size * data.draw(st.integers(0, 1000), label=name) // 1000)
        for life in read_timeline(folder):
            assert_whole(life)

    def test_a_process_that_is_killed_while_it_writes(self, tmp_path: Path) -> None:
        program = (
            "import sys; from pathlib import Path; from tests.storage.test_timeline import write\n"
            "timeline = write(Path(sys.argv[1]), 0)\n"
            "number = 0\n"
            "while True:\n"
            "    for number in range(number, number + 50):\n"
            "        row = [float(number)] * 15; row[12] = number % 3\n"
            "        timeline.attempt(row, [float(number)] * 5 * (number % 3))\n"
            "    number += 1\n"
            "    timeline.flush()\n"
        )
        victim = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])
        try:
            path = tmp_path / "timeline" / "life-0" / "attempts.f8"
            limit = time.monotonic() + 30
            while not (path.exists() and path.stat().st_size > 100_000):
                assert victim.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.01)
        finally:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        life = only(read_timeline(tmp_path))
        assert len(life.attempts) > 100
        assert_whole(life)


class TestADisk:
    """That does not take the timeline costs a line in the log, and not the run."""

    def test_that_is_full(self, tmp_path: Path) -> None:
        folder = tmp_path / "timeline" / "life-0"
        folder.mkdir(parents=True)
        (folder / "attempts.f8").symlink_to("/dev/full")
        with capture_logs() as logs:
            engine = timed_run(tmp_path, two_turns, config(), rows=6)
        assert engine.step == 3
        assert [entry["event"] for entry in logs if "timeline" in entry["event"]] == [
            "the rest of the timeline is not written"
        ]

    def test_whose_folder_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "timeline").write_text("")
        with capture_logs() as logs:
            write(tmp_path, 3).close()
        assert [entry["log_level"] for entry in logs] == ["warning"]

    def test_that_stands_still(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "timeline" / "life-0"
        folder.mkdir(parents=True)
        os.mkfifo(folder / "attempts.f8")  # nobody reads it, so opening it takes for ever
        monkeypatch.setattr(module, "CLOSE_LIMIT_S", 0.05)
        monkeypatch.setattr(module, "MOST_WAITING_BYTES", 10_000)
        with capture_logs() as logs:
            timeline = write(tmp_path, 0)
            for number in range(1000):
                timeline.attempt([float(number)] * len(ATTEMPT), [])
                timeline.flush()
            waiting = timeline._handed_over
            timeline.close()
        assert waiting <= 10_000
        assert [entry["event"] for entry in logs] == [
            "the disk does not take the timeline: a part of it is left out",
            "the disk does not take the timeline: its end is left out",
        ]
        os.close(os.open(folder / "attempts.f8", os.O_RDONLY | os.O_NONBLOCK))  # let the thread go

    def test_what_is_left_out_takes_its_turns_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MOST_WAITING_BYTES", 0)
        timeline = write(tmp_path, 5)
        timeline.flush()
        monkeypatch.setattr(module, "MOST_WAITING_BYTES", 1 << 20)
        timeline.starts(0.0, 0.0)
        timeline.attempt([7.0] * len(ATTEMPT), [7.0] * len(CALL) * 7)
        timeline.close()
        life = only(read_timeline(tmp_path))
        assert list(life.attempts["row"]) == [7.0]
        assert set(life.calls["prompt_tokens"]) == {7.0}


def test_without_a_folder_it_is_told_and_not_written() -> None:
    timeline, told = Timeline(None), []
    timeline.on_flush = lambda attempts, calls: told.append((attempts, calls))
    timeline.attempt([1.0] * len(ATTEMPT), [2.0] * len(CALL))
    timeline.flush()
    timeline.flush()
    timeline.close()
    assert told == [(array("d", [1.0] * len(ATTEMPT)).tobytes(), array("d", [2.0] * len(CALL)))]
