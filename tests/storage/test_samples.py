"""Groups as bytes, and the files of what was trained on: exact, and every fault is found."""

from __future__ import annotations

import math
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import DataError, EngineError
from asyncrl.storage import samples
from asyncrl.storage.groups import decode_groups, encode_groups
from asyncrl.storage.packing import MAGIC, narrow, pack, unpack
from asyncrl.storage.samples import SampleRecorder, read_samples
from asyncrl.types import Group, RolloutRun, RolloutSample

SETTINGS = {"total_steps": 9}
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SINGLE = st.floats(allow_nan=False, allow_infinity=False, width=32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def columns(length: int, elements: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(elements, min_size=length, max_size=length)


@st.composite
def rollout_samples(draw: st.DrawFn, reward: float) -> RolloutSample:
    length = draw(st.integers(1, 6))
    maybe: Callable[[st.SearchStrategy[Any]], Any] = lambda of: draw(st.none() | of)  # noqa: E731
    return RolloutSample(
        tokens=draw(columns(length, st.integers(0, draw(st.sampled_from([255, 65_535, 151_935, 2**32, 2**63 - 1]))))),
        logprobs=draw(columns(length, draw(st.sampled_from([SINGLE, FINITE])))),
        loss_mask=draw(columns(length, st.integers(0, 1))),
        reward=reward,
        versions=maybe(columns(length, st.integers(-1, 10**6))),
        info=draw(st.dictionaries(st.text(), JSON, max_size=3)),
        advantages=maybe(columns(length, FINITE)),
        turn_rewards=maybe(st.lists(st.none() | FINITE, max_size=3)),
    )


@st.composite
def finished_groups(draw: st.DrawFn) -> Group:
    rewards = draw(st.lists(FINITE, min_size=1, max_size=3))
    runs = [RolloutRun(draw(st.lists(rollout_samples(reward), min_size=1, max_size=2))) for reward in rewards]
    per_run = st.lists(FINITE, min_size=len(runs), max_size=len(runs))
    numbers = [draw(st.integers(0, 10**9)) for _ in range(4)]
    return Group(*numbers, runs, draw(per_run | st.just([])), draw(FINITE), draw(FINITE), draw(per_run | st.just([])))


def make_group(sequence: int = 0, **fields: Any) -> Group:
    sample = {"tokens": [1, 2, 3], "logprobs": [0.0, -0.5, -1.25], "loss_mask": [0, 1, 1], "versions": [0, 4, 4]}
    runs = [RolloutRun([RolloutSample(**(sample | fields), reward=reward)]) for reward in (0.0, 1.0)]
    return Group(sequence, 7, 1, 4, runs, [-1.0, 1.0], 1.5, 2.5, [0.25, 0.5])


class TestGroups:
    @given(st.lists(finished_groups(), max_size=3))
    @settings(max_examples=30, deadline=None)
    def test_come_back_as_they_were(self, groups: list[Group]) -> None:
        assert decode_groups(encode_groups(groups)) == groups

    def test_numbers_that_are_not_equal_to_themselves_keep_their_bits(self) -> None:
        """Log-probs of tokens that are not trained are anything."""
        logprobs = [math.nan, -math.inf, -0.0]
        (group,) = decode_groups(encode_groups([make_group(logprobs=logprobs)]))
        found = group.runs[0].segments[0].logprobs
        assert np.array(found).tobytes() == np.array(logprobs).tobytes()

    def test_float32_is_enough_where_it_is_exact(self) -> None:
        assert narrow(np.array([0.5, -0.25, math.inf])).dtype == "<f4"
        assert narrow(np.array([0.1])).dtype == narrow(np.array([1e300])).dtype == "<f8"
        assert [narrow(np.array([top])).dtype.itemsize for top in (255, 256, 65_536, 2**32)] == [1, 2, 4, 8]
        assert narrow(np.array([-1])).tolist() == [-1]

    def test_info_becomes_what_json_can_hold(self) -> None:
        info = {"path": Path("a/b"), "score": math.nan, "pair": (1, 2)}
        for given_info, expected in (
            (info, {"path": "a/b", "score": None, "pair": [1, 2]}),
            ({(1, 2): "odd"}, {"(1, 2)": "odd"}),
            ({"half": "\ud800 of a pair, and\na line"}, {"half": "\ud800 of a pair, and\na line"}),
        ):
            (group,) = decode_groups(encode_groups([make_group(info=given_info)]))
            assert group.runs[0].segments[0].info == expected

    def test_samples_whose_columns_differ_are_refused(self) -> None:
        with pytest.raises(AssertionError, match=r"columns of \[2, 3\] tokens"):
            encode_groups([make_group(loss_mask=[0, 1])])

    def test_every_flipped_bit_and_every_cut_is_found(self) -> None:
        data = encode_groups([make_group()])
        for place in range(len(data)):
            flipped = data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :]
            for broken in (flipped, data[:place]):
                with pytest.raises(DataError):
                    decode_groups(broken)
        with pytest.raises(DataError):
            decode_groups(data + b"\0")

    def test_a_newer_format_is_named(self) -> None:
        newer = pack({}, {}).replace(MAGIC, MAGIC[:-1] + b"\x02", 1)
        with pytest.raises(DataError, match="format 2 of asyncrl, and this version reads 1"):
            unpack(newer)
        with pytest.raises(DataError, match="found something else"):
            unpack(b"not one of ours at all")


def record(folder: Path, steps: list[int], *, after_step: int = 0) -> Path:
    recorder = SampleRecorder(folder, after_step=after_step, settings=SETTINGS)
    for step in steps:
        recorder.write(step, [[make_group(10 * step), make_group(10 * step + 1)], [make_group(10 * step + 2)]])
    recorder.close()
    return recorder.path


def sequences(folder: Path) -> dict[int, list[list[int]]]:
    """Step -> the groups of each chunk."""
    found = read_samples(folder)
    return {read.step: [[group.sequence for group in chunk] for chunk in read.chunks()] for read in found}


class TestRecorder:
    def test_gives_back_what_each_step_was_given(self, tmp_path: Path) -> None:
        record(tmp_path / "samples", [1, 2])
        assert sequences(tmp_path / "samples") == {1: [[10, 11], [12]], 2: [[20, 21], [22]]}
        first = read_samples(tmp_path / "samples")[0]
        assert first.chunks() == [[make_group(10), make_group(11)], [make_group(12)]]
        assert (first.failed, first.recording.after_step, first.recording.settings) == (None, 0, SETTINGS)

    def test_keeps_steps_that_were_given_up_beside_the_one_that_was_taken(self, tmp_path: Path) -> None:
        recorder = SampleRecorder(tmp_path, after_step=0, settings=SETTINGS)
        recorder.write(1, [[make_group(3)]], failed="its loss is nan")
        recorder.write(1, [[make_group(4)]])
        recorder.close()
        found = [(read.step, read.failed, read.chunks()[0][0].sequence) for read in read_samples(tmp_path)]
        assert found == [(1, "its loss is nan", 3), (1, None, 4)]

    def test_a_life_goes_on_after_its_checkpoint(self, tmp_path: Path) -> None:
        record(tmp_path, [1, 2, 3, 4])
        record(tmp_path, [3], after_step=2)
        record(tmp_path, [4, 5], after_step=3)
        assert [(read.step, read.recording.path.name) for read in read_samples(tmp_path)] == [
            (1, "life-0.bin"),
            (2, "life-0.bin"),
            (3, "life-1.bin"),
            (4, "life-2.bin"),
            (5, "life-2.bin"),
        ]
        record(tmp_path, [1], after_step=0)
        assert [read.step for read in read_samples(tmp_path)] == [1], "from the start again: all before it is undone"

    def test_only_the_user_can_read_it(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            path = record(tmp_path / "samples", [1])
        finally:
            os.umask(before)
        assert [stat.S_IMODE(entry.stat().st_mode) for entry in (path, path.parent)] == [0o600, 0o700]

    def test_a_cut_anywhere_leaves_the_whole_steps(self, tmp_path: Path) -> None:
        path = record(tmp_path, [1, 2, 3])
        data = path.read_bytes()
        first = read_samples(tmp_path)[1]._position
        seen = set()
        for length in range(0, len(data), 7):
            path.write_bytes(data[:length])
            if length < first:
                with pytest.raises(DataError, match="holds no recorded samples"):
                    read_samples(tmp_path)
            else:
                seen.add(tuple(sequences(tmp_path)))
        assert seen == {(1,), (1, 2)}

    def test_a_damaged_step_is_named(self, tmp_path: Path) -> None:
        path = record(tmp_path, [1, 2])
        path.write_bytes(path.read_bytes()[:-3] + b"???")
        first, second = read_samples(tmp_path)
        assert first.chunks()
        with pytest.raises(DataError, match=r"what step 2 was given cannot be read: .*damaged.* --from step-"):
            second.chunks()

    def test_what_a_power_cut_leaves_behind_is_left_out(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = record(tmp_path, [1])
        path.write_bytes(path.read_bytes() + bytes(4096))
        assert list(sequences(tmp_path)) == [1]
        assert "cannot be read" in capfd.readouterr().out

    async def test_a_flush_brings_all_to_the_disk(self, tmp_path: Path) -> None:
        recorder = SampleRecorder(tmp_path, after_step=0, settings=SETTINGS)
        for step in range(1, 11):
            recorder.write(step, [[make_group()]])
        await recorder.flush()
        assert len(read_samples(tmp_path)) == 10
        recorder.close()
        recorder.close()
        await recorder.flush()

    async def test_a_full_disk_is_told_by_every_call_that_follows(self, tmp_path: Path) -> None:
        recorder = SampleRecorder(tmp_path, after_step=0, settings=SETTINGS)
        recorder.write(1, [[make_group()]])
        await recorder.flush()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (recorder.path.stat().st_size + 100, limits[1]))
        try:
            recorder.write(2, [[make_group()] * 500])
            with pytest.raises(EngineError, match=r"cannot be recorded in .*life-0.bin: File too large"):
                await recorder.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with pytest.raises(EngineError, match="File too large"):
            recorder.write(3, [[make_group()]])
        with pytest.raises(EngineError, match="File too large"):
            await recorder.flush()
        with pytest.raises(EngineError, match="File too large"):
            recorder.close()
        assert list(sequences(tmp_path)) == [1]

    async def test_a_disk_that_stands_still_ends_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        moves, frame = threading.Event(), samples._frame
        monkeypatch.setattr(samples, "_frame", lambda job: frame(job) if moves.wait(20) else b"")
        monkeypatch.setattr(samples, "DISK_LIMIT_S", 0.02)
        recorder = SampleRecorder(tmp_path, after_step=0, settings=SETTINGS)
        for step in range(samples.MOST_WAITING):
            recorder.write(step, [[make_group()]])
        while recorder._jobs.qsize() < samples.MOST_WAITING:  # the thread has taken one, and no more
            recorder.write(step, [[make_group()]])
        with pytest.raises(EngineError, match=rf"{samples.MOST_WAITING} steps wait for .*record_samples=false"):
            recorder.write(step, [[make_group()]])
        with pytest.raises(EngineError, match="does not take what is trained on"):
            await recorder.flush()
        with pytest.raises(EngineError, match="does not take what is trained on"):
            recorder.close()
        moves.set()
        recorder._thread.join(20)

    def test_kill_9_leaves_whole_steps(self, tmp_path: Path) -> None:
        code = (
            "import sys\nfrom pathlib import Path\nfrom tests.storage.test_samples import make_group\n"
            "from asyncrl.storage.samples import SampleRecorder\n"
            "recorder = SampleRecorder(Path(sys.argv[1]), after_step=0, settings={})\n"
            "step = 0\n"
            "while True:\n"
            "    if recorder._jobs.qsize() < 20:\n"
            "        step += 1\n"
            "        recorder.write(step, [[make_group(10 * step)] * 20])\n"
        )
        root = Path(__file__).parents[2]
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root)
        path = tmp_path / "life-0.bin"
        deadline = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 100_000) and time.monotonic() < deadline:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        found = read_samples(tmp_path)
        assert [read.step for read in found] == list(range(1, len(found) + 1))
        assert all(read.chunks()[0][0].sequence == 10 * read.step for read in found)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="record_samples = false"):
            read_samples(tmp_path / "samples")
