"""Each tracker for real: its own package writes its own files, and what was written is read back."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.metrics.sinks import open_sinks
from asyncrl.metrics.trackers import TensorBoardTracker

CONFIG = Config(model="some/model", seed=7)
STEPS = [{"step": step, "reward_mean": step / 4, "loss": math.nan if step == 2 else 0.5} for step in (1, 2, 3)]
EVALUATED = {"eval_version": 1.0, "eval_reward": 0.5}
PRODUCED = [{"rollouts_ended": ended, "rollout_step": 1, "rollout_mean_s": ended / 64} for ended in (32, 64)]
BLOCK = 32768
LIMIT_S = 30.0


def write_all(tracker: str, folder: Path, resumed: int | None = None) -> None:
    """A step, then what belongs to an earlier one, then later steps: as it comes in a run."""
    sinks = open_sinks([tracker], folder, CONFIG, resumed)
    sinks.write(STEPS[0])
    sinks.produced(PRODUCED[0])
    sinks.write(STEPS[1])
    sinks.evaluated(EVALUATED)
    sinks.produced(PRODUCED[1])
    sinks.write(STEPS[2])
    sinks.close()


class TestTensorBoard:
    @pytest.fixture(autouse=True)
    def _package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Files are read in the order of their names, which have a second and a number in them: of a second in which
        several are made, 10 would come before 9."""
        writer = pytest.importorskip("tensorboard.summary.writer.event_file_writer", reason="an optional tracker")
        monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(100))

    @staticmethod
    def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder))
        events.Reload()
        return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    def test_each_kind_has_its_own_axis(self, tmp_path: Path) -> None:
        write_all("tensorboard", tmp_path)
        assert self.scalars(tmp_path / "tensorboard") == {
            "reward_mean": [(1, 0.25), (2, 0.5), (3, 0.75)],
            "loss": [(1, 0.5), (3, 0.5)],
            "eval_reward": [(1, 0.5)],
        }
        assert self.scalars(tmp_path / "tensorboard" / "rollouts") == {
            "rollout_step": [(32, 1), (64, 1)],
            "rollout_mean_s": [(32, 0.5), (64, 1.0)],
        }

    def test_what_is_written_can_be_read_at_once(self, tmp_path: Path) -> None:
        sinks = open_sinks(["tensorboard"], tmp_path, CONFIG)
        for step in STEPS:
            sinks.write(step)
        wait_for(lambda: len(self.scalars(tmp_path / "tensorboard").get("reward_mean", ())) == len(STEPS))
        sinks.close()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its thread says so too
    def test_a_disk_that_does_not_take_a_record_is_noticed_with_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tensorboard.summary.writer import record_writer

        def full(writer: Any, data: bytes) -> None:
            raise OSError("disk full")

        tracker = TensorBoardTracker(tmp_path, None)
        monkeypatch.setattr(record_writer.RecordWriter, "write", full)
        with pytest.raises(OSError, match="disk full"):
            tracker.log("step", STEPS[0])
        for thread in threading.enumerate():
            if type(thread).__name__ == "_AsyncWriterThread":
                thread.join(LIMIT_S)

    def test_a_run_that_goes_on_forgets_what_was_undone(self, tmp_path: Path) -> None:
        """Also of the rollout side, whose axis counts otherwise: its first record stays."""
        write_all("tensorboard", tmp_path)
        (tmp_path / "producer.jsonl").write_text(json.dumps(PRODUCED[0]) + "\n")
        sinks = open_sinks(["tensorboard"], tmp_path, CONFIG, resumed_step=1)
        sinks.write({"step": 2, "reward_mean": -1.0})
        sinks.produced({"rollouts_ended": 48, "rollout_mean_s": -1.0})
        sinks.close()
        assert self.scalars(tmp_path / "tensorboard")["reward_mean"] == [(1, 0.25), (2, -1.0)]
        assert self.scalars(tmp_path / "tensorboard" / "rollouts")["rollout_mean_s"] == [(32, 0.5), (48, -1.0)]


class TestWandb:
    @pytest.fixture(autouse=True)
    def _package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wandb", reason="an optional tracker")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.delenv("WANDB_PROJECT", raising=False)

    @staticmethod
    def read(folder: Path) -> list[list[Any]]:
        """The records of each file that wandb wrote, oldest first. Its process writes on after `finish`."""
        files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
        wait_for(lambda: all(any(record.HasField("exit") for record in wandb_records(file)) for file in files))
        return [list(wandb_records(file)) for file in files]

    @staticmethod
    def history(records: list[Any]) -> list[dict[str, Any]]:
        rows = (record.history.item for record in records if record.HasField("history"))
        named = ({item.key or item.nested_key[0]: json.loads(item.value_json) for item in row} for row in rows)
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in named]

    def test_each_kind_has_its_own_axis(self, tmp_path: Path) -> None:
        write_all("wandb", tmp_path)
        (records,) = self.read(tmp_path)
        rows = self.history(records)
        expected = [STEPS[0], PRODUCED[0], STEPS[1], EVALUATED, PRODUCED[1], STEPS[2]]
        assert [row.keys() for row in rows] == [row.keys() for row in expected], "nothing of another axis is put in"
        assert math.isnan(rows[2].pop("loss"))
        assert rows[0] == STEPS[0]
        assert (rows[3], rows[4]) == (EVALUATED, PRODUCED[1])
        axes = {record.metric.name: record.metric.step_metric for record in records if record.HasField("metric")}
        assert {name: axis for name, axis in axes.items() if axis} == {
            **dict.fromkeys(("reward_mean", "loss"), "step"),
            "eval_reward": "eval_version",
            **dict.fromkeys(("rollout_step", "rollout_mean_s"), "rollouts_ended"),
        }

    def test_it_knows_the_run(self, tmp_path: Path) -> None:
        write_all("wandb", tmp_path)
        (records,) = self.read(tmp_path)
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.project, run.display_name) == ("asyncrl", tmp_path.name)
        config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in run.config.update}
        assert config["seed"] == 7

    def test_a_run_that_goes_on_is_the_same_run(self, tmp_path: Path) -> None:
        write_all("wandb", tmp_path)
        write_all("wandb", tmp_path, resumed=1)
        runs = [next(record.run for record in records if record.HasField("run")) for records in self.read(tmp_path)]
        assert len(runs) == 2
        assert runs[0].run_id == runs[1].run_id == (tmp_path / "wandb" / "run-id").read_text().strip()


class TestTrackio:
    @pytest.fixture(autouse=True)
    def _package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        utils = pytest.importorskip("trackio.utils", reason="an optional tracker")
        storage = pytest.importorskip("trackio.sqlite_storage")
        for module in (utils, storage):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")  # which it reads when it is imported
        monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
        (tmp_path / "trackio").mkdir()
        (tmp_path / "run").mkdir()

    @staticmethod
    def logs() -> list[dict[str, Any]]:
        from trackio.sqlite_storage import SQLiteStorage

        logs = SQLiteStorage.get_logs("asyncrl", "run")
        return [{name: value for name, value in row.items() if name != "timestamp"} for row in logs]

    def test_each_kind_has_its_own_axis(self, tmp_path: Path) -> None:
        write_all("trackio", tmp_path / "run")
        logs = self.logs()
        assert (tmp_path / "trackio" / "asyncrl.db").exists(), "here, and not in the home of whoever runs the tests"
        assert [row["step"] for row in logs] == [1, 32, 2, 1, 64, 3]
        assert logs[0] == STEPS[0]
        assert math.isnan(logs[2]["loss"])
        assert logs[3] == {**EVALUATED, "step": 1}
        assert logs[4] == {**PRODUCED[1], "step": 64}

    def test_a_run_that_goes_on_is_the_same_run(self, tmp_path: Path) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        write_all("trackio", tmp_path / "run")
        write_all("trackio", tmp_path / "run", resumed=3)
        assert SQLiteStorage.get_runs("asyncrl") == ["run"]
        assert len(self.logs()) == 12


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: 7 bytes of header, then a log of blocks as LevelDB writes them, in which a
    record has a checksum, a length and a kind (1: whole; 2, 3, 4: first, middle and last part)."""
    from wandb.proto import wandb_internal_pb2

    raw, at, parts = path.read_bytes(), 7, b""
    assert raw.startswith(b":W&B")
    while at + 7 <= len(raw):
        if (left := BLOCK - at % BLOCK) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[at : at + 7])
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wait_for(condition: Any, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
