from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.lives import open_life
from asyncrl.metrics.rewind import AXES, rewind
from asyncrl.metrics.sinks import open_sinks


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_of_later_steps_are_taken_out_and_kept(tmp_path: Path) -> None:
    for name, axis in AXES.items():
        (tmp_path / name).write_text("".join(f'{{"{axis}": {step}, "text": "a\\nb"}}\n' for step in (1, 3, 2, 4)))
    rewind(tmp_path, 2)
    for name, axis in AXES.items():
        assert [record[axis] for record in lines(tmp_path / name)] == [1, 2]
        assert [record[axis] for record in lines(tmp_path / "logs" / "undone" / name)] == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*AXES, "logs"])


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"st', ""])
def test_a_line_that_the_end_cut_off_goes_too(tmp_path: Path, torn: str) -> None:
    whole = '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + torn)
    rewind(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == whole
    undone = tmp_path / "logs" / "undone" / "metrics.jsonl"
    assert (undone.read_text() if undone.exists() else "") == (torn + "\n" if torn else "")


def test_a_run_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    config = Config(model="m")
    for resumed, steps in ((None, (1, 2, 3)), (2, (3, 4)), (3, (4, 5)), (0, (1,))):
        if resumed is not None:
            rewind(tmp_path, resumed)
        sinks = open_sinks((), tmp_path, config, resumed)
        for step in steps:
            sinks.write({"step": step})
        sinks.evaluated({"eval_version": steps[-1]})
        sinks.close()
        if resumed == 3:
            assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
            assert [record["eval_version"] for record in lines(tmp_path / "evaluations.jsonl")] == [5]
    assert [record["step"] for record in lines(tmp_path / "metrics.jsonl")] == [1]


def test_a_new_run_in_the_folder_of_one_that_failed_early_has_its_own_records_alone(tmp_path: Path) -> None:
    """It had rolled out, and failed in its first optimizer step."""
    config, rows = Config(model="m", run_dir=tmp_path / "run"), [{"n": 1}]
    with open_life(config, rows, False) as life:
        (life.folder.root / "producer.jsonl").write_text('{"rollout_step": 1}\n')
        life.folder.metrics.touch()
    with open_life(config, rows, False) as life:
        assert (life.folder.root / "producer.jsonl").read_text() == ""
        assert lines(life.folder.logs / "undone" / "producer.jsonl") == [{"rollout_step": 1}]
