"""What a user gets wrong, and what breaks: each ends in one clear message, and nothing stays behind.

A message says what was found, what was expected, and what to do.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import asyncrl
from asyncrl.config import Config
from asyncrl.errors import (
    AsyncRLError,
    BreakerOpen,
    CanaryError,
    ConfigError,
    DataError,
    EngineError,
    ModelError,
    RolloutFailed,
    SamplerError,
    TrainerError,
)
from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.sampling.embedded.batch import DecodeBatch
from asyncrl.storage.folder import config_toml
from asyncrl.storage.ledger import Entry
from asyncrl.storage.ledger_file import LedgerStore
from asyncrl.training import trainer as trainer_module
from asyncrl.training.thread import ThreadedTrainer
from asyncrl.types import Weights
from tests.conftest import SMALL, MakeConfig
from tests.storage.ledgers import fates

pytestmark = pytest.mark.usefixtures("no_thread_left", "offline")

ROOT = Path(__file__).parents[1]
ROWS = [{"n": n % 10} for n in range(80)]
LIMIT_S = 120


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked: a name that is no folder is not found at once."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    ids = [65 + prompt["n"], 65]
    completion = await prompt.policy.generate(ids)
    low = sum(token < 64 for token in completion.tokens)
    return asyncrl.RolloutSample.from_completion(ids, completion, low / len(completion.tokens))


def failure(config: Config, function: Any = rollout, dataset: Any = ROWS) -> AsyncRLError:
    """Train, and give what it raised."""
    with pytest.raises(AsyncRLError) as caught:
        asyncrl.train(function, dataset=dataset, config=config, view="quiet")
    return caught.value


def assert_says(error: AsyncRLError, kind: type[AsyncRLError], *parts: str) -> None:
    assert type(error) is kind, error
    for part in parts:
        assert part in str(error)


def saved_step(folder: Path, config: Config) -> int:
    """How many of the steps in `metrics.jsonl` are in the saved model: it is opened, and must be none or all."""
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(config.model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    steps = len((folder / "metrics.jsonl").read_text().splitlines())
    return steps if moved > 0 else 0


class TestModels:
    def test_no_such_folder(self, make_config: MakeConfig) -> None:
        error = failure(make_config(model="./no/such/model"))
        assert_says(error, ModelError, "'./no/such/model': no such folder", "looked in", "config.json", "hub")

    def test_no_such_name(self, make_config: MakeConfig) -> None:
        error = failure(make_config(model="nobody/nothing"))
        assert_says(error, ModelError, "no model 'nobody/nothing'", "Check the name", "hf auth login")

    @pytest.mark.parametrize(
        ("break_it", "expected"),
        [
            (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "holds no model"),
            (lambda folder: (folder / "config.json").write_text("{nonsense"), "not a valid JSON file"),
            (lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'), "no language model"),
            (lambda folder: (folder / "config.json").write_text('{"model_type": "foonet"}'), "foonet"),
            (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
            (lambda folder: os.truncate(folder / "model.safetensors", 1000), "invalid header"),
            (lambda folder: os.truncate(folder / "model.safetensors", 0), "cannot be loaded"),
        ],
        ids=["empty", "config", "images", "unknown", "no-weights", "cut-off", "zero-bytes"],
    )
    def test_a_folder_that_is_no_model(
        self,
        model: Path,
        make_config: MakeConfig,
        tmp_path: Path,
        break_it: Callable[[Path], object],
        expected: str,
    ) -> None:
        folder = tmp_path / "broken"
        shutil.copytree(model, folder)
        break_it(folder)
        assert_says(failure(make_config(model=str(folder))), ModelError, str(folder), expected, "Expected")

    def test_a_model_without_a_tokenizer(self, model: Path, make_config: MakeConfig, tmp_path: Path) -> None:
        folder = tmp_path / "mute"
        shutil.copytree(model, folder)
        for file in folder.glob("token*"):
            file.unlink()

        async def speak(prompt: asyncrl.Prompt) -> None:
            prompt.policy.tokenizer.encode("hello")

        error = failure(make_config(model=str(folder)), speak)
        assert_says(error, ModelError, f"the tokenizer of {folder} cannot be loaded", "Expected tokenizer.json")

    def test_longer_than_the_model_allows(self, make_config: MakeConfig) -> None:
        error = failure(make_config(max_seq_len=100_000))
        assert_says(error, ModelError, "max_seq_len is 100000", "at most 2048", "Lower max_seq_len")

    def test_lora_targets_that_are_not_there(self, make_config: MakeConfig) -> None:
        error = failure(make_config(lora={"rank": 4, "targets": "q_prj"}))
        assert_says(error, ConfigError, "lora.targets='q_prj'", "LlamaForCausalLM", "all-linear")


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"learning_rate": 1e-3}, ["there is no such setting", "'optimizer.learning_rate'"]),
            ({"sampling": {"max_token": 4}}, ["sampling.max_token:", "'sampling.max_tokens'"]),
            ({"max_steps": "many"}, ["max_steps: found 'many'", "integer"]),
            ({"optimizer": {"learning_rate": -1}}, ["optimizer.learning_rate: found -1", "greater than 0"]),
            ({"staleness": {"policy": "hope"}}, ["staleness.policy: found 'hope'", "'wait' or 'pace'"]),
            ({"completions_per_prompt": 1}, ["group of one", "at least 2"]),
        ],
    )
    def test_a_wrong_setting(self, make_config: MakeConfig, settings: dict[str, Any], parts: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            make_config(**settings)
        assert_says(caught.value, ConfigError, *parts)

    def test_a_folder_that_holds_a_run(self, make_config: MakeConfig, tmp_path: Path) -> None:
        asyncrl.train(rollout, dataset=ROWS, config=make_config(max_steps=1), view="quiet")
        before = sorted(tmp_path.rglob("*"))
        error = failure(make_config(max_steps=1))
        assert_says(error, ConfigError, "run_dir", "already holds a run", "Resume it")
        assert sorted(tmp_path.rglob("*")) == before

    def test_a_run_folder_that_cannot_be_made(self, make_config: MakeConfig, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        error = failure(make_config(run_dir=tmp_path / "file" / "run"))
        assert_says(error, ConfigError, "run_dir", "cannot be used", "Choose a folder")


class TestDatasets:
    def test_a_bad_line_is_named(self, make_config: MakeConfig, tmp_path: Path) -> None:
        file = tmp_path / "rows.jsonl"
        file.write_text('{"n": 1}\n\n{"n": 2}\n{"n": 3,,}\n')
        assert_says(failure(make_config(), dataset=file), DataError, f"{file}, line 4: not JSON", "Expected one JSON")

    @pytest.mark.parametrize(
        ("dataset", "parts"),
        [
            ("no_such.jsonl", ["no dataset file 'no_such.jsonl'", "looked in"]),
            ([], ["no rows"]),
            ({"train": ROWS}, ["is a dict", "one split of a datasets.Dataset"]),
            ((row for row in ROWS), ["is a generator", "Expected"]),
            ([1, 2, 3, 4], ["row", "is a int", "Expected a mapping"]),
        ],
        ids=["missing", "empty", "dict", "generator", "numbers"],
    )
    def test_what_is_no_dataset(self, make_config: MakeConfig, dataset: Any, parts: list[str]) -> None:
        assert_says(failure(make_config(), dataset=dataset), DataError, *parts)

    def test_none_at_all(self, make_config: MakeConfig) -> None:
        assert_says(failure(make_config(), dataset=None), ConfigError, "no dataset was given", "dataset=")


def not_async(prompt: Any) -> float:
    return 1.0


class TestRolloutFunctions:
    @pytest.mark.parametrize("function", [not_async, "rollout.py:rollout", None])
    def test_not_async_is_seen_before_anything_is_loaded(self, make_config: MakeConfig, function: Any) -> None:
        config = make_config()
        assert_says(failure(config, function), ConfigError, "is not async", "async def rollout(prompt)", "setup")
        assert config.run_dir is not None
        assert not config.run_dir.exists()

    def test_a_factory_that_makes_something_else(self, make_config: MakeConfig) -> None:
        assert_says(failure(make_config(), lambda setup: not_async), ConfigError, "not_async is not async")

    def test_a_factory_that_raises_is_the_users_own(self, make_config: MakeConfig) -> None:
        def make_rollout(setup: Any) -> Any:
            raise ZeroDivisionError("in my factory")

        with pytest.raises(ZeroDivisionError, match="in my factory"):
            asyncrl.train(make_rollout, dataset=ROWS, config=make_config(), view="quiet")

    def test_an_exception_comes_with_row_and_traceback(self, make_config: MakeConfig) -> None:
        async def raises(prompt: asyncrl.Prompt) -> Any:
            return prompt["answer"]

        error = failure(make_config(data={"shuffle": False}), raises)
        assert_says(error, RolloutFailed, "row 0 (epoch 0), rollout 0", "test_honest_failure.py", 'prompt["answer"]')
        assert_says(error, RolloutFailed, "KeyError", "the row has 'n'", "rollout.on_error='drop'")

    @pytest.mark.parametrize(
        ("returned", "parts"),
        [
            (lambda s: 3.0, ["returned a float", "Expected a RolloutSample"]),
            (lambda s: replace(s, tokens=[1, 70_000, *s.tokens[2:]]), ["tokens[1] is 70000", "0 to 264"]),
            (lambda s: replace(s, logprobs=[float("nan")] * len(s.tokens)), ["is nan", "natural log"]),
            (lambda s: replace(s, logprobs=s.logprobs[:-1]), ["logprobs has", "one entry per token"]),
            (lambda s: replace(s, loss_mask=[0] * len(s.tokens)), ["nothing to train", "Return None"]),
            (lambda s: replace(s, reward=float("inf")), ["the reward is inf", "finite"]),
            (lambda s: replace(s, reward="high"), ["the reward is 'high'", "Expected a number"]),
            (lambda s: too_long(s), ["has 65 entries", "64", "max_seq_len if"]),
            (lambda s: asyncrl.RolloutRun([]), ["without segments"]),
        ],
        ids=["float", "ids", "nan", "lengths", "mask", "inf", "reward", "long", "empty"],
    )
    def test_garbage_is_named(self, make_config: MakeConfig, returned: Callable[[Any], Any], parts: list[str]) -> None:
        async def garbage(prompt: asyncrl.Prompt) -> Any:
            return returned(await rollout(prompt))

        error = failure(make_config(data={"shuffle": False}), garbage)
        assert_says(error, RolloutFailed, "row 0 (epoch 0)", "Mend the rollout function", *parts)

    def test_token_ids_that_the_model_does_not_know(self, make_config: MakeConfig) -> None:
        async def foreign(prompt: asyncrl.Prompt) -> Any:
            return await prompt.policy.generate([1, 70_000])

        assert_says(failure(make_config(), foreign), RolloutFailed, "70000", "Does the tokenizer belong to this model?")

    def test_an_exception_during_the_evaluation(self, make_config: MakeConfig) -> None:
        async def raises(prompt: asyncrl.Prompt) -> Any:
            return await rollout(prompt) if not prompt.evaluation else prompt["answer"]

        with pytest.raises(RolloutFailed, match="row 0 of the evaluation failed") as caught:
            asyncrl.train(raises, dataset=ROWS, config=make_config(), evaluation=ROWS[:1], view="quiet")
        assert_says(caught.value, RolloutFailed, "test_honest_failure.py", 'prompt["answer"]', "the row has 'n'")

    def test_hanging_rollouts_are_an_outage(self, make_config: MakeConfig) -> None:
        async def hangs(prompt: asyncrl.Prompt) -> Any:
            await asyncio.Event().wait()

        error = failure(make_config(rollout={"timeout_s": 0.2, "retries": 0}), hangs)
        assert_says(error, BreakerOpen, "5 rollouts in a row failed", "rollout.timeout_s=0.2", "outage")

    def test_one_hanging_rollout_is_drawn_again(self, make_config: MakeConfig) -> None:
        attempts: list[int] = []

        async def hangs_once(prompt: asyncrl.Prompt) -> Any:
            if (prompt.index, prompt.rollout_index) == (2, 1):
                attempts.append(1)
                if len(attempts) == 1:
                    await asyncio.Event().wait()
            return await rollout(prompt)

        config = make_config(rollout={"timeout_s": 1.0, "retries": 2}, data={"max_rows": 8}, on_filtered="drop")
        result = asyncrl.train(hangs_once, dataset=ROWS, config=config, view="quiet")
        assert len(attempts) == 2
        assert result.ledger["rejected"] == result.ledger["pending"] == 0

    def test_rewards_that_are_all_equal(self, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
        async def constant(prompt: asyncrl.Prompt) -> Any:
            return replace(await rollout(prompt), reward=0.0)

        result = asyncrl.train(constant, dataset=ROWS, config=make_config(), view="quiet")
        assert (result.steps, result.ledger["filtered"]) == (0, 80)
        assert "nothing was trained. Of 80 groups, 80 were filtered" in capsys.readouterr().out.replace("\n", " ")


def too_long(sample: asyncrl.RolloutSample) -> asyncrl.RolloutSample:
    return asyncrl.RolloutSample([1] * 65, [-1.0] * 65, [0] + [1] * 64, sample.reward)


class TestTheEngineBreaks:
    """After two steps, so that there is something to save."""

    def failing_after_two_steps(self, config: Config, kind: type[AsyncRLError], *parts: str) -> None:
        error = failure(config)
        assert_says(error, kind, *parts)
        assert config.run_dir is not None
        assert saved_step(config.run_dir, config) >= 2, "what was trained is saved"
        assert set(fates(config.run_dir).values()) >= {"trained", "pending"}

    def test_the_trainer_runs_out_of_memory(
        self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        honest = trainer_module.TorchTrainer._microbatch

        def exhausted(self: Any, *arguments: Any) -> Any:
            if self.step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return honest(self, *arguments)

        monkeypatch.setattr(trainer_module.TorchTrainer, "_microbatch", exhausted)
        self.failing_after_two_steps(
            make_config(), TrainerError, "out of memory", "step 3", "Lower it", "trainer.gradient_checkpointing"
        )
        said = capsys.readouterr().out.replace("\n", " ")
        assert "the run failed; it can be resumed from" in said
        assert "the model of step 2 is in" in said

    def test_the_sampler_runs_out_of_memory(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = DecodeBatch.join

        def exhausted(self: DecodeBatch, tickets: Any) -> Any:
            if self.model.version >= 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return honest(self, tickets)

        monkeypatch.setattr(DecodeBatch, "join", exhausted)
        self.failing_after_two_steps(make_config(), SamplerError, "the embedded sampler died", "sampler.max_running")

    def test_weights_that_do_not_arrive(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = ThreadedTrainer.save_weights_for_sampler

        async def perturbed(self: ThreadedTrainer) -> Weights:
            weights = await honest(self)
            assert weights.tensors is not None
            if weights.version < 3:
                return weights
            return replace(weights, tensors={name: tensor * 1.1 for name, tensor in weights.tensors.items()})

        monkeypatch.setattr(ThreadedTrainer, "save_weights_for_sampler", perturbed)
        self.failing_after_two_steps(
            make_config(), CanaryError, "disagree about version 3", "in the sampler", "in the trainer", "0.001 apart"
        )

    def test_two_ends_with_different_models(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = ThreadedTrainer.forward

        async def other(self: ThreadedTrainer, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
            return [[value + 0.5 for value in values] for values in await honest(self, sequences)]

        monkeypatch.setattr(ThreadedTrainer, "forward", other)
        assert_says(failure(make_config()), CanaryError, "disagree about version 0")

    def test_a_loss_that_is_not_finite(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = trainer_module.policy_loss

        def broken(name: Any, inputs: Any, **settings: Any) -> Any:
            loss = honest(name, inputs, **settings)
            broken_at = 2 * 4 * 4  # samples of the first two steps, when no group is filtered
            broken.samples += len(inputs.sequence_ids.unique())  # type: ignore[attr-defined]
            return loss * float("nan") if broken.samples > broken_at else loss  # type: ignore[attr-defined]

        broken.samples = 0  # type: ignore[attr-defined]
        monkeypatch.setattr(trainer_module, "policy_loss", broken)
        self.failing_after_two_steps(
            make_config(), TrainerError, "the loss of step 3 is not finite", "The weights are unchanged", "Lower"
        )

    @pytest.mark.parametrize(("file", "room"), [("metrics.jsonl", 3), ("rollouts.jsonl", 5)])
    def test_a_full_disk(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, file: str, room: int) -> None:
        honest, lines = JsonlFile.write, []

        def full(self: JsonlFile, value: Any) -> None:
            if self._file.name.endswith(file):
                lines.append(value)
                if len(lines) > room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            honest(self, value)

        monkeypatch.setattr(JsonlFile, "write", full)
        config = make_config()
        assert_says(failure(config), EngineError, f"{config.run_dir} cannot be written", "No space left", "Make room")
        assert config.run_dir is not None
        assert saved_step(config.run_dir, config) >= 1

    def test_a_disk_too_full_for_the_ledger(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        honest = LedgerStore._write

        def full(self: LedgerStore, entries: list[Entry], *, last: bool) -> None:
            if any(step == 2 for *_, step, rewards, reason in entries):
                raise sqlite3.OperationalError("database or disk is full")
            honest(self, entries, last=last)

        monkeypatch.setattr(LedgerStore, "_write", full)
        config = make_config()
        assert_says(failure(config), EngineError, f"{config.run_dir}/ledger.db cannot be written", "disk is full")
        assert config.run_dir is not None
        assert saved_step(config.run_dir, config) >= 1

    def test_a_disk_too_full_for_the_model(self, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(trainer_module, "write_model", full)
        config = make_config(max_steps=2)
        assert_says(failure(config), EngineError, f"{config.run_dir} cannot be written", "No space left")


def command(folder: Path, config: Config | str, rollout_source: str, rows: str) -> subprocess.CompletedProcess[str]:
    """`python -m asyncrl train run.toml` in a user's folder."""
    text = config if isinstance(config, str) else config_toml(config)
    (folder / "run.toml").write_text(f'dataset = "rows.jsonl"\nrollout_fn = "my_rollout.py:rollout"\n{text}')
    (folder / "my_rollout.py").write_text(rollout_source)
    (folder / "rows.jsonl").write_text(rows)
    return subprocess.run(
        [sys.executable, "-m", "asyncrl", "train", "run.toml"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


ROLLOUT = """
import asyncrl
async def rollout(prompt):
    ids = [65 + prompt["n"], 65]
    completion = await prompt.policy.generate(ids)
    low = sum(token < 64 for token in completion.tokens)
    return asyncrl.RolloutSample.from_completion(ids, completion, low / len(completion.tokens))
"""
GOOD_ROWS = "".join(f'{{"n": {n}}}\n' for n in range(10))


class TestTheCommand:
    """Exit codes: 2 for what the user wrote, 1 for what broke. stderr is the message and nothing else."""

    def assert_ends(self, done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
        assert done.returncode == code, done.stderr
        assert done.stderr.count("error: ") == 1
        assert "asyncrl/" not in done.stderr, "no traceback through the engine"
        for part in parts:
            assert part in done.stderr

    def test_a_wrong_setting(self, tmp_path: Path) -> None:
        done = command(tmp_path, 'model = "m"\nlearning_rte = 1.0\n', ROLLOUT, GOOD_ROWS)
        self.assert_ends(done, 2, "learning_rte: there is no such setting", "Did you mean 'optimizer.learning_rate'?")
        assert "Traceback" not in done.stderr

    def test_a_wrong_model(self, tmp_path: Path) -> None:
        done = command(tmp_path, 'model = "./nowhere"\n', ROLLOUT, GOOD_ROWS)
        self.assert_ends(done, 2, "there is no model", "nowhere")
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "runs").exists()

    def test_a_bad_line(self, tmp_path: Path, model: Path) -> None:
        done = command(tmp_path, Config(model=str(model)), ROLLOUT, GOOD_ROWS + "oops\n")
        self.assert_ends(done, 2, "rows.jsonl, line 11: not JSON")
        assert "Traceback" not in done.stderr

    def test_a_rollout_that_raises(self, tmp_path: Path, make_config: MakeConfig) -> None:
        done = command(tmp_path, make_config(), "async def rollout(prompt):\n    return 1 / 0\n", GOOD_ROWS)
        self.assert_ends(done, 1, "rollout 0, attempt 1 failed", "my_rollout.py", "ZeroDivisionError")


assert SMALL["trainer"] == {"device": "cpu"}, "a machine with a GPU runs the same tests"
