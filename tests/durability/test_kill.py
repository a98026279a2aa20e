"""kill -9: a run that is killed, wherever it stands, goes on as if nothing had been. benchmarks/kill.py does it a
hundred times."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl.replay import replay
from tests.durability.agent import make_model
from tests.durability.harness import ASYNCHRONOUS, Instant, Nursery, Span, Trial, alive, settings_of
from tests.durability.nursery import MARK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what is left in /proc")

IN_A_COMMIT = {
    "written": Instant(before_touch=2, touching=r"open .*unfinished/manifest.json"),
    "synced": Instant(before_touch=1, touching=r"os.fsync .*unfinished$"),
    "named": Instant(before_touch=1, touching=r"os.rename .*unfinished$"),
    "listed": Instant(before_touch=1, touching=r"open checkpoints.jsonl"),
    "pruned": Instant(before_touch=1, touching=r"os.rename checkpoints/step-"),
    "removed": Instant(before_touch=2, touching=r"os.remove checkpoints/.*removed/"),
}
"""Right before a checkpoint is ..."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("agent") / "model")


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


@pytest.fixture(scope="module")
def undisturbed(nursery: Nursery, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Span]:
    trial = Trial(tmp_path_factory.mktemp("undisturbed") / "trial", settings_of(model))
    life = trial.live(nursery)
    trial.examine(None)
    assert not trial.faults
    return trial, Span(life.seconds, life.touches)


def test_at_each_step_of_a_commit(
    nursery: Nursery, model: Path, undisturbed: tuple[Trial, Span], tmp_path: Path
) -> None:
    """One run dies of all of them, one after the other, and once more while it resumes."""
    trial = Trial(tmp_path / "trial", settings_of(model))
    for instant in [*IN_A_COMMIT.values(), Instant(after_s=0.1)]:
        assert trial.live(nursery, instant).how == "killed", f"{instant} never came: {trial.faults}"
    assert trial.live(nursery).how == "ended"
    trial.examine(undisturbed[0])
    assert not trial.faults


def test_at_random_instants(nursery: Nursery, model: Path, undisturbed: tuple[Trial, Span], tmp_path: Path) -> None:
    reference, span = undisturbed
    trial = Trial(tmp_path / "trial", settings_of(model))
    trial.live_on(nursery, random.Random(2), span, most=2)
    trial.examine(reference)
    assert trial.kills
    assert not trial.faults
    assert not replay(trial.run).differences(), "what its lives have recorded trains the same weights"


def test_while_rollouts_run_ahead(
    nursery: Nursery, model: Path, undisturbed: tuple[Trial, Span], tmp_path: Path
) -> None:
    """With stale rollouts the weights depend on time; the accounts do not."""
    trial = Trial(tmp_path / "trial", settings_of(model, **ASYNCHRONOUS))
    trial.live_on(nursery, random.Random(5), undisturbed[1], most=2)
    trial.examine(None)
    assert trial.kills
    assert not trial.faults


@pytest.mark.parametrize("kept", ["session", "environment"])
def test_what_is_left_behind_is_found(kept: str, tmp_path: Path) -> None:
    """A process that an engine starts may leave the session, or be given another environment."""
    mark, own_session = str(tmp_path), kept == "environment"
    environment = os.environ | ({MARK: mark} if kept == "environment" else {})
    with subprocess.Popen(["sleep", "60"], env=environment, start_new_session=own_session) as left:
        session = os.getsid(0) if kept == "session" else -1
        try:
            assert [found for found in alive(session, mark) if found.startswith(f"process {left.pid}:")]
        finally:
            left.kill()
    assert not [found for found in alive(session, mark) if found.startswith(f"process {left.pid}:")]
