from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncrl.errors import ConfigError, DataError
from asyncrl.reports.run_data import FATES, key_of, load_run, read_records
from asyncrl.reports.settings import by_seed, changed, differing, labels
from asyncrl.storage.ledger import Ledger
from asyncrl.storage.ledger_file import LedgerStore, read_ledger
from tests.reports.runs import make_run


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", steps=10))
    assert (run.name, run.state, len(run.steps), run.account.steps) == ("run", "ended", 10, 10)
    assert run.steps["step"].tolist() == list(range(1, 11))
    assert np.isnan(run.steps["no_such_metric"]).all()
    assert run.evaluations["eval_reward"].tolist() == pytest.approx([0.2, 0.8])
    assert run.ledger == {"admitted": 40, "trained": 30, "filtered": 10, "rejected": 0, "pending": 0}
    assert len(run.timeline) == 1
    assert run.settings["staleness.max_staleness"] == 2
    assert len(list(run.rollouts())) == 21
    fates = run.fates.of(0, np.array([0.0, 3.0, 39.0, 40.0]))
    assert [FATES[fate] if fate >= 0 else None for fate in fates] == ["trained", "filtered", "filtered", None]


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    """A run that has just begun, or an old one, has only some of its files."""
    root = make_run(tmp_path / "run")
    for name in ("summary.json", "ledger.db", "rollouts.jsonl", "evaluations.jsonl", "config.toml"):
        (root / name).unlink()
    for path in (root / "timeline" / "life-0").iterdir():
        path.unlink()
    run = load_run(root)
    assert (run.state, run.ledger, len(run.evaluations), list(run.rollouts())) == ("going on", {}, 0, [])
    assert not run.timeline
    (root / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds no run"):
        load_run(root)
    with pytest.raises(ConfigError, match="there is no run folder"):
        load_run(tmp_path / "none")


@pytest.mark.parametrize(
    ("summary", "state"), [('{"error": "x"}', "failed"), ('{"interrupted": true}', "interrupted"), ("{}", "ended")]
)
def test_how_it_ended(tmp_path: Path, summary: str, state: str) -> None:
    root = make_run(tmp_path / "run", steps=1)
    (root / "summary.json").write_text(summary)
    assert load_run(root).state == state


def test_records_become_columns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 0.5, "word": "x"}\n{"step": 2, "a": null, "b": 3}\n{"step": 3, "a"')
    seen: list[Any] = []
    found = read_records(path, seen.append)
    assert len(found) == len(seen) == 2
    assert "word" not in found
    assert [found["a"][0], found["b"][1]] == [0.5, 3.0]
    assert math.isnan(found["a"][1])
    assert math.isnan(found["b"][0])
    assert len(read_records(tmp_path / "none.jsonl")) == 0


@pytest.mark.parametrize("line", ["{broken\n", "[1, 2]\n"])
def test_a_damaged_file_is_named(tmp_path: Path, line: str) -> None:
    root = make_run(tmp_path / "run", steps=2)
    with (root / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 3: this is not a record"):
        load_run(root)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=1)
    (root / "config.toml").write_text("model = ")
    with pytest.raises(DataError, match=r"config\.toml cannot be read"):
        load_run(root)


def test_a_group_is_followed_through_lives(tmp_path: Path) -> None:
    """What a resume took back is undone; a draw that was rolled out again is another group."""
    path = tmp_path / "ledger.db"
    store = LedgerStore.open(path, resumed_at=None)
    ledger = Ledger(store)
    for row in range(3):
        ledger.admit((0, row), row, 0)
    ledger.finished((0, 0), 0, [1.0])
    state = ledger.state()
    ledger.finished((0, 1), 0, [1.0])
    ledger.trained((0, 1), 1)  # undone by what follows
    ledger.close()
    store = LedgerStore.open(path, resumed_at=state["position"])
    ledger = Ledger(store)
    ledger.restore(state)
    ledger.trained((0, 0), 1)
    ledger.requeue((0, 1), 3, 1)
    ledger.finished((0, 1), 1, [1.0])
    ledger.filtered((0, 1))
    ledger.close()
    (tmp_path / "metrics.jsonl").write_text("")
    run = load_run(tmp_path)
    fates = dict(zip(run.fates.keys.tolist(), (FATES[fate] for fate in run.fates.fates), strict=True))
    assert fates == {
        key_of(0, 0): "trained",
        key_of(0, 1): "restarted",
        key_of(0, 2): "pending",
        key_of(1, 3): "filtered",
    }
    assert run.ledger == {"admitted": 3, "trained": 1, "filtered": 1, "rejected": 0, "pending": 1}


def test_some_draws_are_a_fair_sample(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=500)
    with read_ledger(root / "ledger.db") as ledger:
        everything, some = list(ledger.some_draws(1)), list(ledger.some_draws(4))
        assert len(everything) == len(list(ledger.events()))
    rows = {event.row for event in some}
    assert 0.2 < len(rows) / 2000 < 0.3
    assert len(some) == 3 * len(rows)  # a draw is there with all that became of it
    assert 0.35 < len({row for row in rows if row < 1000}) / len(rows) < 0.65


def test_settings_tell_runs_apart(tmp_path: Path) -> None:
    runs = [
        load_run(make_run(tmp_path / f"{staleness}-{seed}", steps=1, staleness=staleness, seed=seed))
        for staleness in (1, 4)
        for seed in (0, 1)
    ]
    assert differing(runs) == ["seed", "staleness.max_staleness"]
    assert labels(runs)[1] == "seed 1 · max_staleness 1"
    assert {name: len(members) for name, members in by_seed(runs).items()} == {
        "max_staleness 1": 2,
        "max_staleness 4": 2,
    }
    assert changed(runs[0]) == {"model": "tiny", "max_steps": 1, "staleness.max_staleness": 1}
    same = [load_run(make_run(tmp_path / name, steps=1)) for name in ("a", "b")]
    assert labels(same) == ["a", "b"]
