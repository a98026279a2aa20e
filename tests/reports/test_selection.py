"""What was trained against all: the numbers are worked out by hand, and the intervals hold what they promise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from asyncrl.reports.run_data import FATES, load_run
from asyncrl.reports.selection import Rollouts, difference, rollouts_of, selection, sentence
from asyncrl.storage.timeline import DONE
from tests.reports.runs import make_run

TRAINED, FILTERED = FATES.index("trained"), FATES.index("filtered")


def rollouts(tokens: np.ndarray, trained: np.ndarray, members: int = 4) -> Rollouts:
    """Groups of `members`: tokens [G, members], trained [G]."""
    count = tokens.size
    group = np.repeat(np.arange(len(tokens)), members)
    fate = np.repeat(np.where(trained, TRAINED, FILTERED), members)
    flat = tokens.reshape(-1).astype(float)
    return Rollouts(group, fate, np.full(count, DONE), flat, np.ones(count), np.zeros(count), open=0)


def test_a_difference_by_hand() -> None:
    """Half of the groups have 80 tokens and are trained, the others 120: 80 against a mean of 100."""
    trained = np.arange(80) % 2 == 0
    tokens = np.where(trained, 80, 120)[:, None].repeat(4, axis=1)
    found = difference(rollouts(tokens, trained), "tokens")
    assert found is not None
    assert (found.all, found.trained, found.value) == (100.0, 80.0, pytest.approx(-0.2))
    assert found.distance == pytest.approx(0.5)
    assert found.low < -0.2 < found.high < 0
    assert found.clear
    words = sentence(rollouts(tokens, trained))
    assert words.startswith("Of 320 rollouts that ended, 160 were trained (50%).")
    assert "those trained are 20.0% shorter" in words
    assert "No clear difference in duration or reward." in words


def test_too_few_groups_are_called_so() -> None:
    found = rollouts(np.full((40, 4), 10.0), np.arange(40) < 20)
    assert difference(found, "tokens") is None
    assert "too few groups" in sentence(found)
    assert "cannot be told" in sentence(rollouts_of([]))


@pytest.mark.parametrize(("bias", "members"), [(0.0, 4), (0.0, 1), (0.3, 4)])
def test_the_interval_holds_the_truth_in_95_of_100_cases(bias: float, members: int) -> None:
    """Members of a group are alike, so an interval that counted rollouts would be too narrow by far."""
    chance = np.random.default_rng(0)
    truth = bias / 2 / (1 + bias / 2) * -1  # the share by which the trained mean lies below the mean of all
    held = 0
    for _ in range(300):
        trained = chance.random(200) < 0.5
        of_group = np.where(trained, 1.0, 1.0 + bias) * chance.lognormal(0, 0.5, 200)
        tokens = of_group[:, None] * chance.lognormal(0, 0.1, (200, members))
        found = difference(rollouts(tokens, trained, members), "tokens")
        assert found is not None
        held += found.low <= truth <= found.high
    assert 0.90 < held / 300 < 0.99


def test_the_ledger_and_the_timeline_are_joined(tmp_path: Path) -> None:
    """Of 160 groups every fourth is filtered, and those take twice as long; 16 first attempts time out."""
    run = load_run(make_run(tmp_path / "run", steps=40))
    found = rollouts_of([run])
    assert len(found) == 2 * 160 + 16
    assert int(found.trained.sum()) == 2 * 120
    assert len(np.unique(found.group)) == 160
    lengths = difference(found, "tokens")
    assert lengths is not None
    assert lengths.trained == pytest.approx(100, rel=0.02)
    assert lengths.all == pytest.approx(125, rel=0.02)
    assert lengths.value == pytest.approx(-0.2, abs=0.02)
    ends = {
        row[0]: row[1] for block in selection([run]).blocks if block["id"] == "selection-ends" for row in block["rows"]
    }
    assert ends == {"trained": 240, "group filtered": 80, "timed out": 16}
    assert selection([run]).blocks[0]["tone"] == "warn"  # a fifth shorter: the reader must know


def test_two_runs_keep_their_groups_apart(tmp_path: Path) -> None:
    runs = [load_run(make_run(tmp_path / name, steps=10)) for name in ("a", "b")]
    assert len(np.unique(rollouts_of(runs).group)) == 80
