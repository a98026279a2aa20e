"""`async_rl_loop` and `rl_loop`: every field goes somewhere, what cannot work is refused, windows are windows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import asyncrl
from asyncrl import config as engine_config
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import WandbConfig
from asyncrl.errors import CheckpointError, ConfigError, RecoverableRolloutError
from asyncrl.recipes import async_rl_loop, rl_loop, sft_loop
from asyncrl.recipes.mapping import ALSO, NO_MEANING, SETTINGS, mapping_table
from asyncrl.rollout.batch import loss_versions
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import Group, RolloutSample, SamplingParams

DOCS = Path(__file__).parents[2] / "docs"

HOSTED = """
log_path base_model dataset learning_rate lr_scheduler kl_beta completions_per_prompt max_completion_tokens
temperature epochs shuffle seed max_rows max_seq_len lora_rank lora_alpha prompt_groups_per_step
max_head_offpolicy_versions max_concurrency_rollout_sample min_group_size max_incomplete_group_retries
pipeline_chunks_per_step grad_accumulation_normalization grad_clip_norm eps_clip eps_clip_high tis anchor_logp
policy_loss dcp_save_interval weight_sync_timeout wandb init_from_checkpoint warm_start_from_adapter
save_final_checkpoint output_model_id
"""
"""The fields of the hosted recipe."""

HOSTED_DEFAULTS = {
    "kl_beta": 0.001,
    "completions_per_prompt": 4,
    "max_completion_tokens": 1024,
    "temperature": 1.0,
    "epochs": 1,
    "lora_rank": 0,
    "lora_alpha": 32,
    "prompt_groups_per_step": 1,
    "max_head_offpolicy_versions": 0,
    "min_group_size": 1,
    "max_incomplete_group_retries": 0,
    "pipeline_chunks_per_step": 1,
    "grad_accumulation_normalization": "num_loss_tokens",
    "eps_clip": 0.2,
    "anchor_logp": "old_policy",
    "dcp_save_interval": 0,
    "dcp_timeout": 2700,
    "weight_sync_timeout": 600,
}

OTHER_VALUES: dict[str, Any] = {
    "log_path": Path("elsewhere"),
    "base_model": "other",
    "dataset": "rows.jsonl",
    "learning_rate": 3e-4,
    "lr_scheduler": "cosine",
    "kl_beta": 0.5,
    "completions_per_prompt": 6,
    "max_completion_tokens": 7,
    "temperature": 0.5,
    "epochs": 3,
    "shuffle": False,
    "seed": 9,
    "max_rows": 11,
    "max_seq_len": 99,
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "prompt_groups_per_step": 5,
    "max_head_offpolicy_versions": 3,
    "max_concurrency_rollout_sample": 12,
    "min_group_size": 2,
    "max_incomplete_group_retries": 4,
    "pipeline_chunks_per_step": 1,
    "grad_accumulation_normalization": "num_sequences",
    "grad_clip_norm": None,
    "eps_clip": 0.3,
    "eps_clip_high": 0.4,
    "tis.cap": 2.0,
    "tis.level": "sequence",
    "tis.icepop": 3.0,
    "tis.mis": (0.5, 2.0),
    "anchor_logp": "rollout",
    "policy_loss": "importance_sampling",
    "weight_sync_interval": 1,
    "weight_sync_timeout": 60.0,
    "wandb.entity": "us",
    "wandb.project": "this",
    "wandb.run_name": "first",
    "dcp_save_interval": 5,
    "dcp_timeout": 60.0,
    "save_final_checkpoint": False,
    "init_from_checkpoint": "job:step-000003",
    "output_model_id": "better",
}
"""A value for each mapped field that is not its default; `warm_start_from_adapter` needs an adapter on disk."""


def recipe(**given: Any) -> async_rl_loop.Config:
    return async_rl_loop.Config(**{"base_model": "none", **given})


def at(settings: Any, path: str) -> Any:
    for name in path.split("."):
        settings = getattr(settings, name)
    return settings


class TestTheMapping:
    def test_every_field_goes_somewhere(self) -> None:
        fields = set(async_rl_loop.Config.model_fields) | set(rl_loop.Config.model_fields)
        mapped = {field.partition(".")[0] for field in SETTINGS} | {"engine"}
        assert fields == mapped
        assert fields == {*HOSTED.split(), "weight_sync_interval", "dcp_timeout", "engine"}
        assert not fields & NO_MEANING.keys()

    def test_every_setting_exists(self) -> None:
        assert {*SETTINGS.values(), *ALSO.values()} <= set(engine_config._paths(engine_config.Config))
        assert len(set(SETTINGS.values())) == len(SETTINGS)
        assert set(OTHER_VALUES) == SETTINGS.keys() - {"warm_start_from_adapter"}

    @pytest.mark.parametrize("field", OTHER_VALUES)
    def test_each_value_arrives(self, field: str) -> None:
        value = OTHER_VALUES[field]
        name, _, leaf = field.partition(".")
        changed = recipe(**{name: {leaf: value} if leaf else value}).engine_config()
        assert at(changed, SETTINGS[field]) == value

    def test_defaults_are_the_hosted_ones(self) -> None:
        config = recipe()
        assert {name: getattr(config, name) for name in HOSTED_DEFAULTS} == HOSTED_DEFAULTS
        engine = config.engine_config()
        assert (engine.kl_beta, engine.normalization) == (0.001, "num_loss_tokens")
        assert (engine.staleness.policy, engine.staleness.max_staleness) == ("wait", 0)
        assert (engine.prompt_groups_per_step, engine.rollout.retries, engine.trackers) == (1, 0, ())

    def test_the_last_checkpoint_and_the_model_go_together_unless_they_are_told_apart(self) -> None:
        for kept in (True, False):
            engine = recipe(save_final_checkpoint=kept).engine_config()
            assert (engine.checkpoint.final, engine.save_model) == (kept, kept)
        apart = recipe(save_final_checkpoint=False, engine={"save_model": True}).engine_config()
        assert (apart.checkpoint.final, apart.save_model) == (False, True)

    def test_what_is_left_out_is_the_objectives_own(self) -> None:
        engine = recipe(policy_loss="gspo").engine_config()
        assert (engine.loss.eps_low, engine.kl_beta, engine.normalization) == (None, 0.0, "sequence_mean")
        assert recipe(policy_loss="gspo", eps_clip=0.2).engine_config().loss.eps_low == 0.2

    @pytest.mark.parametrize("given", [3.0, {"cap": 3.0}, async_rl_loop.TISConfig(cap=3.0), "TIS"])
    def test_tis_in_every_form(self, given: Any) -> None:
        if given == "TIS":
            from asyncrl.losses import TIS

            given = TIS(cap=3.0)
        assert recipe(tis=given).engine_config().loss.tis_cap == 3.0
        assert recipe(tis=None).engine_config().loss.tis_cap is None
        assert recipe().engine_config().loss.tis_cap == 5.0

    def test_wandb_is_a_tracker(self) -> None:
        engine = recipe(wandb=WandbConfig(project="p"), engine={"trackers": ["tensorboard"]}).engine_config()
        assert engine.trackers == ("wandb", "tensorboard")

    def test_the_engines_other_settings_can_be_set(self) -> None:
        engine = recipe(engine={"sampler": {"replicas": 2}, "staleness": {"policy": "pace"}, "log_rollouts": 0})
        made = engine.engine_config()
        assert (made.sampler.replicas, made.staleness.policy, made.log_rollouts) == (2, "pace", 0)
        with pytest.raises(ConfigError, match=r"engine sets lora\.rank, which is lora_rank in this recipe"):
            recipe(engine={"lora": {"rank": 2}})

    def test_the_page_holds_the_table(self) -> None:
        assert mapping_table() in (DOCS / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"max_concurrency_rollout_sample": 3},
            r"max_concurrency_rollout_sample is 3, but completions_per_prompt is 4",
        ),
        ({"infra": {}}, r"infra has no meaning here: there is no training service here"),
        ({"weight_sync_before_training": True}, r"weight_sync_before_training has no meaning here"),
        ({"max_head_offpolicy_version": 1}, r"Did you mean 'max_head_offpolicy_versions'"),
        ({"temperature": 0}, r"sampling\.temperature is 0: .*\n\(sampling\.temperature is temperature here\)"),
        ({"completions_per_prompt": 1}, r"completions_per_prompt is 1, but advantage='grpo' compares"),
        ({"min_group_size": 5}, r"rollout\.min_group_size is 5.*\n\(rollout\.min_group_size is min_group_size here\)"),
        ({"tis": 0}, r"loss\.tis_cap is 0.*\n\(loss\.tis_cap is tis\.cap here"),
        ({"policy_loss": "dapo", "kl_beta": 0.001}, "kl_beta must be 0/unset when method is DAPO"),
        ({"policy_loss": "gspo_token", "kl_beta": 0.1}, "kl_beta must be 0/unset when method is GSPO_TOKEN"),
        ({"weight_sync_interval": 3}, r"max_staleness to at least 2.*\n\(.*max_head_offpolicy_versions here"),
        ({"pipeline_chunks_per_step": 2}, "pipeline_chunks_per_step is 2, but a step has only 1 groups"),
        ({"output_model_id": "accounts/me/model"}, r"export_name is 'accounts/me/model'. Expected the plain name"),
        ({"output_model_id": "logs"}, r"export_name is 'logs'"),
    ],
    ids=lambda case: "-".join(case) if isinstance(case, dict) else "",
)
def test_what_cannot_work_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        recipe(**given)


async def rollout(prompt: asyncrl.Prompt) -> RolloutSample:
    ids = [65 + prompt["n"], 65]
    completion = await prompt.policy.generate(ids)
    return RolloutSample.from_completion(ids, completion, sum(t < 64 for t in completion.tokens))


def make_rollout(setup: Any) -> Any:
    return rollout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rollout_fn": rollout, "rows": [{}], "evaluation_fn": print}, r"evaluation is <built-in.*an async function"),
        ({"rollout_fn": rollout, "rows": [{}], "evaluation_interval": 5}, r"evaluation_interval is 5, but .* nothing"),
        ({}, "found neither of rollout_fn_factory and rollout_fn"),
        ({"rollout_fn": rollout, "rollout_fn_factory": make_rollout}, "found both of rollout_fn_factory"),
        ({"rollout_fn": rollout, "rollout_extras": {"judge": 1}}, r"rollout_extras are for a factory"),
        ({"rollout_fn_factory": rollout}, "rollout_fn_factory is an async function"),
        ({"rollout_fn": rollout}, "there is no data"),
    ],
)
def test_arguments_of_main_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        async_rl_loop.main(recipe(), **arguments)


# Windows, in virtual time


@dataclass
class Windows:
    """What was trained: for each step, the groups."""

    steps: list[tuple[int, list[Group]]]
    published: list[int]
    ledger: dict[str, int]


def run_windows(config: asyncrl.Config, rows: int, chance: random.Random, equal: float, fails: float) -> Windows:
    """The engine on fake ends, with slow hot-loads and rollouts of all lengths."""
    sampler = ScriptedSampler(
        latency_s=lambda request: chance.lognormvariate(0, 1), publish_s=lambda: 3 * chance.random()
    )
    context = PolicyContext(sampler, params=SamplingParams(2), max_seq_len=64, load_tokenizer=lambda: None)
    steps: list[tuple[int, list[Group]]] = []

    async def turns(prompt: asyncrl.Prompt) -> RolloutSample:
        tokens, logprobs, mask, versions = [0], [0.0], [0], [0]
        for _ in range(3):
            drawn = await prompt.policy.generate(tokens, max_tokens=1)
            tokens += drawn.tokens
            logprobs += drawn.logprobs
            versions += drawn.versions
            mask += [1] * len(drawn.tokens)
        if chance.random() < fails:
            raise RecoverableRolloutError("bad luck")
        reward = 1.0 if random.Random(prompt.index).random() < equal else prompt.rng.random()
        return RolloutSample(tokens, logprobs, mask, reward, versions)

    engine = assemble(
        config,
        turns,
        [{"row": row} for row in range(rows)],
        sampler=sampler,
        trainer=CountingTrainer(step_s=lambda: chance.random()),
        make_policy=lambda session, version: Policy(context, session, version),
        on_step=lambda record, batch: steps.append((batch.step, batch.trained)),
    )
    run_virtual(engine.run())
    return Windows(steps, sampler.published, engine.ledger.summary())


def windowed(window: int, groups: int, **more: Any) -> asyncrl.Config:
    return rl_loop.Config(
        base_model="none",
        weight_sync_interval=window,
        prompt_groups_per_step=groups,
        max_incomplete_group_retries=9,
        **more,
    ).engine_config()


def strangers(ran: Windows, window: int) -> list[tuple[int, int, set[int]]]:
    """(step, version at admission, versions of the tokens) of groups that are not of the window that trains them."""
    found = []
    for step, trained in ran.steps:
        for group in trained:
            drawn = {version for run in group.runs for sample in run.segments for version in loss_versions(sample)}
            if {group.version, *drawn} != {step - step % window}:
                found.append((step, group.version, drawn))
    return found


@settings(max_examples=150, deadline=None)
@given(
    window=st.integers(1, 5),
    groups=st.integers(1, 4),
    rows=st.integers(1, 60),
    seed=st.integers(0, 10**6),
    equal=st.sampled_from([0.0, 0.4, 0.9]),
    fails=st.sampled_from([0.0, 0.2]),
    on_filtered=st.sampled_from(["replace", "drop"]),
    in_flight=st.sampled_from([4, 64]),
)
def test_no_group_is_admitted_or_drawn_across_a_boundary(
    window: int, groups: int, rows: int, seed: int, equal: float, fails: float, on_filtered: str, in_flight: int
) -> None:
    config = windowed(
        window, groups, engine={"on_filtered": on_filtered, "concurrency": {"min_window": in_flight}},
        max_concurrency_rollout_sample=in_flight,
    )  # fmt: skip
    ran = run_windows(config, rows, random.Random(seed), equal, fails)
    assert strangers(ran, window) == []
    boundaries = [step for step in range(1, len(ran.steps) + 1) if step % window == 0]
    assert ran.published == boundaries + [len(ran.steps)] * bool(len(ran.steps) % window)
    assert ran.ledger["pending"] == 0


def test_a_bound_that_is_one_step_wider_than_the_window_is_seen() -> None:
    config = windowed(3, 2)
    wider = config.model_copy(update={"staleness": config.staleness.model_copy(update={"max_staleness": 3})})
    assert strangers(run_windows(wider, 40, random.Random(0), 0.0, 0.0), 3)


def test_a_window_of_one_is_strictly_on_policy_and_overlaps_nothing() -> None:
    ran = run_windows(windowed(1, 2), 20, random.Random(0), 0.0, 0.0)
    assert [step for step, _ in ran.steps] == list(range(10))
    assert [{group.version for group in trained} for _, trained in ran.steps] == [{step} for step in range(10)]
    finished = [max(group.finished_at for group in trained) for _, trained in ran.steps]
    began = [min(group.admitted_at for group in trained) for _, trained in ran.steps]
    assert all(later > earlier for earlier, later in zip(finished, began[1:], strict=False))


def test_inside_a_window_training_and_rollouts_overlap() -> None:
    ran = run_windows(windowed(4, 2), 32, random.Random(0), 0.0, 0.0)
    first_of_window = [min(g.admitted_at for g in trained) for _, trained in ran.steps]
    last_of_window = [max(g.finished_at for g in trained) for _, trained in ran.steps]
    assert any(began < ended for began, ended in zip(first_of_window[1:4], last_of_window, strict=False))


def test_a_window_of_zero_keeps_the_base_weights() -> None:
    ran = run_windows(windowed(0, 2), 20, random.Random(0), 0.0, 0.0)
    assert ran.published == []
    assert {group.version for _, trained in ran.steps for group in trained} == {0}
    assert len(ran.steps) == 10


def test_windows_cannot_be_widened_by_the_back_door() -> None:
    with pytest.raises(ConfigError, match=r"engine sets staleness\.max_staleness, but in rl_loop"):
        rl_loop.Config(base_model="none", engine={"staleness": {"max_staleness": 4}})
    with pytest.raises(ConfigError, match="max_head_offpolicy_versions: there is no such setting"):
        rl_loop.Config(base_model="none", max_head_offpolicy_versions=1)


# On a real model

ROWS = [{"n": n % 10} for n in range(24)]
SMALL: dict[str, Any] = {
    "completions_per_prompt": 4,
    "prompt_groups_per_step": 3,
    "max_completion_tokens": 4,
    "max_seq_len": 64,
    "learning_rate": 3e-3,
    "kl_beta": 0.0,
    "engine": {"sampler": {"kind": "transformers"}, "trainer": {"device": "cpu"}, "max_steps": 4},
}


def records(run: asyncrl.TrainResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_rl_loop_is_strictly_on_policy(model: Path, tmp_path: Path) -> None:
    config = rl_loop.Config(base_model=str(model), log_path=tmp_path / "run", output_model_id="better", **SMALL)
    result = rl_loop.main(config, rollout_fn=rollout, rows=ROWS)
    steps = records(result)
    assert result.steps == len(steps) == 4
    assert {(step["staleness_max"], step["stale_masked_tokens"]) for step in steps} == {(0, 0)}
    assert max(step["behavior_kl"] for step in steps) < 1e-6
    assert [step["published"] for step in steps[1:]] >= [1, 2, 3]
    assert result.model_dir == tmp_path / "run" / "better"
    assert (result.model_dir / "config.json").is_file()


def test_async_rl_loop_with_a_factory_its_extras_and_a_filter(model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []

    def factory(setup: Any) -> Callable[..., Any]:
        seen.append((setup.extras, setup.config.staleness.max_staleness))
        return rollout

    def keep(rewards: list[float]) -> bool:
        seen.append(len(rewards))
        return True

    config = async_rl_loop.Config(
        base_model=str(model),
        log_path=tmp_path / "run",
        max_head_offpolicy_versions=2,
        policy_loss="dapo",
        save_final_checkpoint=False,
        **{**SMALL, "kl_beta": 0.0},
    )
    result = async_rl_loop.main(
        config, factory, dynamic_filter_fn=keep, rows=ROWS, rollout_extras={"judge": "a client"}
    )
    assert seen[0] == ({"judge": "a client"}, 2)
    assert set(seen[1:]) == {4}
    assert result.steps == 4
    assert result.ledger["filtered"] == 0
    assert result.worst_staleness <= 2
    assert not result.model_dir.exists()
    assert re.search(r'group_filter = ".*:.*keep"', (result.run_dir / "config.toml").read_text(encoding="utf-8"))


def test_an_evaluation_function_measures_versions_beside_training(model: Path, tmp_path: Path) -> None:
    async def evaluation_fn(evaluation: Any) -> dict[str, float]:
        found = await evaluation.rollouts(ROWS[:4], samples=2)
        return {"reward": found.mean, "twice": 2.0 * evaluation.version}

    config = async_rl_loop.Config(
        base_model=str(model), log_path=tmp_path / "run", save_final_checkpoint=False, **SMALL
    )
    result = async_rl_loop.main(
        config, rollout_fn=rollout, rows=ROWS, evaluation_fn=evaluation_fn, evaluation_interval=2
    )
    lines = [json.loads(line) for line in (result.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [line["eval_version"] for line in lines] == [found.version for found in result.evaluations]
    assert {0, result.steps} <= {line["eval_version"] for line in lines}
    assert all(line["eval_twice"] == 2 * line["eval_version"] and line["eval_reward"] >= 0 for line in lines)


def test_an_interval_is_given_once(tmp_path: Path) -> None:
    both = recipe(engine={"evaluation": {"interval": 3, "dataset": "test.jsonl"}})
    with pytest.raises(ConfigError, match=r"engine sets evaluation\.interval, which is evaluation_interval of main"):
        async_rl_loop.main(both, rollout_fn=rollout, rows=ROWS, evaluation_interval=2)


# Going on


def test_a_log_path_with_checkpoints_goes_on_by_itself(model: Path, tmp_path: Path) -> None:
    engine = {**SMALL["engine"], "max_steps": 2}
    config = rl_loop.Config(
        base_model=str(model), log_path=tmp_path / "run", dcp_save_interval=1, **{**SMALL, "engine": engine}
    )
    assert rl_loop.main(config, rollout_fn=rollout, rows=ROWS).steps == 2
    with pytest.raises(ConfigError, match="already holds a run"):
        rl_loop.main(config, rollout_fn=rollout, rows=ROWS, resume=False)
    longer = rl_loop.Config(base_model=str(model), log_path=tmp_path / "run", dcp_save_interval=1, **SMALL)
    result = rl_loop.main(longer, rollout_fn=rollout, rows=ROWS)
    assert (result.steps, [step["step"] for step in records(result)]) == (4, [1, 2, 3, 4])
    assert result.ledger["trained"] == 4 * SMALL["prompt_groups_per_step"]


def test_a_run_of_rollouts_does_not_go_on_from_one_without(model: Path, tmp_path: Path) -> None:
    config = sft_loop.Config(base_model=str(model), log_path=tmp_path / "run")
    sft_loop.main(config, [{"prompt": "a", "completion": "b"}], view="quiet")
    with pytest.raises(CheckpointError, match="is of `asyncrl sft`, and `asyncrl train` cannot go on from it"):
        rl_loop.main(
            rl_loop.Config(base_model=str(model), log_path=tmp_path / "run", **SMALL), rollout_fn=rollout, rows=ROWS
        )


def test_a_run_starts_from_the_weights_of_another(model: Path, tmp_path: Path) -> None:
    """`init_from_checkpoint`, as job:name: other data, step 0."""
    first = rl_loop.Config(base_model=str(model), log_path=tmp_path / "first", dcp_save_interval=2, **SMALL)
    rl_loop.main(first, rollout_fn=rollout, rows=ROWS)
    second = rl_loop.Config(
        base_model=str(model), log_path=tmp_path / "second", init_from_checkpoint="first:step-000002", **SMALL
    )
    result = rl_loop.main(second, rollout_fn=rollout, rows=ROWS[::-1])
    assert result.steps == 4
    with pytest.raises(CheckpointError, match=r"there is no run folder 'nobody'"):
        rl_loop.main(
            rl_loop.Config(base_model=str(model), init_from_checkpoint="nobody:step-000002", **SMALL),
            rollout_fn=rollout,
            rows=ROWS,
        )
