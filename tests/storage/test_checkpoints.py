"""Checkpoint folders: whole or not there, found by name, and what may go is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncrl.errors import CheckpointError
from asyncrl.storage.checkpoints import Checkpoint, Checkpoints, resolve


def save(run: Path, step: int) -> Checkpoint:
    run.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(run)
    unfinished = checkpoints.begin(step)
    (unfinished / "trainer").mkdir()
    (unfinished / "trainer" / "weights").write_bytes(b"w" * step)
    (unfinished / "state.json").write_text(json.dumps({"loop": {"step": step}}))
    return checkpoints.commit(step, {"reason": "interval"})


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in Checkpoints(run).all()]


def test_what_was_committed_is_found_and_listed(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).latest() is None
    save(tmp_path, 3)
    save(tmp_path, 1_000_012)
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None
    assert latest.step == 1_000_012
    assert latest.state() == {"loop": {"step": 1_000_012}}
    lines = [json.loads(line) for line in (tmp_path / "checkpoints.jsonl").read_text().splitlines()]
    assert [(line["name"], line["step"], line["reason"]) for line in lines] == [
        ("step-000003", 3, "interval"),
        ("step-1000012", 1_000_012, "interval"),
    ]


def test_what_is_not_committed_is_never_picked(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (Checkpoints(tmp_path).begin(5) / "state.json").write_text("{}")
    assert steps(tmp_path) == [3]
    assert resolve(str(tmp_path)).step == 3


@pytest.mark.parametrize("harm", ["shorter", "missing", "manifest", "no manifest"])
def test_one_that_lost_a_file_is_passed_over_and_refused_by_name(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 3)
    folder = save(tmp_path, 5).folder
    if harm == "shorter":
        (folder / "trainer" / "weights").write_bytes(b"w")
    elif harm == "missing":
        (folder / "trainer" / "weights").unlink()
    elif harm == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    assert resolve(str(tmp_path)).step == 3
    with pytest.raises(CheckpointError, match="not whole"):
        resolve(f"{tmp_path}:step-000005")


def test_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in range(1, 10):
        save(tmp_path, step)
        Checkpoints(tmp_path).prune(keep_last=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-000004",
        "step-000008",
        "step-000009",
    ]


def test_a_resume_from_an_earlier_one_sets_the_later_ones_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    Checkpoints(tmp_path).begin(8)
    earlier = Checkpoints(tmp_path).named("step-000002")
    Checkpoints(tmp_path).go_on_from(earlier, life=1)
    assert steps(tmp_path) == [2]
    assert resolve(f"{tmp_path}:step-000006.life-0").step == 6
    save(tmp_path, 4)
    assert steps(tmp_path) == [2, 4]
    Checkpoints(tmp_path).go_on_from(None, life=2)
    assert steps(tmp_path) == []


def test_checkpoints_are_named_across_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = tmp_path / "runs" / "first"
    folder = save(job, 2).folder
    save(job, 4)
    for which, step in (
        ("first", 4),
        ("first:step-000002", 2),
        ("runs/first", 4),
        (str(job), 4),
        (f"{job}:step-000002", 2),
        (f"{job}:latest", 4),
        (str(folder), 2),
    ):
        assert resolve(which).step == step, which
    assert resolve("first:step-000002", beside=tmp_path / "runs").step == 2


def test_what_cannot_be_gone_on_from_is_refused_by_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no run folder"):
        resolve(str(run))
    run.mkdir()
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        resolve(str(run))
    save(run, 2)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step-000007'.* There are: step-000002"):
        resolve(f"{run}:step-000007")
    for name in ("config.json", "adapter_config.json"):
        model = tmp_path / name.partition(".")[0]
        model.mkdir()
        (model / name).write_text("{}")
        with pytest.raises(CheckpointError, match="sampler snapshot, without optimizer state"):
            resolve(str(model))
