from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.testing.models import tiny_model, tiny_tokenizer

TEXTS = ["plain", "über 漢字 🙂\n\ttabs", "<tool_call>\n{}</tool_call><|im_end|>\n", '  {"a": 1}  ']


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tiny_tokenizer(words=('{"a": ',))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_words_are_one_token_each_and_the_longest_wins() -> None:
    tokenizer = tiny_tokenizer(words=("<tool_call>\n{", 'name": "f"'))
    ids = tokenizer.encode('<tool_call>\n{name": "f"<tool_call>')
    assert tokenizer.convert_ids_to_tokens(ids) == ["<tool_call>\n{", 'name": "f"', "<tool_call>"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_the_folder(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = tiny_model(tmp_path / "model", kind=kind, tied=tied)  # type: ignore[arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False, return_tensors="pt")
    assert model.config.model_type == kind
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.encode("<|im_end|>")[0]
    assert model.config.head_dim == 32
    assert torch.equal(model.get_input_embeddings().weight, model.lm_head.weight) == tied
    assert torch.isfinite(model(ids).logits).all()


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    folders = [tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in folders)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_width_that_heads_cannot_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hidden is 48.*head_dim=32"):
        tiny_model(tmp_path, hidden=48)


def test_the_template_shows_tools_calls_and_results() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    text = tiny_tokenizer().apply_chat_template(
        [
            {"role": "system", "content": "S"},
            {"role": "user", "content": "U"},
            {"role": "assistant", "content": "A", "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
        ],
        tools=[{"type": "function", "function": {"name": "f"}}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text.startswith('<|im_start|>system\nS\n\nTools:\n{"type": "function", "function": {"name": "f"}}\n')
    assert text.endswith(
        "<|im_start|>user\nU<|im_end|>\n"
        '<|im_start|>assistant\nA\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
