"""`asyncrl.train` from end to end, on the embedded sampler: it learns, and leaves behind what it says."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import asyncrl
from asyncrl.cli.config import load_config
from asyncrl.config import Config
from asyncrl.errors import RolloutFailed, UserError
from asyncrl.metrics.names import METRIC_BY_NAME
from asyncrl.run import TrainResult
from asyncrl.storage.audit_run import audit_run
from asyncrl.training.thread import ThreadedTrainer
from tests.conftest import SMALL, MakeConfig
from tests.storage.ledgers import fates

ROWS = [{"n": n % 10} for n in range(80)]
HELD_OUT = ROWS[:10]
LOW = 64
PROBE = [3, 1, 41, 5, 92, 65]


def score(tokens: Any) -> float:
    """The share of tokens below `LOW`."""
    return sum(token < LOW for token in tokens) / len(tokens)


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    """Single turn; tokens below `LOW` are rewarded. A quarter of the vocabulary is there."""
    ids = [65 + prompt["n"], 65]
    completion = await prompt.policy.generate(ids)
    return asyncrl.RolloutSample.from_completion(ids, completion, score(completion.tokens), row=prompt.index)


@dataclass(frozen=True)
class Learned:
    """One run, and what its trainer said about `PROBE` at the end."""

    result: TrainResult
    config: Config
    logprobs: list[float]

    def lines(self, file: str) -> list[dict[str, Any]]:
        return read_lines(self.result.run_dir / file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=["full", "lora"])
def learned(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    lora = {"rank": 8} if request.param == "lora" else {}
    learning_rate = 2e-2 if lora else 5e-3
    config = Config(
        **SMALL
        | {
            "model": str(model),
            "run_dir": tmp_path_factory.mktemp(request.param) / "run",
            "data": {"epochs": 2},
            "lora": lora,
            "optimizer": {"learning_rate": learning_rate},
            "staleness": {"max_staleness": 2},
            "evaluation": {"interval": 5, "samples": 4},
        }
    )
    last: list[list[float]] = []
    save = ThreadedTrainer.save_model

    async def listen(trainer: ThreadedTrainer, folder: Path) -> None:
        last.extend(await trainer.forward([PROBE]))
        await save(trainer, folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThreadedTrainer, "save_model", listen)
        result = asyncrl.train(rollout, dataset=ROWS, config=config, evaluation=HELD_OUT, view="quiet")
    return Learned(result, config, last[-1])


class TestARun:
    def test_it_learns(self, learned: Learned) -> None:
        result = learned.result
        assert result.before is not None
        assert result.after is not None
        assert result.best is not None
        assert result.best.reward is not None
        assert result.before.mean < 0.5 < 0.7 < result.after.mean, (
            "the policy still moves at its end: not 0.9 each time"
        )
        assert result.best.reward.mean > 0.85
        assert (result.before.n, result.after.n, result.after.failed) == (40, 40, 0)
        rewards = [record["reward_mean"] for record in learned.lines("metrics.jsonl")]
        assert rewards[0] < 0.5
        assert max(rewards[-5:]) > 0.9

    def test_the_config_loads_again_and_is_equal(self, learned: Learned) -> None:
        assert load_config(learned.result.run_dir / "config.toml") == learned.config

    def test_one_record_for_each_step(self, learned: Learned) -> None:
        records = learned.lines("metrics.jsonl")
        assert [record["step"] for record in records] == list(range(1, learned.result.steps + 1))
        assert {name for record in records for name in record} <= METRIC_BY_NAME.keys()
        assert records[-1]["rollouts_finished"] <= learned.result.rollouts

    def test_the_canary_and_the_bound_hold_in_every_step(self, learned: Learned) -> None:
        records = learned.lines("metrics.jsonl")
        assert max(record["canary_diff"] for record in records) < 1e-3
        assert max(record["canary_diff"] for record in records) > 0, "it was looked at"
        assert max(record["staleness_max"] for record in records) == learned.result.worst_staleness <= 2

    def test_the_sampler_draws_from_what_the_trainer_computes(self, learned: Learned) -> None:
        """On-policy batches are those without stale tokens: there is nothing between the two but rounding."""
        fresh = [record for record in learned.lines("metrics.jsonl") if record["staleness_max"] == 0]
        assert fresh, "the first step at least"
        assert max(record["behavior_kl"] for record in fresh) < 1e-6

    def test_the_ledger_accounts_for_every_draw_once(self, learned: Learned) -> None:
        ends = fates(learned.result.run_dir)
        assert sorted(ends) == [(epoch, row) for epoch in range(2) for row in range(80)]
        counted = Counter(ends.values())
        assert counted.keys() <= {"trained", "filtered"}
        assert {**counted, "rejected": 0, "requeued": 0, "pending": 0, "admitted": 160} == learned.result.ledger
        audit = audit_run(learned.result.run_dir)
        assert audit.data_ended
        assert audit.account.step == learned.result.steps

    def test_rollouts_can_be_read(self, learned: Learned) -> None:
        lines = learned.lines("rollouts.jsonl")
        groups = [line for line in lines if "evaluation" not in line]
        evaluated = {(line["step"], line["row"]) for line in lines if "evaluation" in line}
        assert {group["step"] for group in groups} == set(range(1, learned.result.steps + 1))
        assert {step for step, _ in evaluated} == {done.version for done in learned.result.evaluations}
        for group in groups:
            assert len(group["rewards"]) == len(group["rollouts"]) == 4
            context, drawn = group["rollouts"][0]["samples"][0]["text"]
            assert len(context["text"]) == 2
            assert (context["kind"], drawn["kind"]) == ("context", "policy")
            assert drawn["text"]
            assert group["rollouts"][0]["samples"][0]["info"] == {"row": group["row"]}

    def test_environment_logs_and_summary(self, learned: Learned) -> None:
        folder, result = learned.result.run_dir, learned.result
        environment = json.loads((folder / "environment.json").read_text())
        assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
        assert all({"time", "level", "event"} <= line.keys() for line in read_lines(folder / "logs/asyncrl.jsonl"))
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == result.steps
        assert summary["interrupted"] is False
        assert summary["reward_after"] == pytest.approx(result.after.mean if result.after else 0)
        assert summary["ledger"] == result.ledger

    def test_evaluations_beside_training_are_of_one_version_each(self, learned: Learned) -> None:
        """Also of full weights, of which the sampler keeps the newest alone if nobody holds another."""
        lines, result = learned.lines("evaluations.jsonl"), learned.result
        versions = [line["eval_version"] for line in lines]
        assert versions == [found.version for found in result.evaluations]
        assert (versions[0], versions[-1]) == (0, result.steps)
        assert len(versions) >= 3
        assert all(line["eval_version_newest"] == line["eval_version"] for line in lines)
        assert all((line["eval_rollouts"], line["eval_failed"]) == (40, 0) for line in lines)
        assert {name for line in lines for name in line} - METRIC_BY_NAME.keys() == {
            f"eval_pass_at_{k}" for k in (1, 2, 4)
        }
        assert lines[-1]["eval_reward"] == result.after.mean if result.after else None
        assert result.best is not None
        summary = json.loads((result.run_dir / "summary.json").read_text())
        assert summary["reward_best"] == max(line["eval_reward"] for line in lines)
        assert summary["best_step"] == result.best.version

    def test_the_model_is_the_trainers_last(self, learned: Learned) -> None:
        tokenizer = AutoTokenizer.from_pretrained(learned.result.model_dir)
        assert tokenizer.chat_template
        opened = open_model(learned.result.model_dir, learned.config)
        ids = torch.tensor([PROBE])
        with torch.no_grad():
            logprobs = opened(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found = logprobs.gather(1, ids[0, 1:, None]).squeeze(1).tolist()
        assert found == pytest.approx(learned.logprobs, abs=1e-4)

    def test_evaluating_the_model_gives_the_reward_that_training_ended_with(
        self, learned: Learned, tmp_path: Path
    ) -> None:
        config = Config(**SMALL | {"model": str(learned.result.model_dir), "run_dir": tmp_path})
        found = asyncrl.evaluate(rollout, dataset=HELD_OUT, config=config, samples=4)
        assert learned.result.after is not None
        assert found.mean == pytest.approx(learned.result.after.mean, abs=0.15)
        assert found.mean > 0.75


def open_model(folder: Path, config: Config) -> PreTrainedModel:
    if not config.lora.rank:
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(config.model)
    return PeftModel.from_pretrained(base, folder).eval()


class TestRolloutFunctions:
    def test_a_factory_that_returns_a_function(self, make_config: MakeConfig) -> None:
        seen: list[Any] = []

        def make_rollout(setup: Any) -> Any:
            seen.append((setup.run_dir, setup.config.max_steps, setup.tokenizer.decode([0])))

            async def inner(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
                return await rollout(prompt)

            return inner

        config = make_config(max_steps=1)
        result = asyncrl.train(make_rollout, dataset=ROWS, config=config, view="quiet")
        assert result.steps == 1
        assert seen == [(result.run_dir, 1, "!")]

    @pytest.mark.parametrize("fails", [False, True])
    def test_a_factory_that_opens_something_closes_it(self, make_config: MakeConfig, fails: bool) -> None:
        events: list[str] = []

        @asynccontextmanager
        async def make_rollout(setup: Any) -> AsyncIterator[Any]:
            events.append("open")

            async def inner(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
                assert events == ["open"], "open as long as rollouts run"
                if fails and prompt.epoch == 1:
                    raise KeyError("tool")
                return await rollout(prompt)

            try:
                yield inner
            finally:
                events.append("closed")

        config = make_config(data={"epochs": 2, "max_rows": 12}, max_steps=4, on_filtered="drop")
        if fails:
            with pytest.raises(RolloutFailed, match="KeyError: 'tool'"):
                asyncrl.train(make_rollout, dataset=ROWS, config=config, view="quiet")
        else:
            asyncrl.train(make_rollout, dataset=ROWS, config=config, view="quiet")
        assert events == ["open", "closed"]

    def test_several_segments_are_one_member(self, make_config: MakeConfig) -> None:
        async def branching(prompt: asyncrl.Prompt) -> asyncrl.RolloutRun:
            ids = [65 + prompt["n"], 65]
            parts = [await prompt.policy.generate(ids, max_tokens=length) for length in (2, 3, 4)]
            reward = score(parts[-1].tokens)
            return asyncrl.RolloutRun([asyncrl.RolloutSample.from_completion(ids, part, reward) for part in parts])

        result = asyncrl.train(branching, dataset=ROWS, config=make_config(max_steps=3), view="quiet")
        records = read_lines(result.run_dir / "metrics.jsonl")
        assert [record["samples"] for record in records] == [3 * 4 * 4] * 3
        assert {
            len(run["samples"]) for line in read_lines(result.run_dir / "rollouts.jsonl") for run in line["rollouts"]
        } == {3}

    @pytest.mark.parametrize("policy", ["per_rollout", "per_turn"])
    def test_a_pinned_rollout_keeps_its_version(self, make_config: MakeConfig, policy: str) -> None:
        """Turns wait for a hot-load in between: without the pin the versions differ."""
        import asyncio

        spans: list[set[int]] = []

        async def turns(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
            tokens, logprobs, mask, versions = [65 + prompt["n"]], [0.0], [0], [0]
            for _ in range(4):
                drawn = await prompt.policy.generate(tokens, max_tokens=2)
                tokens += drawn.tokens
                logprobs += drawn.logprobs
                versions += drawn.versions
                mask += [1] * len(drawn.tokens)
                await asyncio.sleep(prompt.rng.random() / 20)
            spans.append(set(versions[1:]))
            return asyncrl.RolloutSample(tokens, logprobs, mask, score(tokens[1:]), versions)

        config = make_config(sampler={"kind": "transformers", "version_policy": policy}, max_steps=6)
        result = asyncrl.train(turns, dataset=ROWS, config=config, view="quiet")
        assert result.steps == 6
        assert {version for span in spans for version in span} >= {0, 1, 2}
        if policy == "per_rollout":
            assert {len(span) for span in spans} == {1}
        else:
            assert max(len(span) for span in spans) > 1


class TestDatasets:
    def test_a_datasets_dataset(self, make_config: MakeConfig) -> None:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list([{"n": n, "messages": [{"role": "user"}]} for n in range(8)])
        result = asyncrl.train(rollout, dataset=rows, config=make_config(on_filtered="drop"), view="quiet")
        assert result.ledger["admitted"] == 8
        assert result.ledger["pending"] == 0

    def test_a_file_and_max_rows_and_epochs(self, make_config: MakeConfig, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        config = make_config(dataset=str(file), data={"epochs": 3, "max_rows": 5})
        result = asyncrl.train(rollout, config=config, view="quiet")
        assert sorted(fates(result.run_dir)) == [(epoch, row) for epoch in range(3) for row in range(5)]


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline_chunks_per_step": 4},
        {"staleness": {"policy": "pace", "max_staleness": 1, "on_stale": "mask"}},
        {"staleness": {"policy": "pace", "max_staleness": 0, "on_stale": "requeue"}},
        {"publish": {"weight_sync_interval": 2}},
        {"sampler": {"kind": "transformers", "in_flight": "interrupt"}, "loss": {"kl_beta": 0.01}},
        {"sampler": {"kind": "transformers", "in_flight": "drain"}, "trainer": {"device": "cpu", "dtype": "bfloat16"}},
        {"lora": {"rank": 2}, "loss": {"kl_beta": 0.01, "anchor": "rollout", "tis_level": "sequence"}},
        {"trainer": {"device": "cpu", "gradient_checkpointing": True, "max_tokens_per_microbatch": 16}},
        {"advantage": "rloo", "policy_loss": "grpo", "optimizer": {"schedule": "cosine", "warmup_steps": 1}},
        {"completions_per_prompt": 1, "advantage": "reinforce", "concurrency": {"min_window": 2, "max_window": 2}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_that_change_the_way(make_config: MakeConfig, settings: dict[str, Any]) -> None:
    config = make_config(max_steps=4, **settings)
    result = asyncrl.train(rollout, dataset=ROWS, config=config, view="quiet")
    records = read_lines(result.run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {name for record in records for name in record} <= METRIC_BY_NAME.keys()
    assert result.worst_staleness <= config.staleness.max_staleness
    assert max(record["canary_diff"] for record in records) < (0.25 if config.trainer.dtype == "bfloat16" else 1e-3)
    assert load_config(result.run_dir / "config.toml") == config
    assert len(fates(result.run_dir)) == result.ledger["admitted"]


async def test_train_async_inside_a_running_loop(make_config: MakeConfig) -> None:
    from asyncrl.run import evaluate_async

    result = await asyncrl.train_async(rollout, dataset=ROWS, config=make_config(max_steps=2), view="quiet")
    assert result.steps == 2
    config = Config(**SMALL | {"model": str(result.model_dir), "run_dir": result.run_dir})
    assert (await evaluate_async(rollout, dataset=HELD_OUT, config=config)).n == 10


async def test_an_evaluation_says_what_blocks_its_loop(make_config: MakeConfig) -> None:
    from asyncrl.run import evaluate_async

    async def blocks(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
        if prompt.index == 0:
            time.sleep(0.5)  # noqa: ASYNC251 - the fault that is to be seen
        return await rollout(prompt)

    with capture_logs() as logs:
        assert (await evaluate_async(blocks, dataset=HELD_OUT, config=make_config())).n == 10
    assert any("blocked for" in entry["event"] and "test_run.py" in entry["event"] for entry in logs)


async def test_train_inside_a_running_loop_names_the_other_one(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"await asyncrl\.train_async"):
        asyncrl.train(rollout, dataset=ROWS, config=make_config(), view="quiet")


def losses(make_config: MakeConfig, folder: Path, seed: int) -> list[tuple[float, float]]:
    config = make_config(
        run_dir=folder,
        seed=seed,
        max_steps=4,
        staleness={"max_staleness": 0},
        concurrency={"min_window": 1, "max_window": 1},
    )
    asyncrl.train(rollout, dataset=ROWS, config=config, view="quiet")
    return [(record["loss"], record["grad_norm"]) for record in read_lines(folder / "metrics.jsonl")]


def test_one_seed_gives_one_run(make_config: MakeConfig, tmp_path: Path) -> None:
    first = losses(make_config, tmp_path / "first", seed=1)
    assert losses(make_config, tmp_path / "again", seed=1) == first
    assert losses(make_config, tmp_path / "other", seed=2) != first


def test_a_greedy_evaluation(make_config: MakeConfig) -> None:
    """All rollouts of a row are the same; those of training are not."""
    drawn: dict[tuple[bool, int], set[tuple[int, ...]]] = {}

    async def seen(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
        sample = await rollout(prompt)
        drawn.setdefault((prompt.evaluation, prompt["n"]), set()).add(tuple(sample.tokens))
        return sample

    config = make_config(
        max_steps=1, evaluation={"temperature": 0}, save_model=False, publish={"weight_sync_interval": 1}
    )
    result = asyncrl.train(seen, dataset=ROWS[:8], config=config, evaluation=ROWS[:20], view="quiet")
    assert result.before is not None
    greedy = [len(tokens) for (evaluation, _), tokens in drawn.items() if evaluation]
    assert max(greedy) <= 2, "one before and one after the step"
    assert max(len(tokens) for (evaluation, _), tokens in drawn.items() if not evaluation) > 2


def test_an_interval_without_rows_is_refused_at_once(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"evaluation\.interval is 5, but there is nothing to evaluate"):
        asyncrl.train(rollout, dataset=ROWS, config=make_config(evaluation={"interval": 5}), view="quiet")
