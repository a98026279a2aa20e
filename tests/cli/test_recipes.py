"""`asyncrl sft|dpo|orpo`: a config file in, a run folder out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncrl.cli.main import main
from tests.recipes.cases import chats, preferences, records


@pytest.fixture
def project(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a config, conversations and pairs."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("chats", chats(6)), ("pairs", preferences(6))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = f'base_model = "{model}"\ndataset = "chats.jsonl"\nbatch_size = 4\n[engine.trainer]\ndevice = "cpu"\n'
    (tmp_path / "sft.toml").write_text(text)
    (tmp_path / "pairs.toml").write_text(text.replace("chats", "pairs"))
    return tmp_path


def test_sft(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--log_path", "run", "--lora-rank=4", "--evaluation_dataset", "chats.jsonl", "--grad_clip_norm", "none"]
    given += ["--engine.trainer.max_tokens_per_microbatch", "64", "--engine.lora.targets", '["q_proj", "v_proj"]']
    assert main(["sft", "sft.toml", *given]) == 0
    assert len(records(project / "run")) == 2
    assert records(project / "run")[0]["microbatches"] > 1
    assert (project / "run" / "model" / "adapter_model.safetensors").is_file()
    assert "held-out after training: loss" in capsys.readouterr().out
    assert main(["sft", "run/config.toml", "--log_path", "again", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    again, first = (records(project / name) for name in ("again", "run"))
    assert [record["loss"] for record in again] == [record["loss"] for record in first]


@pytest.mark.parametrize(("name", "setting"), [("dpo", "--beta"), ("orpo", "--odds-weight")])
def test_preferences(project: Path, name: str, setting: str) -> None:
    assert main([name, "pairs.toml", setting, "0.5", "--log_path", "run", "--pairing", "all"]) == 0
    assert "reward_accuracy" in records(project / "run")[0]
    assert f"{setting.strip('-').replace('-', '_')} = 0.5" in (project / "run" / "config.toml").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sft", "nothing.toml"], "there is no config file nothing.toml"),
        (["sft", "sft.toml", "--batchsize", "1"], "Did you mean 'batch_size'"),
        (["sft", "sft.toml", "--beta", "1"], "beta: there is no such setting"),
        (["sft", "sft.toml", "--dataset", "none"], "dataset: this setting is needed"),
        (["sft", "sft.toml", "--dataset", "gone.jsonl"], "dataset: there is no file"),
        (["dpo", "pairs.toml", "--evaluation_dataset", "gone.jsonl"], "evaluation_dataset: there is no file"),
        (["dpo", "pairs.toml", "--engine.sampler.kind", "vllm"], "engine.sampler has no use in this recipe"),
        (["dpo", "pairs.toml", "--wandb", "x"], "--wandb is a section. Name one of its settings"),
        (["orpo", "sft.toml", "--log_path", "run"], "row 0 of the dataset: found the fields 'messages'. Expected"),
    ],
)
def test_what_the_user_can_mend_is_said(
    project: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (project / "runs").exists()


def test_a_run_whose_settings_were_damaged_is_not_resumed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "run").mkdir()
    (project / "run" / "config.toml").write_text("model = ")
    assert main(["resume", "run"]) == 2
    assert "config.toml, at its end: this is not valid TOML" in capsys.readouterr().err
