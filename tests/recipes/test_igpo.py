"""`igpo_loop`: where a look-up helps, its turn is seen to gain, and it is learned without any outcome."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import asyncrl
from asyncrl.errors import ConfigError, DataError, RolloutFailed
from asyncrl.recipes import async_rl_loop, igpo_loop
from tests.recipes import lookup


class TestTheConfig:
    def test_it_is_that_of_async_rl_loop_and_three_fields_more(self) -> None:
        more = igpo_loop.Config.model_fields.keys() - async_rl_loop.Config.model_fields.keys()
        assert more == {"gamma", "answer_field", "answer_prefix"}
        config = igpo_loop.Config(base_model="none", gamma=0.5, max_head_offpolicy_versions=3)
        assert config.engine_config().turn_discount == 0.5
        assert config.engine_config().staleness.max_staleness == 3
        assert igpo_loop.Config(base_model="none").engine_config().turn_discount == 0.95

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"gamma": 1.5}, r"gamma: found 1.5"),
            ({"ig_weight": 2.0}, r"ig_weight has no meaning here: the gains of a group's turns are normalised"),
            ({"scoring_workers": 8}, r"scoring_workers has no meaning here: the sampler scores"),
            ({"engine": {"turn_discount": 0.1}}, r"engine sets turn_discount, which is gamma in this recipe"),
        ],
    )
    def test_what_cannot_work_is_refused_by_name(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            igpo_loop.Config(base_model="none", **given)

    def test_arguments_of_main_that_cannot_work(self) -> None:
        config = igpo_loop.Config(base_model="none")
        with pytest.raises(ConfigError, match="found neither of rollout_fn_factory and rollout_fn"):
            igpo_loop.main(config)
        with pytest.raises(ConfigError, match="is not async"):
            igpo_loop.main(config, rollout_fn=lambda prompt: None, rows=[{}])


class TestTheTrueAnswer:
    def test_strings_and_numbers(self) -> None:
        assert igpo_loop.true_answer({"answer": "Paris"}, "answer") == "Paris"
        assert igpo_loop.true_answer({"gold": 42}, "gold") == "42"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"question": "?"}, r"no field 'answer'.*Its fields are 'question'. Set answer_field"),
            ({"answer": ["a", "b"]}, r"the field 'answer' of a row is \['a', 'b'\]"),
            ({"answer": ""}, "the field 'answer' of a row is ''"),
            ({"answer": True}, "Expected the true answer as a string or a number"),
        ],
    )
    def test_rows_without_one(self, row: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            igpo_loop.true_answer(row, "answer")


# On a model that knows how to read what it looked up

SMALL: dict[str, Any] = {
    "completions_per_prompt": 8,
    "prompt_groups_per_step": 4,
    "max_completion_tokens": 1,
    "max_seq_len": 32,
    "learning_rate": 3e-3,
    "kl_beta": 0.0,
    "save_final_checkpoint": False,
}
ENGINE: dict[str, Any] = {"sampler": {"kind": "transformers"}, "trainer": {"device": "cpu"}, "log_rollouts": 4}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lookup.trained_model(tmp_path_factory.mktemp("lookup") / "model")


def train(recipe: ModuleType, model: Path, run_dir: Path, judge: Any, **settings: Any) -> tuple[Any, list[bool]]:
    """The run, and which rollouts looked it up, in order."""
    engine = {**ENGINE, "max_steps": settings.pop("max_steps", 12)}
    config = recipe.Config(base_model=str(model), log_path=run_dir, engine=engine, **{**SMALL, **settings})
    looked_up: list[bool] = []
    result = recipe.main(config, rollout_fn=lookup.make_rollout(judge, looked_up), rows=lookup.rows(160))
    return result, looked_up


def never(said: str, answer: str) -> bool:
    return False


def right(said: str, answer: str) -> bool:
    return said == answer


def test_looking_it_up_is_learned_where_the_outcome_says_nothing(reader: Path, tmp_path: Path) -> None:
    """All rollouts fail. Outcome rewards alone train no group; the gains of turn 1 say what was worth doing."""
    by_outcome, _ = train(async_rl_loop, reader, tmp_path / "outcome", never)
    assert (by_outcome.steps, by_outcome.ledger["filtered"]) == (0, 160)
    by_gain, looked_up = train(igpo_loop, reader, tmp_path / "gain", never, max_steps=25)
    assert by_gain.steps > 5
    assert statistics.mean(looked_up[:64]) < 0.7
    assert statistics.mean(looked_up[-64:]) > 0.85


def mean(rollouts: list[Any]) -> float:
    return statistics.mean(rollout["samples"][0]["turn_rewards"][0] for rollout in rollouts)


def test_a_turn_that_found_something_out_gains_more(reader: Path, tmp_path: Path) -> None:
    """With adapters, and outcomes that count. A value that is seen is ln 16 = 2.8 nats likelier than one of 16."""
    compared: list[float] = []
    result, _ = train(igpo_loop, reader, tmp_path / "run", right, max_steps=2, lora_rank=4)
    logged = [json.loads(line) for line in (result.run_dir / "rollouts.jsonl").read_text("utf-8").splitlines()]
    for group in logged:
        gains: dict[str, list[float]] = {lookup.LOOK: [], lookup.SKIP: []}
        for rollout in group["rollouts"]:
            (sample,) = rollout["samples"]
            gain, last = sample["turn_rewards"]
            assert last is None
            query = next(stretch["text"] for stretch in sample["text"] if stretch["kind"] == "policy")
            gains.setdefault(query, []).append(gain)
        if gains[lookup.LOOK] and gains[lookup.SKIP]:
            compared.append(statistics.mean(gains[lookup.LOOK]) - statistics.mean(gains[lookup.SKIP]))
    assert len(logged) == 8
    gained = [mean(group["rollouts"]) for group in logged]
    steps = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step["turn_reward_mean"] for step in steps] == pytest.approx(
        [statistics.mean(gained[:4]), statistics.mean(gained[4:])]
    )
    assert len(compared) >= 6
    assert min(compared) > 1
    assert statistics.mean(compared) == pytest.approx(math.log(16), abs=1.0)


class Shared:
    """What a factory opens: it hands out one rollout function, and counts."""

    def __init__(self) -> None:
        self.extras: list[Any] = []

    def make_rollout(self, setup: Any) -> Any:
        self.extras.append(setup.extras)
        return lookup.make_rollout(right)


def test_a_factory_with_its_extras_and_another_answer_field(reader: Path, tmp_path: Path) -> None:
    rows = [{**row, "gold": row["answer"]} for row in lookup.rows(8)]
    config = igpo_loop.Config(
        base_model=str(reader),
        log_path=tmp_path / "run",
        answer_field="gold",
        engine={**ENGINE, "max_steps": 1},
        **SMALL,
    )
    shared = Shared()
    result = igpo_loop.main(config, shared.make_rollout, rows=rows, rollout_extras={"judge": 1})
    assert (shared.extras, result.steps) == ([{"judge": 1}], 1)
    blind = config.model_copy(update={"answer_field": "truth", "log_path": tmp_path / "blind"})
    with pytest.raises(RolloutFailed, match="a row has no field 'truth'"):
        igpo_loop.main(blind, shared.make_rollout, rows=rows)


async def test_what_is_judged_already_is_left_alone_and_an_evaluation_scores_nothing() -> None:
    """No policy is needed to find that out."""
    own = asyncrl.RolloutSample([1, 2], [0.0, -1.0], [0, 1], 1.0, turn_rewards=[3.0])
    plain = asyncrl.RolloutSample([1, 2], [0.0, -1.0], [0, 1], 1.0)

    async def rollout(prompt: asyncrl.Prompt) -> Any:
        return prompt["returns"]

    async def answered(returned: Any, **more: Any) -> Any:
        async with igpo_loop.informed(rollout, "answer")(setup=None) as function:
            return await function(asyncrl.Prompt({"returns": returned, "answer": "x"}, policy=None, index=0, **more))

    assert await answered(own) is own
    assert await answered(None) is None
    assert await answered("nonsense") == "nonsense", "the contract will say so"
    assert await answered(plain, evaluation=True) is plain
