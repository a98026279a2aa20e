"""An adapter laid into its base: a plain model of `transformers` that gives the trainer's log-probs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl.config import Config
from asyncrl.errors import ModelError
from asyncrl.training.trainer import TorchTrainer
from tests.training.cases import fresh_model, make_trainer, plain_logprobs, token_lists, train_sequences, weights

TOKENS = token_lists(5, (40,))[0]


def trained(kind: str, **lora: Any) -> TorchTrainer:
    trainer = make_trainer(kind, lora=lora)
    for _ in range(2):
        trainer.forward_backward(train_sequences(0, (20, 9)))
        trainer.optim_step()
    return trainer


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", {"rank": 4}),
        ("llama-biased", {"rank": 4}),
        ("qwen3", {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "down_proj"]}),  # tied embeddings
        ("gpt2", {"rank": 4}),  # its layers are transposed
        ("llama", {"rank": 4, "targets": ["embed_tokens", "q_proj"]}),
    ],
)
def test_it_is_the_trained_model(kind: str, lora: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(kind, **lora)
    before, expected = weights(trainer), trainer.forward([TOKENS])[0]
    trainer.save_model(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), "no name is missing, and none is strange"
    found = plain_logprobs(model.eval(), TOKENS)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-5)
    assert (found - plain_logprobs(fresh_model(kind), TOKENS)).abs().max() > 1e-2, "training changed something"
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert trainer.forward([TOKENS])[0] == expected


def test_of_a_full_model_it_is_the_model(tmp_path: Path) -> None:
    trainer = trained("llama")
    trainer.save_model(tmp_path / "one", merge=True)
    trainer.save_model(tmp_path / "two")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_it_has_the_precision_of_its_base(tmp_path: Path) -> None:
    base = fresh_model().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    config = Config(model=str(tmp_path / "base"), lora={"rank": 4}, trainer={"dtype": "float32"})
    trainer = TorchTrainer(config, total_steps=None, weights_format="tensors")
    trainer.save_model(tmp_path / "merged", merge=True)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(torch.equal(one, other) for one, other in zip(merged.parameters(), base.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # what this is about
def test_a_tied_embedding_cannot_be_both(tmp_path: Path) -> None:
    trainer = trained("qwen3", rank=4, targets=["embed_tokens", "q_proj"])
    with pytest.raises(
        ModelError, match=r"the adapter on model\.embed_tokens cannot be merged.*as its output head too"
    ):
        trainer.save_model(tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()
