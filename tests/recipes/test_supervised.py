"""The loop that the three recipes share: batches, normalisation, the run folder, lengths, interruption, refusals."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from asyncrl.cli.config import read_config
from asyncrl.errors import ConfigError, DataError, ModelError
from asyncrl.model_facts import load_tokenizer
from asyncrl.recipes import dpo_loop, orpo_loop, sft_loop
from asyncrl.recipes.chat_rows import supervised_examples
from asyncrl.recipes.dataset import Unit, batches, steps_of
from asyncrl.recipes.examples import Encoder
from asyncrl.recipes.learner import Learner, dpo_objective, orpo_objective, sft_objective
from asyncrl.recipes.preference_rows import preference_encoder
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from tests.recipes.cases import chats, preferences, records
from tests.recipes.test_examples import PLAIN

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


def sft_config(model: Path, tmp_path: Path, **settings: Any) -> sft_loop.Config:
    return sft_loop.Config(base_model=str(model), log_path=tmp_path / "run", **{"learning_rate": 1e-3} | settings)


def units_of(model: Path, rows: list[dict[str, Any]]) -> list[Unit]:
    encoder = Encoder(load_tokenizer(str(model)))
    if "chosen" in rows[0]:
        return [unit for row in rows for unit in preference_encoder("all")(encoder)(row)]
    return [supervised_examples(row, encoder, "all") for row in rows]


# Batches


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 3), st.booleans(), st.integers(0, 3))
def test_each_epoch_trains_every_unit_once(count: int, size: int, epochs: int, shuffle: bool, seed: int) -> None:
    units: list[Any] = [(number,) for number in range(count)]
    made = list(batches(units, batch_size=size, epochs=epochs, shuffle=shuffle, seed=seed))
    assert len(made) == steps_of(count, size, epochs)
    for epoch in range(epochs):
        mine = [batch for place, batch in made if place.epoch == epoch]
        assert sorted(unit for batch in mine for unit in batch) == units
        assert all(len(batch) == size for batch in mine[:-1])
    if not shuffle:
        assert [unit for _, batch in made for unit in batch] == units * epochs
    for done, (place, _) in enumerate(made, start=1):
        left = list(batches(units, batch_size=size, epochs=epochs, shuffle=shuffle, seed=seed, start=place))
        assert left == made[done:]
        assert len(left) == steps_of(count, size, epochs, place)


def test_epochs_have_orders_of_their_own_that_follow_the_seed() -> None:
    units: list[Any] = [(number,) for number in range(50)]

    def order(seed: int) -> list[Any]:
        return [batch for _, batch in batches(units, batch_size=50, epochs=2, shuffle=True, seed=seed)]

    assert order(0) == order(0)
    assert order(0)[0] != order(0)[1]
    assert order(0) != order(1)


def test_the_last_partial_batch_is_trained_and_max_steps_ends_a_run(model: Path, tmp_path: Path) -> None:
    result = sft_loop.main(sft_config(model, tmp_path, batch_size=4, epochs=2), chats(10), view="quiet")
    assert [record["units"] for record in records(result.run_dir)] == [4, 4, 2, 4, 4, 2]
    assert [record["epoch"] for record in records(result.run_dir)] == [0, 0, 0, 1, 1, 1]
    short = sft_config(model, tmp_path / "short", batch_size=4, epochs=2, max_steps=4, max_rows=6)
    assert sft_loop.main(short, chats(10), view="quiet").steps == 4


# What is minimised


def weighted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with weights from 0.5 to 2, and a second turn."""
    rng = random.Random(0)
    return [
        {
            "messages": [
                *row["messages"],
                {"role": "user", "content": "Sure?" * rng.randint(1, 6)},
                {"role": "assistant", "content": "Yes", "weight": rng.choice([0.5, 2.0])},
            ]
        }
        for row in rows
    ]


def test_sft_is_the_mean_by_weight(model: Path, tmp_path: Path) -> None:
    """Against sum(w ce) / sum(w) from the log-probs of single sequences."""
    units = units_of(model, weighted(chats(6)))
    learner = Learner(sft_config(model, tmp_path).engine_config(), sft_objective(), 1)
    total, weight = 0.0, 0.0
    for (example,) in units:
        (logprobs,) = learner._trainer.forward([example.tokens])
        total -= sum(w * logprob for w, logprob in zip(example.weights[1:], logprobs, strict=True))
        weight += sum(example.weights)
    measured = learner.measure(units, lambda: False)
    assert measured == {"loss": pytest.approx(total / weight, rel=1e-5)}
    assert learner.step(units)["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize(
    "objective", [sft_objective(), dpo_objective(0.5), orpo_objective(0.5)], ids=["sft", "dpo", "orpo"]
)
def test_the_cut_into_microbatches_changes_nothing(objective: Any, model: Path, tmp_path: Path) -> None:
    """Two steps, so that the second shows in its loss whether the first had the same gradient."""
    units = units_of(model, preferences(7) if objective.pairs else weighted(chats(7)))
    traces = []
    for tokens in (8192, 60, 1):
        config = sft_config(model, tmp_path, engine={"trainer": {"max_tokens_per_microbatch": tokens}})
        learner = Learner(config.engine_config(), objective, 2)
        traces.append([learner.step(units) for _ in range(2)])
    assert traces[0][0]["microbatches"] == 1
    assert traces[2][0]["microbatches"] == 7
    names = ["loss", "grad_norm"] + (["reward_margin", "reward_accuracy"] if objective.pairs else [])
    for trace in traces[1:]:
        for step, expected in zip(trace, traces[0], strict=True):
            assert {name: step[name] for name in names} == pytest.approx(
                {name: expected[name] for name in names}, rel=1e-4, abs=1e-6
            )


@pytest.mark.parametrize("objective", [dpo_objective(0.5), orpo_objective(0.5)], ids=["dpo", "orpo"])
@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_measured_is_what_is_trained(objective: Any, rank: int, model: Path, tmp_path: Path) -> None:
    """Loss and metrics of held-out pairs, and of the same pairs in training, before and after the first step."""
    units = units_of(model, preferences(6))
    learner = Learner(sft_config(model, tmp_path, lora_rank=rank).engine_config(), objective, 2)
    for _ in range(2):
        measured = learner.measure(units, lambda: False)
        trained = learner.step(units)
        assert measured == pytest.approx({name: trained[name] for name in measured or ()}, rel=1e-3, abs=1e-5)


def test_the_reference_of_an_adapter_that_goes_on_is_that_adapter(model: Path, tmp_path: Path) -> None:
    """`warm_start_from_adapter`: nothing is preferred before the first step, whatever the adapter had learned."""
    first = sft_config(model, tmp_path, lora_rank=4, learning_rate=1e-2, batch_size=8)
    adapter = sft_loop.main(first, chats(32), view="quiet").model_dir
    config = dpo_loop.Config(
        base_model=str(model), log_path=tmp_path / "dpo", warm_start_from_adapter=adapter, batch_size=8
    )
    result = dpo_loop.main(config, preferences(8), preferences(4, held_out=True), view="quiet")
    assert result.before is not None
    assert result.before["reward_margin"] == 0
    (record,) = records(result.run_dir)
    assert record["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert record["reward_margin"] == pytest.approx(0, abs=1e-5)


# Lengths, and rows that teach nothing


@pytest.mark.parametrize(("on_too_long", "units", "skipped", "truncated"), [("skip", 2, 2, 0), ("truncate", 3, 1, 1)])
def test_rows_that_are_too_long(
    on_too_long: Any, units: int, skipped: int, truncated: int, model: Path, tmp_path: Path, capsys: Any
) -> None:
    """Two that fit, one with a long answer, and one whose prompt alone is too long."""
    rows = [*chats(2), *chats(2)]
    rows[2] = {"prompt": "a", "completion": "b" * 90}
    rows[3] = {"prompt": "a" * 90, "completion": "b"}
    config = sft_config(model, tmp_path, max_seq_len=64, on_too_long=on_too_long)
    result = sft_loop.main(config, rows, view="auto")
    assert result.data == {"rows": 4, "units": units, "skipped": skipped, "truncated": truncated, "empty": 0}
    assert f"{skipped} too long, left out" in capsys.readouterr().out
    assert json.loads((result.run_dir / "summary.json").read_text())["data"] == result.data


def test_too_long_can_be_an_error(model: Path, tmp_path: Path) -> None:
    rows = [*chats(1), {"text": "a" * 99}]
    with pytest.raises(
        DataError, match=r"row 1 of the dataset: it is 100 tokens long, but max_seq_len is 64. Raise it"
    ):
        sft_loop.main(sft_config(model, tmp_path, max_seq_len=64, on_too_long="error"), rows, view="quiet")


def test_a_pair_that_loses_one_side_is_left_out(model: Path, tmp_path: Path) -> None:
    """Its first turn is muted, and the second one begins behind the limit."""
    muted = {"role": "assistant", "content": "a" * 70, "weight": 0}
    talk = [muted, {"role": "user", "content": "?"}, {"role": "assistant", "content": "b"}]
    rows = [*preferences(2), {"prompt": "Hi", "chosen": talk, "rejected": "c"}]
    config = dpo_loop.Config(base_model=str(model), log_path=tmp_path / "run", max_seq_len=64, on_too_long="truncate")
    assert dpo_loop.main(config, rows, view="quiet").data["skipped"] == 1


def test_ties_and_muted_rows_are_counted(model: Path, tmp_path: Path) -> None:
    muted = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "weight": 0}]}
    assert sft_loop.main(sft_config(model, tmp_path), [muted, *chats(2)], view="quiet").data["empty"] == 1
    tie = {"prompt": "?", "samples": [{"text": "a", "score": 1}, {"text": "b", "score": 1}]}
    config = orpo_loop.Config(base_model=str(model), log_path=tmp_path / "orpo")
    assert orpo_loop.main(config, [tie, *preferences(2)], view="quiet").data == {
        "rows": 3,
        "units": 2,
        "skipped": 0,
        "truncated": 0,
        "empty": 1,
    }
    with pytest.raises(
        DataError, match=r"none of the 2 rows of the dataset can be used: 0 are longer .* and 2 have nothing"
    ):
        sft_loop.main(sft_config(model, tmp_path / "muted"), [muted, muted], view="quiet")


# The run folder


def test_what_a_run_leaves(model: Path, tmp_path: Path) -> None:
    config = sft_config(
        model, tmp_path, output_model_id="animals", lora_rank=4, grad_clip_norm=None, wandb=None, batch_size=4
    )
    result = sft_loop.main(config, chats(8), chats(4, held_out=True), view="quiet")
    assert result.model_dir == tmp_path / "run" / "animals"
    assert (result.model_dir / "adapter_model.safetensors").is_file()
    assert (result.run_dir / "environment.json").is_file()
    assert read_config(sft_loop.Config, result.run_dir / "config.toml") == config
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary == {**result.summary(), "held_out_after": result.after}
    assert summary["steps"] == 2
    assert {"loss", "grad_norm", "learning_rate", "train_tokens", "step_s", "time_s"} <= records(result.run_dir)[
        0
    ].keys()
    with pytest.raises(ConfigError, match=r"(?s)already holds a run .*\(run_dir is log_path here\)"):
        sft_loop.main(config, chats(8), view="quiet", resume=False)


def test_the_same_seed_is_the_same_run(model: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("a", "b"):
        config = sft_config(model, tmp_path / name, batch_size=4, epochs=2, lora_rank=4)
        losses.append([record["loss"] for record in records(sft_loop.main(config, chats(12), view="quiet").run_dir)])
    assert losses[0] == losses[1]


def test_datasets_are_files_too(model: Path, tmp_path: Path) -> None:
    for name, rows in (("train", chats(4)), ("test", chats(2, held_out=True))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"dataset": str(tmp_path / "train.jsonl"), "evaluation_dataset": str(tmp_path / "test.jsonl")}
    result = sft_loop.main(sft_config(model, tmp_path, **files), view="quiet")
    assert result.data["rows"] == 4
    assert result.after is not None


def test_a_run_shows_itself(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft_loop.main(sft_config(model, tmp_path, batch_size=2), chats(4), chats(2, held_out=True))
    said = capsys.readouterr().out
    assert f"run folder: {tmp_path / 'run'}" in said
    assert "held-out before training: loss" in said
    assert "sft: step 2/2 loss" in said
    assert "finished after 2 steps" in said
    sft_loop.main(sft_config(model, tmp_path / "quiet"), chats(4), view="quiet")
    assert capsys.readouterr().out == ""


# Ends


def test_ctrl_c_finishes_the_step_and_saves(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = sft_config(model, tmp_path, batch_size=2, epochs=500)
    handler = signal.getsignal(signal.SIGINT)
    ended = threading.Event()

    def interrupt() -> None:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + LIMIT_S
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            ended.wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            sft_loop.main(config, chats(64), chats(2, held_out=True), view="quiet")
    finally:
        ended.set()
        thread.join(LIMIT_S)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"]
    assert 0 < summary["steps"] == len(records(tmp_path / "run")) < 500 * 32
    assert summary["held_out_before"] is not None
    assert summary["held_out_after"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert "stopping after this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_process_at_once() -> None:
    code = (
        "import signal\nfrom asyncrl.interrupt import Interrupt, stop_on_signals\n"
        "stop = Interrupt()\n"
        "with stop_on_signals(stop):\n"
        "    signal.raise_signal(signal.SIGTERM)\n    print(stop.requested, flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n    print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert (done.returncode, done.stdout) == (4, "True\n")
    assert "stopping at once" in done.stderr


def test_a_run_that_fails_keeps_what_was_trained(model: Path, tmp_path: Path) -> None:
    """A rate at which the second or third step is not finite any more."""
    config = sft_config(model, tmp_path, batch_size=4, learning_rate=1e20, lr_scheduler="constant", grad_clip_norm=None)
    with pytest.raises(Exception, match=r"must be finite|not finite"):
        sft_loop.main(config, chats(64), view="quiet")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] >= 1
    assert "StepFailed" in summary["error"]
    assert (tmp_path / "run" / "model" / "config.json").is_file()


# Refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learning_rat": 1}, "learning_rat: there is no such setting. Did you mean 'learning_rate'"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"on_too_long": "drop"}, "on_too_long: found 'drop'"),
        ({"train_on": "first"}, "train_on: found 'first'"),
        ({"beta": 0.1}, "beta: there is no such setting"),
        ({"engine": {"sampler": {"replicas": 2}}}, "engine.sampler has no use in this recipe"),
        (
            {"engine": {"optimizer": {"learning_rate": 1.0}}},
            "engine sets optimizer.learning_rate, which is learning_rate",
        ),
        ({"engine": {"trainer": {"divice": "cpu"}}}, "trainer.divice: there is no such setting"),
        ({"warm_start_from_adapter": "nowhere"}, "there is no adapter in 'nowhere'"),
        ({"output_model_id": "a/b"}, "(?s)Expected the plain name of a folder.*export_name is output_model_id here"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sft_loop.Config(base_model="m", **settings)


def test_weights_of_preferences_are_above_0() -> None:
    with pytest.raises(ConfigError, match="beta: found 0"):
        dpo_loop.Config(base_model="m", beta=0)
    with pytest.raises(ConfigError, match="odds_weight: found -1"):
        orpo_loop.Config(base_model="m", odds_weight=-1)


def test_a_config_is_frozen_and_its_engine_settings_reach_the_engine() -> None:
    config = sft_loop.Config(base_model="m", engine={"trainer": {"device": "cpu"}, "optimizer": {"betas": (0.9, 0.99)}})
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    engine = config.engine_config()
    assert (engine.model, engine.trainer.device, engine.optimizer.betas) == ("m", "cpu", (0.9, 0.99))
    assert (engine.optimizer.schedule, engine.optimizer.learning_rate, engine.kl_beta) == ("linear", 2e-5, 0.0)
    assert engine.optimizer.grad_clip_norm == 1.0


def test_rows_that_cannot_be_used_are_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no data. Set `dataset`"):
        sft_loop.main(sft_config(model, tmp_path))
    with pytest.raises(DataError, match=r"row 2 of the dataset: found the fields 'x'. Expected `messages`"):
        sft_loop.main(sft_config(model, tmp_path), [*chats(2), {"x": 1}], view="quiet")
    with pytest.raises(DataError, match=r"row 1 of the dataset: found a str. Expected a mapping"):
        sft_loop.main(sft_config(model, tmp_path), [*chats(1), "text"], view="quiet")  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"row 1 of the held-out dataset: found the fields 'x'"):
        sft_loop.main(sft_config(model, tmp_path), chats(2), [*chats(1), {"x": 1}], view="quiet")
    config = dpo_loop.Config(base_model=str(model), log_path=tmp_path / "dpo")
    with pytest.raises(DataError, match=r"row 0 of the dataset: found the fields 'messages'. Expected `chosen`"):
        dpo_loop.main(config, chats(2), view="quiet")


def test_a_template_that_cannot_be_trained_on_is_named_with_its_row(tmp_path: Path) -> None:
    opened = PLAIN.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    thinker = tiny_model(tmp_path / "thinker", tokenizer=tiny_tokenizer(chat_template=opened))
    with pytest.raises(ModelError, match=r"row 0 of the dataset: the chat template of .* lets the model begin with"):
        sft_loop.main(sft_config(thinker, tmp_path), chats(2), view="quiet")


# The page


def test_the_page_has_every_setting_with_its_default() -> None:
    page = (ROOT / "docs" / "supervised.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \| ", page.partition("## Settings")[2], re.MULTILINE))
    fields = {**orpo_loop.Config.model_fields, **dpo_loop.Config.model_fields, **sft_loop.Config.model_fields}
    assert {name: table.get(name) for name in fields} == {
        name: "needed" if field.is_required() else _told(field.default) for name, field in fields.items()
    }
    for loop in (dpo_loop, orpo_loop):
        rate = loop.Config.model_fields["learning_rate"].default
        assert f"`{loop.__name__.rpartition('.')[2]}`: {rate}" in page


def _told(default: Any) -> str:
    return "none" if default is None else json.dumps(default)
