from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from asyncrl.cli.main import main
from tests.storage.ledgers import Run, admit, finish, make_run, tamper

Audited = Callable[..., tuple[int, str]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    make_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def audited(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Audited:
    """Exit code and output of `asyncrl audit`, its spaces squeezed."""
    monkeypatch.setenv("COLUMNS", "120")

    def audited(*arguments: str | Path) -> tuple[int, str]:
        code = main(["audit", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, re.sub(" +", " ", captured.out + captured.err)

    return audited


def test_a_clean_run(root: Path, audited: Audited) -> None:
    code, said = audited(root)
    assert code == 0
    assert f"{root}: clean · its data came to the end: each draw ended once\n" in said
    assert "10 admitted = 8 trained + 1 filtered + 1 rejected + 0 pending\n" in said
    assert "rolled out again: 1 restarted\n" in said
    assert "rejected 1 x: 1 of 4 rollouts survived\n" in said
    lives = [line.split() for line in said.splitlines() if re.match(r"\d [A-Z]", line)]
    assert [line[7:] for line in lives] == [
        ["the", "start", "1-2", "22", "5"],
        ["step", "2", "3-4", "12", "0"],
    ]


def test_what_is_off_is_named(root: Path, audited: Audited) -> None:
    tamper(root, "UPDATE events SET row = 4 WHERE state = 'rejected'")
    code, said = audited(root)
    assert code == 1
    assert f"{root}: off (" in said
    assert "ended twice: row 4 of epoch 1 was rejected, and then trained\n" in said
    assert "coverage: epoch 1 is over, but never had row 3\n" not in said, "it was admitted"
    assert "coverage: row 3 of epoch 1 is admitted at the end of the data\n" in said


def test_many_faults_of_a_kind_are_counted(root: Path, audited: Audited) -> None:
    tamper(root, "UPDATE events SET row = row + 100 WHERE state = 'finished'")
    code, said = audited(root)
    assert code == 1
    assert "unknown draw: row 100 of epoch 0 was finished, but never admitted\n" in said
    assert re.search(r"out of order: ... and \d+ more|coverage: ... and \d+ more", said)


def test_a_run_that_is_going_on(tmp_path: Path, audited: Audited) -> None:
    run = Run(tmp_path)
    ledger = run.begin()
    admit(ledger, (0, 0), (0, 1), (0, 2))
    finish(ledger, (0, 0))
    run.train((0, 0))
    run.save()
    code, said = audited(tmp_path)
    assert code == 0
    assert "clean · running, or killed, last heard of at" in said
    assert "3 admitted = 1 trained + 0 filtered + 0 rejected + 2 pending\n" in said
    ledger.close()


def test_a_row(root: Path, audited: Audited) -> None:
    code, said = audited(root, "--row", "1")
    assert code == 0
    lines = [line.split(maxsplit=3)[3] for line in said.splitlines() if re.match("[A-Z][a-z]{2} ", line)]
    assert [line.strip() for line in lines] == [
        "2 0 0 1 admitted version 0",
        "6 0 0 1 finished version 0, rewards 0, 1",
        "14 0 0 1 trained step 2",
        "16 0 1 6 admitted version 2",
        "19 0 1 6 finished undone, version 2, rewards 0, 1",
        "22 0 1 6 trained undone, step 3",
        "23 1 1 7 restarted version 2",
        "27 1 1 7 finished version 2, rewards 0, 1",
        "32 1 1 7 trained step 3",
    ]
    assert "It has not been admitted." in audited(root, "--row", "77")[1]


def test_what_an_exception_said_cannot_move_the_cursor(tmp_path: Path, audited: Audited) -> None:
    run = Run(tmp_path)
    ledger = run.begin()
    admit(ledger, (0, 0))
    ledger.rejected((0, 0), "step 1 failed: \x1b[2J[red]two\nlines" + "!" * 1000)
    ledger.close()
    for said in (audited(tmp_path)[1], audited(tmp_path, "--row", "0")[1]):
        assert "\x1b" not in said
        assert "\\x1b[2J[red]twolines!!!!!!" in re.sub(r"\s", "", said)
        assert 200 < said.count("!") < 300


def test_there_is_no_ledger(root: Path, tmp_path: Path, audited: Audited) -> None:
    (tmp_path / "empty").mkdir()
    code, said = audited(tmp_path / "empty")
    assert (code, "there is no ledger" in said.replace("\n", " ")) == (2, True)
    code, said = audited(tmp_path / "nowhere")
    assert (code, "there is no run folder" in said.replace("\n", " ")) == (2, True)


def test_several_runs(root: Path, tmp_path: Path, audited: Audited) -> None:
    other = Path(shutil.copytree(root, tmp_path / "other"))
    tamper(other, "DELETE FROM events WHERE id = 3")
    code, said = audited(root, other)
    assert code == 1
    assert f"{root}: clean" in said
    assert f"{other}: off" in said
    code, said = audited(tmp_path / "nowhere", root)
    assert code == 2
    assert f"{tmp_path / 'nowhere'}: there is no run folder" in said
    assert f"{root}: clean" in said, "the others are audited all the same"
