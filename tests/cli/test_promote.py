"""`asyncrl promote`: from a checkpoint, or the model of a run, to a folder for everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from asyncrl.cli.main import main
from asyncrl.recipes import sft_loop
from tests.recipes.cases import chats

TOKENS = torch.arange(40)[None]  # [1, 40]


def train(model: Path, run: Path, **settings: Any) -> Path:
    """Three steps whose rate does not depend on how many there are. The run folder."""
    common = {"learning_rate": 1e-2, "lr_scheduler": "constant", "batch_size": 4, "dcp_save_interval": 1}
    config = sft_loop.Config(base_model=str(model), log_path=run, **common, **settings)
    return sft_loop.main(config, chats(12), view="quiet").run_dir


def logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits  # type: ignore[no-any-return]


def promote(which: Path | str, out: Path, *more: str) -> int:
    return main(["promote", str(which), "--out", str(out), *more])


@pytest.fixture(scope="module", params=[0, 4], ids=["full", "lora"])
def runs(request: Any, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of two steps, and the same of three; with checkpoints, the models apart."""
    folder = tmp_path_factory.mktemp("runs")
    return (
        train(model, folder / "two", lora_rank=request.param, max_steps=2, save_final_checkpoint=False),
        train(model, folder / "three", lora_rank=request.param, engine={"checkpoint": {"keep_last": 3}}),
    )


def opened(folder: Path) -> PreTrainedModel | PeftModel:
    adapter = (folder / "adapter_config.json").is_file()
    return (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder)  # type: ignore[no-any-return]


def test_a_checkpoint_becomes_the_model_of_its_step(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three = runs
    assert promote(f"{three}:step-000002", tmp_path / "second") == 0
    assert "checkpoints/step-000002 ->" in capsys.readouterr().out
    assert promote(three, tmp_path / "newest") == 0
    assert promote(two, tmp_path / "same") == 0  # its newest checkpoint
    files = {path.name for path in (three / "model").iterdir()}
    for name in ("second", "newest", "same"):
        assert {path.name for path in (tmp_path / name).iterdir()} == files
    second, newest, same = (logits(opened(tmp_path / name)) for name in ("second", "newest", "same"))
    torch.testing.assert_close(newest, logits(opened(three / "model")), rtol=0, atol=0)
    torch.testing.assert_close(second, same, rtol=0, atol=0)
    assert (second - newest).abs().max() > 1e-3
    assert len(AutoTokenizer.from_pretrained(tmp_path / "second")) > 0


@pytest.mark.parametrize("runs", [4], indirect=True, ids=["lora"])
def test_an_adapter_is_merged(runs: tuple[Path, Path], model: Path, tmp_path: Path) -> None:
    """From a checkpoint and from an exported adapter: the logits of the base model with the adapter on it."""
    three = runs[1]
    assert promote(three, tmp_path / "merged", "--merge") == 0
    assert promote(three / "model", tmp_path / "again", "--merge", "--base-model", str(model)) == 0
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    expected = logits(opened(three / "model"))
    for name in ("merged", "again"):
        torch.testing.assert_close(logits(opened(tmp_path / name)), expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits(opened(model))).abs().max() > 1e-2


def test_a_run_without_checkpoints_has_its_model(model: Path, tmp_path: Path) -> None:
    given = {"dcp_save_interval": 0, "save_final_checkpoint": False}
    config = sft_loop.Config(
        base_model=str(model),
        log_path=tmp_path / "run",
        output_model_id="animals",
        engine={"save_model": True},
        **given,
    )
    result = sft_loop.main(config, chats(4), view="quiet")
    assert promote(result.run_dir, tmp_path / "out") == 0
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(opened(result.model_dir)), rtol=0, atol=0)


@pytest.mark.parametrize("runs", [0], indirect=True, ids=["full"])
def test_what_cannot_be_promoted(runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for which, more, said in (
        (f"{runs[1]}:step-000009", (), "there is no checkpoint 'step-000009'"),
        (tmp_path / "gone", (), "there is no run folder"),
        (runs[1], ("--merge",), "there is nothing to merge"),
        (runs[1] / "model", ("--merge",), "there is nothing to merge"),
        (runs[1], ("--base-model", str(tmp_path / "gone")), "there is no such folder"),
    ):
        assert promote(which, tmp_path / "out", *more) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert promote(runs[1], tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
