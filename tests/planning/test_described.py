from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import mean, median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.planning.described import Description, changed, described, share
from asyncrl.planning.distributions import Lognormal, Pareto, shape
from asyncrl.planning.notation import COUNTS, TIMES, distribution, quantity
from asyncrl.planning.predict import Machine
from asyncrl.planning.sampler_model import SamplerModel
from asyncrl.planning.trainer_model import TrainerModel
from asyncrl.planning.words import duration, in_words
from tests.planning.simulated_run import signal_share


def read(text: str, kind: Any = TIMES) -> Any:
    return distribution(text, kind, "--x")


def config(**settings: Any) -> Config:
    return Config(model="m", completions_per_prompt=4, prompt_groups_per_step=2, **settings)


# Distributions


@pytest.mark.parametrize(
    ("text", "mean_s", "median_s", "p95_s"),
    [
        ("1.5min", 90.0, 90.0, 90.0),
        ("250 ms", 0.25, 0.25, 0.25),
        ("uniform(1s, 5s)", 3.0, 3.0, 4.8),
        ("exponential(mean=5s)", 5.0, 5 * math.log(2), 5 * math.log(20)),
        ("lognormal(median=30s, p95=2min)", 30 * math.exp((math.log(4) / 1.6449) ** 2 / 2), 30.0, 120.0),
        ("lognormal(mean=30s, p95=100s)", 30.0, 16.39, 100.0),
        ("lognormal(median=2s, sigma=0.5)", 2 * math.exp(0.125), 2.0, 2 * math.exp(0.5 * 1.6449)),
        ("pareto(min=1s, p95=4s)", 1.8617, 4 ** (math.log(2) / math.log(20)), 4.0),
        ("pareto(median=2s, p95=8s)", 3.0 * 2 / 1.1, 2.0, 8.0),
        ("0.9 * 2s + 0.1 * 60s", 7.8, 2.0, 60.0),
        ("exponential(mean=5s, max=5s)", 5 * (1 - math.exp(-1)), 5 * math.log(2), 5.0),
    ],
)
def test_what_is_written_is_what_is_drawn(text: str, mean_s: float, median_s: float, p95_s: float) -> None:
    found, rng = read(text), random.Random(1)
    values = sorted(found.draw(rng) for _ in range(40_000))
    heavy = isinstance(found, Pareto)
    if not heavy:
        assert mean(values) == pytest.approx(mean_s, rel=0.03)
    assert median(values) == pytest.approx(median_s, rel=0.03)
    assert values[38_000] == pytest.approx(p95_s, rel=0.05)


def test_pareto_has_the_exponent_that_its_two_values_say() -> None:
    found = read("pareto(min=1s, p95=4s)")
    assert found.alpha == pytest.approx(math.log(20) / math.log(4))
    assert found.alpha / (found.alpha - 1) == pytest.approx(1.8617, rel=1e-3)  # its mean


@given(st.floats(0.01, 1e4), st.floats(1.01, 3.8))
def test_a_lognormal_of_mean_and_p95_has_them(mean_s: float, ratio: float) -> None:
    found = read(f"lognormal(mean={mean_s!r}s, p95={mean_s * ratio!r}s)")
    assert isinstance(found, Lognormal)
    assert found.median * math.exp(found.sigma**2 / 2) == pytest.approx(mean_s)
    assert found.median * math.exp(1.6448536 * found.sigma) == pytest.approx(mean_s * ratio)


def test_a_file_of_durations(tmp_path: Path) -> None:
    file = tmp_path / "seconds.txt"
    file.write_text("1\n2.5  # slow\n\n4e1\n")
    assert read(f"file({file}, unit=ms)").values == (0.001, 0.0025, 0.04)
    assert read(f'0.5 * file("{file}", unit=s) + 0.5 * 1s').parts[0].values == (1.0, 2.5, 40.0)
    assert distribution(f"file({file})", COUNTS, "--x").values == (1.0, 2.5, 40.0)  # type: ignore[attr-defined]
    file.write_text("1\nten\n")
    with pytest.raises(ConfigError, match=r"seconds\.txt:2 is 'ten'"):
        read(f"file({file}, unit=s)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("30", "30 has no unit. Expected us, ms, s, min, h"),
        ("30 m", "has the unit 'm'"),
        ("", "it ends too early"),
        ("-3s", "below 0"),
        ("2s 3s", "'3s' was not expected"),
        ("normal(2s)", "'normal' was found"),
        ("lognormal(3s)", "need their names: lognormal"),
        ("lognormal(mean=3s)", "median= and p95="),
        ("lognormal(mean=30s, p95=2min)", "p95 of 4.00 times its mean: 3.87 is the most"),
        ("lognormal(median=3s, p95=2s)", "p95 must be above its median"),
        ("lognormal(median=3s, median=4s)", "median twice"),
        ("lognormal(median=3s, sigma=900)", "sigma is 900, and 10 is the most"),
        ("lognormal(median=1us, p95=1e200s)", "span too much"),
        ("pareto(min=1us, p95=1e200s, max=2h)", "span too much"),
        ("lognormal(median=3s, width=4s)", "has no width"),
        ("lognormal(median=3s, sigma=1s)", "sigma is a plain number"),
        ("pareto(median=10s, p95=2min)", "Say where it ends: max="),
        ("uniform(5s, 1s)", "lower to its higher"),
        ("uniform(1s 2s)", "',' was expected"),
        ("uniform(1s, 2s", "',' was expected at its end"),
        ("exponential(mean=0s)", "above 0"),
        ("0.9 * 2s + 0.2 * 60s", "add up to 1.1"),
        ("2s + 3s", "needs its weight"),
        ("file(nothing.txt, unit=s)", "cannot be read"),
        ("file(nothing.txt)", "need a unit"),
    ],
)
def test_wrong_text_says_what_is_wrong_and_where(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"--x is {text!r}: ")


@given(st.text(alphabet="0.9*+(),=smin kfleuor\"'-", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = read(text)
    except ConfigError:
        return
    assert found.draw(random.Random(0)) >= 0


def test_counts_have_no_unit_but_thousands() -> None:
    assert quantity("2.5k", COUNTS, "--tokens") == 2500
    with pytest.raises(ConfigError, match="Expected k: 400, or 2k"):
        quantity("3s", COUNTS, "--tokens")
    with pytest.raises(ConfigError, match="Expected one number"):
        quantity("uniform(1, 2)", COUNTS, "--tokens")


def test_in_words() -> None:
    assert in_words(read("0s"), TIMES) == "none"
    assert in_words(read("90s"), TIMES) == "90 s"
    assert in_words(read("uniform(1s, 3s)"), TIMES).startswith("mean 2 s, median 2.")
    assert [duration(value) for value in (0.0042, 1.5, 300, 9000)] == ["4.2 ms", "1.5 s", "5 min", "2.5 h"]


# Workloads and machines


def test_turns_tokens_tools_and_the_verifier() -> None:
    description = Description(tokens="20", turns="3", prompt="100", tools="2s", verifier="5s", step="4s", publish="3s")
    found = described(config(), description, 4)
    (attempt,) = found.workload.rows[0][0]
    assert [turn.gap_s for turn in attempt.turns] == [0.0, 2.0, 2.0]
    assert [turn.calls[0].context for turn in attempt.turns] == [100, 120, 140]
    assert [turn.calls[0].fresh for turn in attempt.turns] == [100, 0, 0]
    assert (attempt.after_s, attempt.tokens, attempt.loss_tokens) == (5.0, 160, 60)
    assert all(len(row) == 4 for row in found.workload.rows)
    assert found.machine.trainer.token_s * 2 * 4 * 160 == pytest.approx(4.0)
    assert found.machine.sampler.hot_load_s == (3.0,)
    assert found.machine.sampler.pause_share == 1.0
    said = dict(found.said)
    assert "(assumed: --sampler)" in said["sampler"]
    assert "assumed" not in said["turns"]


def test_turns_are_cut_off_where_the_config_cuts_them() -> None:
    found = described(config(sampling={"max_tokens": 50}), Description(tokens="80", step="1s"), 4)
    assert found.workload.mean_drawn == 50
    assert any("max_tokens = 50" in how for _, how in found.said)


def test_a_whole_rollout_takes_its_time_whatever_else_runs() -> None:
    found = described(config(), Description(rollout="uniform(2s, 4s)", turns="2", step="1s"), 4)
    sampler = found.machine.sampler
    times = [attempt.drawn * sampler.token_time(1000) for attempt in found.workload.attempts]
    assert mean(times) == pytest.approx(3.0, rel=0.02)
    assert min(times) >= 2.0 - 1e-9
    assert max(times) <= 4.0 + 1e-9
    assert {len(attempt.turns) for attempt in found.workload.attempts} == {2}


def test_groups_without_signal() -> None:
    found = described(config(), Description(rollout="1s", step="1s", no_signal="30%"), 4)
    assert signal_share(found.workload) == pytest.approx(0.7, abs=0.03)


def test_a_sampler_is_as_fast_as_is_said_at_both_ends() -> None:
    text = "60 tokens/s at 1, 3k tokens/s at 128, prompts 20k tokens/s"
    sampler = described(config(), Description(tokens="9", step="1s", sampler=text, replicas=7), 4).machine.sampler
    assert 1 / sampler.token_time(1) == pytest.approx(60)
    assert 128 / sampler.token_time(128) == pytest.approx(3000)
    assert (sampler.max_running, sampler.replicas, sampler.prompt_s) == (128, 7, 1 / 20_000)
    alone = described(config(), Description(tokens="9", step="1s", sampler="50 tokens/s at 1"), 4).machine.sampler
    assert alone.token_time(500) == pytest.approx(0.02)
    assert alone.max_running is None


def test_lora_hot_loads_pause_nothing() -> None:
    sampler = described(config(lora={"rank": 8}), Description(tokens="9", step="1s"), 4).machine.sampler
    assert (sampler.pause_share, sampler.side_by_side) == (0.0, True)


def test_a_step_by_its_tokens() -> None:
    trainer = described(config(), Description(rollout="1s", step="0.5s + 40us per token"), 4).machine.trainer
    assert (trainer.step_s, trainer.token_s) == (0.5, pytest.approx(40e-6))


@pytest.mark.parametrize(
    ("description", "says"),
    [
        (Description(), "--tokens"),
        (Description(tokens="9"), "--step"),
        (Description(step="1s"), "--rollout"),
        (Description(rollout="1s", step="1s", tools="2s", replicas=3), "--tools, --replicas cannot be given"),
        (Description(tokens="9", step="1s", sampler="fast"), "'fast' cannot be read"),
        (Description(tokens="9", step="1s", sampler="10 tokens/s at 1, 9000 tokens/s at 2"), "faster than each of 1"),
        (Description(tokens="9", step="1s", sampler="0 tokens/s at 1"), "one or two speeds"),
        (Description(tokens="9", step="1s", no_signal="100%"), "--no-signal is '100%'"),
        (Description(tokens="9", step="0s"), "--step is 0"),
        (Description(tokens="9", step="uniform(1s, 2s)"), "--step is 'uniform(1s, 2s)'"),
    ],
)
def test_descriptions_that_do_not_go_together(description: Description, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        described(config(), description, 4)
    assert says in str(caught.value)


def test_another_machine_for_the_rollouts_of_a_run() -> None:
    workload = described(config(), Description(rollout="1s", step="1s"), 4).workload
    measured = Machine(SamplerModel(replicas=1, token_s=0.5, slowdown=0.3), TrainerModel(token_s=1.0, export_s=0.2))
    found = changed(config(), workload, measured, Description(replicas=8, step="3s"))
    assert (found.machine.sampler.replicas, found.machine.sampler.token_s) == (8, 0.5)
    assert found.machine.trainer.token_s * 2 * 4 * workload.mean_tokens == pytest.approx(3.0)
    assert found.machine.trainer.export_s == 0.2
    assert changed(config(), workload, measured, Description()).machine == measured
    with pytest.raises(ConfigError, match="--turns, --tools cannot be given"):
        changed(config(), workload, measured, Description(turns="2", tools="1s"))


def test_shares() -> None:
    assert share("30%", "--give", "rate") == share("0.3", "--give", "rate") == pytest.approx(0.3)
    for text in ("", "30", "x%", "-1%", "nan"):
        with pytest.raises(ConfigError, match="--give"):
            share(text, "--give", "rate")


def test_the_shape_of_what_never_varies() -> None:
    assert shape(read("3s")).varies is False
