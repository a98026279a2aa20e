from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.cli.config import load_config
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.storage.environment import git_state
from asyncrl.storage.folder import RunFolder, config_toml


def test_default_folder_is_new_each_time_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (RunFolder.create(Config(model="m")) for _ in range(2))
    assert first.root != second.root
    assert first.root.parent == tmp_path / "runs"
    assert stat.S_IMODE(first.root.stat().st_mode) == 0o700
    assert first.logs.is_dir()


def test_config_as_used_reads_back_the_same(tmp_path: Path) -> None:
    config = Config(
        model='odd "name"\n\x7f',
        run_dir=tmp_path / "run",
        max_steps=3,
        trackers=("wandb",),
        loss={"tis_cap": None, "eps_high": 0.28, "normalization": "none"},  # None where it is not the default
        optimizer={"grad_clip_norm": None, "learning_rate": 1e-7},
        lora={"rank": 8, "targets": ("q_proj", "v_proj")},
    )
    folder = RunFolder.create(config)
    assert load_config(folder.config) == config
    assert "max_rows" not in folder.config.read_text()


def test_a_function_is_written_by_its_name() -> None:
    def my_advantage(rewards: list[float]) -> list[float]:
        return rewards

    assert "my_advantage" in config_toml(Config(model="m", advantage=my_advantage))


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "summary.json", "model"])
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(ConfigError, match=rf"already holds a run \({name}\)"):
        RunFolder.create(Config(model="m", run_dir=tmp_path))
    assert (tmp_path / name).read_text() == "old"


def test_an_empty_folder_is_used_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert RunFolder.create(Config(model="m", run_dir=tmp_path)).config.is_file()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755  # the user's own folder keeps its rights


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be used: Not a directory"):
        RunFolder.create(Config(model="m", run_dir=tmp_path / "file" / "run"))


def test_environment_says_what_the_run_ran_on(tmp_path: Path) -> None:
    folder = RunFolder.create(Config(model="m", run_dir=tmp_path / "run"))
    environment = json.loads(folder.environment.read_text())
    assert {"python", "platform", "cwd", "command", "git", "started_at"} <= set(environment)
    assert "torch" in environment["packages"]


def test_git_state_of_a_commit_and_a_change(tmp_path: Path) -> None:
    identity = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.hooksPath=/dev/null", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | identity, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_git_state_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_summary_is_readable_json(tmp_path: Path) -> None:
    folder = RunFolder.create(Config(model="m", run_dir=tmp_path / "run"))
    folder.write_summary({"steps": 3, "loss": float("nan"), "model": folder.model})
    assert json.loads(folder.summary.read_text()) == {"steps": 3, "loss": None, "model": str(folder.model)}
    assert not list(folder.root.glob(".*.unfinished"))


def test_two_cannot_work_in_one_folder(tmp_path: Path) -> None:
    config = Config(model="m", run_dir=tmp_path / "run")
    folder = RunFolder.create(config)
    with folder.lock():
        for again in (folder.lock, lambda: RunFolder(folder.root).lock()):
            with pytest.raises(ConfigError, match=rf"process {os.getpid()} of .* is working on"), again():
                pass
        with pytest.raises(ConfigError, match="is working on"):  # before it has left anything that could be overwritten
            RunFolder.create(config)
    with folder.lock():
        pass


def test_the_lock_of_a_process_that_was_killed_is_lifted(tmp_path: Path) -> None:
    folder = RunFolder.create(Config(model="m", run_dir=tmp_path / "run"))
    code = (
        "import pathlib, sys\nfrom asyncrl.storage.folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).lock():\n    print('locked', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(folder.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=rf"process {other.pid} of"), folder.lock():
            pass
        other.kill()
    with folder.lock():
        assert (folder.root / ".lock").read_text().startswith(f"process {os.getpid()} ")
    assert stat.S_IMODE((folder.root / ".lock").stat().st_mode) == 0o600
