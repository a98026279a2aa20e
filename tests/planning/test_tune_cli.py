from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from asyncrl.cli.main import main

CONFIG = 'model = "m"\ncompletions_per_prompt = 4\nprompt_groups_per_step = 2\n'
SMALL = ("--rollout", "lognormal(median=2s, p95=10s)", "--step", "2s", "--jobs", "1", "--steps", "20")
FEW = ("--max-staleness", "0,2", "--policy", "wait,mask", "--window", "8")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


def test_it_prints_a_table_and_a_recommendation_and_writes_a_page(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", "run.toml", *SMALL, *FEW]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines() if " wait " in line or " mask " in line]
    assert [row[row.index("wait" if "wait" in row else "mask") + 1] for row in rows if "<-" not in row][:1] == ["4"]
    assert sum("<-" in row for row in rows) == 1
    assert "Recommended" in out
    assert "[staleness]" in out
    assert "(assumed: --publish)" in out
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out + err
    page = (project / "tune.html").read_text()
    assert "Rate against mean staleness" in page
    assert "tune.html" in err
    assert err.startswith("simulating 1 setting ...\nsimulating 5 settings ...\n")
    assert "Leave [concurrency] out" in " ".join(out.split())


def test_json_for_programs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "run.toml", *SMALL, *FEW, "--json", "--staleness.max_staleness", "1"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["now"]["setting"]["max_staleness"] == 1
    assert len(found["points"]) == 4
    assert found["recommended"]["setting"] in [point["setting"] for point in found["points"]]
    assert all(0 <= point["share"] <= 1 for point in found["points"])
    assert not (project / "tune.html").exists()


def test_the_same_seed_gives_the_same_plan(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for seed in ("1", "1", "2"):
        one = ("--max-staleness", "1", "--policy", "wait", "--window", "8")
        assert main(["tune", "run.toml", *SMALL, *one, "--json", "--seed", seed]) == 0
        told.append(json.loads(capsys.readouterr().out)["points"])
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.toml", *SMALL], "there is no run folder and no config file nothing.toml"),
        (["run.toml", *SMALL, "--out", "run.toml"], "run.toml is another file"),
        (["run.toml", *SMALL, "--out", "nowhere/plan.html"], "there is no folder nowhere"),
        (["run.toml", *SMALL, "--json", "--out", "empty"], "empty is a folder"),
        (["run.toml"], "--tokens"),
        (["run.toml", *SMALL, "--policy", "hope"], "--policy has 'hope'"),
        (["run.toml", *SMALL, "--max-staleness", "1;2"], "--max-staleness has '1;2'"),
        (["run.toml", *SMALL, "--window", "0"], "--window has '0'"),
        (["run.toml", *SMALL, "--give", "2"], "--give is '2'"),
        (["run.toml", *SMALL, "--replicas", "0"], "--replicas is 0"),
        (["run.toml", *SMALL, "--steps", "1"], "--steps is 1"),
        (["run.toml", *SMALL, "--seed=-1"], "--seed is -1"),
        (["run.toml", *SMALL, "--no_such", "1"], "no_such"),
        (["run.toml", *SMALL, "--max-staleness", "0", "--sync", "3"], "no step could ever be published"),
        (["empty"], "holds no run"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_simulated(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    (project / "empty").mkdir()
    assert main(["tune", *arguments]) == 2
    out, err = capsys.readouterr()
    assert says in " ".join(err.split())
    assert out == ""


def test_ctrl_c_ends_it_and_its_processes(project: Path) -> None:
    code = "import sys; from asyncrl.cli.main import run; run()"
    command = [sys.executable, "-c", code, "tune", "run.toml", *SMALL[:4], "--steps", "100000", "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    deadline = time.monotonic() + 30
    children: list[psutil.Process] = []
    while sum(child.cpu_times().user > 0.3 for child in children) < 2:
        assert time.monotonic() < deadline, "it has not begun"
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.decode().splitlines()[1:] == ["stopped"]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
