"""A saved adapter as the start: what it computes, what a KL refers to, and what does not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from structlog.testing import capture_logs
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from asyncrl.errors import ConfigError
from asyncrl.training.trainer import TorchTrainer
from tests.training.cases import (
    SHAPE,
    fresh_model,
    make_trainer,
    model_folder,
    plain_logprobs,
    token_lists,
    train_sequences,
)

TOKENS = token_lists(5, (40,))[0]


def saved_adapter(folder: Path, base: PreTrainedModel | None = None, **settings: Any) -> Path:
    """An adapter that does something: B is not 0."""
    torch.manual_seed(3)
    base = fresh_model() if base is None else base
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(base, PeftLoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def another_llama(**shape: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE | shape))


def expected_logprobs(folder: Path) -> list[float]:
    found: list[float] = plain_logprobs(PeftModel.from_pretrained(fresh_model(), folder).eval(), TOKENS).tolist()
    return found


def steps(trainer: TorchTrainer, count: int) -> list[float]:
    """Takes optimizer steps; the KL to the reference at each, NaN where there is none."""
    kls = []
    for _ in range(count):
        trainer.forward_backward(train_sequences(0, (20, 9)))
        kls.append(float(trainer.optim_step().metrics.get("ref_kld", math.nan)))
    return kls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 5},
        {"target_modules": r".*\.1\..*q_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    ],
)
def test_it_begins_as_the_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, **settings)
    trainer = make_trainer("llama", lora={"warm_start": folder})
    assert trainer.forward([TOKENS])[0] == pytest.approx(expected_logprobs(folder), abs=2e-5)
    assert trainer.forward([TOKENS])[0] != pytest.approx(make_trainer("llama").forward([TOKENS])[0], abs=1e-2)


def test_what_is_saved_is_plain_and_opens_again(tmp_path: Path) -> None:
    """Also after a start with rsLoRA: its scale is in alpha."""
    first = make_trainer(
        "llama", tmp_path / "out", lora={"warm_start": saved_adapter(tmp_path / "in", use_rslora=True)}
    )
    steps(first, 2)
    folder = first.save_weights_for_sampler().folder
    assert folder is not None
    assert not json.loads((folder / "adapter_config.json").read_text())["use_rslora"]
    assert first.forward([TOKENS])[0] == pytest.approx(expected_logprobs(folder), abs=2e-5)
    again = make_trainer("llama", lora={"warm_start": folder})
    assert again.forward([TOKENS])[0] == pytest.approx(first.forward([TOKENS])[0], abs=1e-6)


def test_the_kl_refers_to_the_start(tmp_path: Path) -> None:
    """Not to the base model: before the first step there is none, and it grows from there."""
    trainer = make_trainer("llama", lora={"warm_start": saved_adapter(tmp_path)}, loss={"kl_beta": 0.1})
    kls = steps(trainer, 3)
    assert kls[0] == pytest.approx(0.0, abs=1e-7)
    assert kls[2] > 1e-4


def test_looking_back_leaves_training_alone(tmp_path: Path) -> None:
    """The start is forwarded between a forward and its backward, also where layers run again in that backward."""
    folder = saved_adapter(tmp_path)
    found = []
    for beta, checkpointing in ((0.0, False), (1e-12, False), (1e-12, True)):
        trainer = make_trainer(
            "llama",
            lora={"warm_start": folder},
            loss={"kl_beta": beta},
            trainer={"gradient_checkpointing": checkpointing},
        )
        steps(trainer, 3)
        found.append(trainer.forward([TOKENS])[0])
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


def test_a_fresh_adapter_looks_back_at_its_base() -> None:
    trainer = make_trainer("llama", lora={"rank": 4}, loss={"kl_beta": 0.1})
    assert steps(trainer, 2)[0] == pytest.approx(0.0, abs=1e-7)
    assert trainer.policy.adapter is not None
    with trainer.policy.adapter.at_start():
        back = trainer.forward([TOKENS])[0]
    assert back == pytest.approx(make_trainer("llama").forward([TOKENS])[0], abs=1e-5)


def test_another_base_of_the_same_shape_is_only_named(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path)
    with capture_logs() as logs:
        make_trainer("llama", lora={"warm_start": folder})
    assert "adapter_of_another_base" not in [line["event"] for line in logs]
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "some/other"}))
    with capture_logs() as logs:
        make_trainer("llama", lora={"warm_start": folder})
    named = [line for line in logs if line["event"] == "adapter_of_another_base"]
    assert [(line["trained_on"], line["model"]) for line in named] == [("some/other", model_folder("llama"))]


def test_an_adapter_of_other_modules_is_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, fresh_model("gpt2"), fan_in_fan_out=True)
    with pytest.raises(ConfigError, match=r"does not fit the model .*It was trained on .*use that as `model`"):
        make_trainer("llama", lora={"warm_start": folder})


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, another_llama(intermediate_size=128))
    with pytest.raises(ConfigError, match=r"lora_\w\.weight has the shape \(.*\) in the adapter.* expects \("):
        make_trainer("llama", lora={"warm_start": folder})


def test_an_adapter_of_more_layers_is_refused(tmp_path: Path) -> None:
    folder = saved_adapter(tmp_path, another_llama(num_hidden_layers=3))
    with pytest.raises(ConfigError, match=r"layers\.2\..* in the adapter, and the model expects none of that name"):
        make_trainer("llama", lora={"warm_start": folder})


def test_all_linear_leaves_the_head_alone(tmp_path: Path) -> None:
    trainer = make_trainer("qwen3", tmp_path, lora={"rank": 4})  # its head is tied
    folder = trainer.save_weights_for_sampler().folder
    assert folder is not None
    modules = {name.split(".")[-3] for name in load_file(folder / "adapter_model.safetensors")}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
