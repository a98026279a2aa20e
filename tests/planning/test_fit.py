"""What is read from a run is what it was made with."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from asyncrl import Config
from asyncrl.planning.fit import least_squares
from asyncrl.planning.predict import Machine, predict
from asyncrl.planning.recorded import workload_of
from asyncrl.planning.sampler_model import SamplerModel
from asyncrl.planning.trainer_model import TrainerModel
from asyncrl.planning.workload import Attempt
from asyncrl.reports.run_data import RunData
from tests.planning.simulated_run import attempt_of, pool, signal_share, simulated_run

TRUE = Machine(
    SamplerModel(token_s=0.02, running_s=0.002, prompt_s=0.0, call_s=0.05, hot_load_s=(0.2,), slowdown=0.6),
    TrainerModel(step_s=0.3, token_s=2e-4, export_s=0.1, slowdown=0.4),
)


def config_of(**settings: object) -> Config:
    window = {"min_window": 48, "max_window": 48}
    return Config(
        **{
            "model": "none",
            "completions_per_prompt": 4,
            "prompt_groups_per_step": 8,
            "concurrency": window,
            "staleness": {"max_staleness": 1},
            "publish": {"canary": False},
            "max_steps": 60,
            "sampler": {"max_running": 1000},
            **settings,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return simulated_run(tmp_path_factory.mktemp("fit") / "run", config_of(), TRUE)


def test_the_machine_is_found_again(run: RunData) -> None:
    found = Machine.of_run(run, workload_of(run))
    for requests in (1, 4, 16, 32):
        true = TRUE.sampler.token_time(requests) * 30 + TRUE.sampler.call_s
        assert found.sampler.token_time(requests) * 30 + found.sampler.call_s == pytest.approx(true, rel=0.1)
    assert found.sampler.slowdown == pytest.approx(0.6, abs=0.15)
    assert set(np.round(found.sampler.hot_load_s, 6)) == {0.2}
    assert found.trainer.export_s == pytest.approx(0.1, rel=0.1)
    busy_s, true_s = ((t.step_s + 1600 * t.token_s) * (1 + t.slowdown) for t in (found.trainer, TRUE.trainer))
    assert busy_s == pytest.approx(true_s, rel=0.1)


def test_the_workload_is_found_again(run: RunData) -> None:
    workload = workload_of(run)
    rng = random.Random(5)
    drawn = [attempt_of(rng) for _ in range(20_000)]
    assert workload.mean_drawn == pytest.approx(np.mean([attempt.drawn for attempt in drawn]), rel=0.05)
    assert workload.mean_idle_s == pytest.approx(np.mean([attempt.idle_s for attempt in drawn]), rel=0.05)
    assert {len(attempt.turns) for attempt in workload.attempts} == {1}
    assert {len(row) for row in workload.rows} == {4}
    assert signal_share(workload) == 1
    assert {attempt.outcome for attempt in workload.attempts} == {"done"}


@pytest.mark.parametrize(
    "settings",
    [
        {"staleness": {"max_staleness": 0}},
        {"staleness": {"max_staleness": 4}},
        {"staleness": {"max_staleness": 2, "policy": "pace"}},
        {"concurrency": {"min_window": 16, "max_window": 16}},
        {
            "completions_per_prompt": 8,
            "prompt_groups_per_step": 4,
            "publish": {"canary": False, "weight_sync_interval": 2},
        },
    ],
    ids=["on-policy", "wait", "pace", "few slots", "other groups, every second step"],
)
def test_other_settings_are_as_predicted(run: RunData, tmp_path: Path, settings: dict[str, object]) -> None:
    """Everything is known here but what the run told, so this is the error of the method alone."""
    config = config_of(**settings)
    workload = workload_of(run)
    found = predict(config, Machine.of_run(run, workload), workload, steps=150)
    true = predict(config, TRUE, pool(attempt_of_noise), steps=150)
    assert found.samples_per_s == pytest.approx(true.samples_per_s, rel=0.08)
    assert found.staleness_mean == pytest.approx(true.staleness_mean, rel=0.08, abs=0.02)


def attempt_of_noise(rng: random.Random) -> Attempt:
    attempt = attempt_of(rng)
    return Attempt(attempt.turns, attempt.after_s, reward=rng.random(), tokens=attempt.tokens)


def test_least_squares_has_no_negative_part() -> None:
    """Of y = 2 a - b with a, b >= 0 only a stays, and it alone fits best with 1.5."""
    columns = np.array([[1.0, 0.0], [1.0, 1.0]])
    assert least_squares(columns, np.array([2.0, 1.0])) == pytest.approx([1.5, 0.0])
    assert least_squares(columns, np.array([2.0, 5.0])) == pytest.approx([2.0, 3.0])
