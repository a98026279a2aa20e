"""What real runs record, and what the table of metrics says: the same names, no more and no fewer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import asyncrl
from asyncrl.config import Config
from asyncrl.metrics.names import METRIC_BY_NAME, METRICS, Part
from asyncrl.recipes import dpo_loop, orpo_loop
from asyncrl.types import Load, ServerLoad
from tests.conftest import SMALL
from tests.recipes.cases import preferences

ROWS = [{"n": n % 10} for n in range(32)]
FILES = ("metrics.jsonl", "evaluations.jsonl", "producer.jsonl")


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    """Two turns, the first with a reward of its own."""
    tokens, logprobs, mask, versions = [65 + prompt["n"]], [0.0], [0], [0]
    for _ in range(2):
        drawn = await prompt.policy.generate(tokens, max_tokens=2)
        tokens += [*drawn.tokens, 65]
        logprobs += [*drawn.logprobs, 0.0]
        versions += [*drawn.versions, 0]
        mask += [1] * len(drawn.tokens) + [0]
    return asyncrl.RolloutSample(
        tokens[:-1], logprobs[:-1], mask[:-1], prompt.rng.random(), versions[:-1], turn_rewards=[0.5, None]
    )


def lines(folder: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text("utf-8").splitlines()]


def names_in(folder: Path, *files: str) -> set[str]:
    found = {name for file in files for record in lines(folder, file) for name in record}
    return {"eval_pass_at_k" if re.fullmatch(r"eval_pass_at_\d+", name) else name for name in found}


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(
        **SMALL
        | {
            "model": str(model),
            "run_dir": tmp_path_factory.mktemp("emitted") / "run",
            "max_steps": 4,
            "lora": {"rank": 2},
            "loss": {"kl_beta": 0.01},
            "sampler": {"kind": "transformers"},
            "concurrency": {"min_window": 4, "max_window": 64},
            "staleness": {"min_staleness": 0, "max_staleness": 2},
        }
    )
    return asyncrl.train(
        rollout, dataset=ROWS, config=config, evaluation=ROWS[:2], evaluation_samples=2, view="quiet"
    ).run_dir


@pytest.fixture(scope="module")
def supervised(model: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    found: set[str] = set()
    for recipe in (dpo_loop, orpo_loop):
        config = recipe.Config(base_model=str(model), log_path=tmp_path_factory.mktemp("pairs") / "run", batch_size=4)
        found |= names_in(recipe.main(config, preferences(4), view="quiet").run_dir, "metrics.jsonl")
    return found


def test_the_table_is_what_runs_record(run: Path, supervised: set[str]) -> None:
    servers = tuple(ServerLoad(name, 1, 0, 0.5, True) for name in "ab")
    of_servers = Load(2, 0, replicas_up=2, servers=servers).replicas().keys()
    assert names_in(run, *FILES) | supervised | of_servers == METRIC_BY_NAME.keys()


@pytest.mark.parametrize(
    ("file", "axis", "parts"),
    [("evaluations.jsonl", "eval_version", {"evaluation"}), ("producer.jsonl", "rollouts_ended", {"rollouts"})],
)
def test_each_kind_of_record_has_names_and_an_axis_of_its_own(
    run: Path, file: str, axis: str, parts: set[Part]
) -> None:
    """Trackers keep all of them in one run, where one name has one axis."""
    assert {METRIC_BY_NAME[name].part for name in names_in(run, file)} == parts
    assert not names_in(run, file) & names_in(run, "metrics.jsonl")
    values = [record[axis] for record in lines(run, file)]
    assert values == sorted(set(values))


def test_what_the_table_refers_to_exists() -> None:
    settings, metrics = set(settings_of(Config)), METRIC_BY_NAME.keys()
    own_words = {"pace", "wait", "on_limit", "rollouts", "asyncrl inspect", "asyncrl tune", "asyncrl.offload"}
    for metric in METRICS:
        for word in re.findall(r"`([^`]+)`", f"{metric.meaning} {metric.bad}"):
            name = word.partition(" = ")[0]
            assert name in settings or name in metrics or name in own_words | {"on_stale"}, f"{metric.name}: {word}"


def settings_of(section: Any, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        found += [prefix + name] if inner is None else settings_of(field.annotation, f"{prefix}{name}.")
    return found
