"""Loading, and the promise of packing: the log-probs of each sequence alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from asyncrl.config import Config
from asyncrl.errors import ConfigError, ModelError
from asyncrl.training import attention
from asyncrl.training.batch import make_tokens
from asyncrl.training.model import load_policy
from tests.training.cases import make_trainer, model_folder, plain_logprobs, token_lists, train_sequences

# Blocks of several lengths, a lone token, and sequences beyond the sliding windows.
LENGTHS = (80, 70, 66, 31, 30, 30, 12, 5, 2, 1)
KINDS = ["llama", "llama-biased", "qwen3", "mistral", "gemma3", "gemma2"]


@pytest.mark.parametrize("budget", [60, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_alone(kind: str, budget: int) -> None:
    trainer = make_trainer(kind, trainer={"max_tokens_per_microbatch": budget})
    model = AutoModelForCausalLM.from_pretrained(model_folder(kind), attn_implementation="eager").eval()
    sequences = token_lists(0, LENGTHS)
    for tokens, found in zip(sequences, trainer.forward(sequences), strict=True):
        torch.testing.assert_close(torch.tensor(found), plain_logprobs(model, tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_be_packed_is(kind: str) -> None:
    """Softcapped attention exists only in the model's own code, so Gemma 2 goes as padded rows."""
    policy = make_trainer(kind).policy
    assert policy.packed == (kind != "gemma2")


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_packed_gradient_equals_that_of_each_alone(kind: str) -> None:
    policy = load_policy(Config(model=model_folder(kind)))
    sequences = token_lists(1, (70, 40, 9, 9, 3))
    policy.token_logprobs(make_tokens(sequences, policy.device), 1.0).logprobs.sum().backward()
    packed = [parameter.grad for parameter in policy.trained_parameters()]
    policy.causal_lm.zero_grad()
    for tokens in sequences:
        policy.token_logprobs(make_tokens([tokens], policy.device), 1.0).logprobs.sum().backward()
    alone = [parameter.grad for parameter in policy.trained_parameters()]
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=2e-4)


def test_a_model_whose_attention_is_misread_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed attention that lets sequences see each other is caught by the check, and not used."""

    def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, *, scaling: float, **_: Any) -> Any:
        key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, leaking)
    policy = make_trainer("llama").policy
    assert not policy.packed
    assert policy.causal_lm.config._attn_implementation == "sdpa"


def test_a_head_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = torch.nn.Linear.forward

    def doubled(self: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        return forward(self, inputs) * (2.0 if self.out_features == 101 else 1.0)

    monkeypatch.setattr(torch.nn.Linear, "forward", doubled)
    with pytest.raises(ModelError, match=r"cannot be computed in chunks.*differ"):
        make_trainer("llama")


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for on in (False, True):
        trainer = make_trainer(trainer={"gradient_checkpointing": on})
        trainer.forward_backward(train_sequences(0, (40, 12, 9)))
        assert trainer.policy.causal_lm.model.layers[0].gradient_checkpointing is on
        results.append([parameter.grad for parameter in trainer.policy.trained_parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


def test_a_missing_model() -> None:
    with pytest.raises(ModelError, match=r"'no/such/folder/here': there is no such folder"):
        load_policy(Config(model="no/such/folder/here"))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"cannot be loaded(.|\n)*Expected a name on the Hugging Face hub, or a folder"
    ):
        load_policy(Config(model=str(tmp_path)))


def test_an_incomplete_model(tmp_path: Path) -> None:
    """Weights that are not in the folder would be random."""
    source = Path(model_folder("llama"))
    settings = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    shutil.copy(source / "model.safetensors", tmp_path)
    with pytest.raises(ModelError, match=r"lacks 9 of its weights.*model\.layers\.2"):
        load_policy(Config(model=str(tmp_path)))


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device")
    with pytest.raises(ConfigError, match=r"trainer\.device is 'cuda', but torch .* finds only"):
        load_policy(Config(model=model_folder("llama"), trainer={"device": "cuda"}))


def test_lora_targets_that_do_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets='nothing' does not fit"):
        make_trainer(lora={"rank": 2, "targets": "nothing"})


def test_lora_on_the_output_head_is_refused() -> None:
    with pytest.raises(ModelError, match=r"output head.*leave the head out of lora\.targets"):
        make_trainer(lora={"rank": 2, "targets": ("lm_head",)})


@pytest.mark.parametrize("rank", [0, 4])
def test_bfloat16_computes_over_float32_weights(rank: int) -> None:
    """Of a full fine-tune; a base that only carries an adapter is frozen, and half the size is enough."""
    trainer = make_trainer("qwen3", trainer={"dtype": "bfloat16"}, lora={"rank": rank})
    assert {parameter.dtype for parameter in trainer.policy.trained_parameters()} == {torch.float32}
    assert trainer.policy.head.weight.dtype == (torch.bfloat16 if rank else torch.float32)
    tokens = token_lists(0, (30,))
    exact = torch.tensor(make_trainer("qwen3").forward(tokens)[0])
    assert (torch.tensor(trainer.forward(tokens)[0]) - exact).abs().mean() < 0.1
    trainer.forward_backward(train_sequences(0, (30, 9)))
    metrics = trainer.optim_step().metrics
    assert metrics["grad_norm"] > 0
    assert metrics["ref_kld"] == pytest.approx(0.0, abs=1e-3)
