"""Loading, and the promise of packing: the log-probs of each sequence alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoModelForCausalLM, PreTrainedModel

from asyncrl.config import Config
from asyncrl.errors import ConfigError, ModelError
from asyncrl.training import attention
from asyncrl.training.batch import make_batch
from asyncrl.training.columns import train_columns
from asyncrl.training.model import PolicyModel, load_policy
from asyncrl.training.plan import plan
from asyncrl.types import TrainSequence
from tests.training.cases import (
    everything_shared,
    make_trainer,
    model_folder,
    plain_logprobs,
    token_lists,
    train_sequences,
)

# Blocks of several lengths, a lone token, and sequences beyond the sliding windows.
LENGTHS = (80, 70, 66, 31, 30, 30, 12, 5, 2, 1)
KINDS = ["llama", "llama-biased", "qwen3", "mistral", "gemma3", "gemma2", "gpt2"]


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
    """Softcapped attention exists only in the model's own code, so Gemma 2 goes as padded rows and shares nothing."""
    policy = make_trainer(kind).policy
    assert policy.packed == policy.shares == (kind != "gemma2")
    assert not make_trainer(kind, trainer={"share_prompts": False}).policy.shares


@cache
def in_double(kind: str) -> tuple[PolicyModel, PreTrainedModel]:
    """The policy, and the model with its own forward, both in float64."""
    policy = load_policy(Config(model=model_folder(kind)))
    policy.causal_lm.double()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(kind), dtype=torch.float64, attn_implementation="eager" if kind == "gemma2" else "sdpa"
    )
    return replace(policy, compute_dtype=torch.float64), model.eval()


def alone(model: PreTrainedModel, sequence: TrainSequence) -> Tensor:
    """Log-probs of the loss tokens, by the model's own forward."""
    ids = torch.tensor([sequence.tokens])
    found = model(input_ids=ids).logits[0, :-1].log_softmax(dim=1).gather(1, ids[0, 1:, None]).squeeze(1)
    return found[torch.tensor(sequence.loss_mask[1:], dtype=torch.bool)]


def normed(gradients: Iterable[Tensor]) -> list[Tensor]:
    """As parts of the largest entry of all, since some are 0 but for rounding; where all are, as they are."""
    found = list(gradients)
    whole = max(1.0, *(float(gradient.abs().max()) for gradient in found))
    return [gradient / whole for gradient in found]


def check_equal_to_alone(kind: str, sequences: list[TrainSequence], budget: int, tolerance: float) -> None:
    policy, model = in_double(kind)
    expected = {
        index: alone(model, sequence) for index, sequence in enumerate(sequences) if any(sequence.loss_mask[1:])
    }
    columns = train_columns(sequences)
    policy.causal_lm.zero_grad()
    model.zero_grad()
    seen: set[int] = set()
    for cut in plan(columns, budget, share=policy.shares):
        batch = make_batch(columns, cut, policy.device, torch.float64)
        found = policy.token_logprobs(batch.tokens, 1.0).logprobs
        wanted = torch.cat([expected[index] for index in cut.indices.tolist()])
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        seen.update(cut.indices.tolist())
        (found * batch.advantages * found.detach().cos()).sum().backward()
    assert seen == set(expected)
    for index, logprobs in expected.items():
        (logprobs * sequences[index].advantage * logprobs.detach().cos()).sum().backward()
    if expected:
        shared, plain = (
            normed(parameter.grad for _, parameter in sorted(each.named_parameters()) if parameter.grad is not None)
            for each in (policy.causal_lm, model)
        )
        torch.testing.assert_close(shared, plain, rtol=0, atol=tolerance)


@st.composite
def families(draw: st.DrawFn) -> list[TrainSequence]:
    """Groups whose members go on from a prompt, branch again, end early, repeat each other, or share nothing."""
    tokens = st.lists(st.integers(3, 5), max_size=9)
    sequences: list[TrainSequence] = []
    for group in range(draw(st.integers(1, 3))):
        stems = [draw(st.lists(st.integers(3, 100), min_size=1, max_size=30))]
        for _ in range(draw(st.integers(1, 4))):
            stem = draw(st.sampled_from(stems))
            stems.append(stem[: draw(st.integers(1, len(stem)))] + draw(tokens))
        for stem in stems[1:]:
            mask = draw(st.lists(st.sampled_from([0, 1, 1]), min_size=len(stem), max_size=len(stem)))
            advantage = draw(st.sampled_from([-1.5, 0.5, 2.0]))
            sequences.append(TrainSequence(stem, [0.0] * len(stem), mask, advantage, group))
    return sequences


@given(sequences=families(), budget=st.sampled_from([12, 45, 8192]))
@settings(max_examples=100, deadline=None)
def test_sharing_changes_nothing(sequences: list[TrainSequence], budget: int) -> None:
    """Log-probs and gradients of any tree, however it is cut, to float64 precision."""
    with everything_shared():
        check_equal_to_alone("gpt2", sequences, budget, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(sequences=families(), budget=st.sampled_from([45, 8192]))
@settings(max_examples=20, deadline=None)
def test_sharing_changes_nothing_in_any_model(kind: str, sequences: list[TrainSequence], budget: int) -> None:
    """With sliding windows, grouped heads, and padded rows. Their norms compute in float32 inside."""
    with everything_shared():
        check_equal_to_alone(kind, sequences, budget, 1e-6)


def make_groups(groups: int, members: int, prompt: int, answer: int) -> list[TrainSequence]:
    size, sequences = prompt + answer, []
    for group, start in enumerate(token_lists(0, [prompt] * groups)):
        for tail in token_lists(group + 1, [answer] * members):
            mask = [0] * prompt + [1] * answer
            sequences.append(TrainSequence(start + tail, [-4.5] * size, mask, (-1.0) ** len(sequences), group))
    return sequences


def test_a_group_does_its_prompt_once() -> None:
    """8 x 8 sequences of 24 + 6 tokens: 512 tokens of a row, and the gradient of 1,920."""
    sequences = make_groups(groups=8, members=8, prompt=24, answer=6)
    found = []
    for share in (True, False):
        trainer = make_trainer(trainer={"share_prompts": share}, loss={"kl_beta": 0.0})
        trainer.forward_backward(sequences)
        found.append([parameter.grad.clone() for parameter in trainer.policy.trained_parameters()])
        metrics = trainer.optim_step().metrics
        assert metrics["train_tokens"] == 1920
        assert metrics["loss_tokens"] == 384
        assert metrics["row_tokens"] + metrics["shared_tokens"] == 64 * 29
        assert metrics["row_tokens"] == pytest.approx(512 if share else 64 * 29, abs=8)
        assert metrics["pack_efficiency"] > 0.95
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_nothing_to_predict() -> None:
    assert make_trainer().forward([[5], [7]]) == [[], []]
    assert make_trainer().forward([]) == []


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


def test_a_kernel_that_misreads_what_is_shared_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned to the first query and key, a causal mask hides most of the prompt. Only what shares shows it."""
    monkeypatch.setattr(attention, "_mask", lambda *_: None)
    assert not make_trainer("llama").policy.packed
    assert make_trainer("llama", trainer={"share_prompts": False}).policy.packed


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


def compiled_and_not(**settings: Any) -> Iterator[tuple[list[Tensor], list[list[float]]]]:
    for compile in (False, True):
        trainer = make_trainer("mistral", trainer={"compile": compile, **settings}, lora={"rank": 4})
        gradients = []
        for lengths in ((40, 12, 9), (70, 3), (12, 12)):
            trainer.forward_backward([*train_sequences(0, lengths), *make_groups(1, 3, 20, 4)])
            gradients += [parameter.grad.clone() for parameter in trainer.policy.trained_parameters()]
            trainer._drop_batch()
        assert any(layer._compiled_call_impl is not None for layer in trainer.policy.causal_lm.modules()) == compile
        yield gradients, trainer.forward(token_lists(0, (30, 8)))


@pytest.mark.skipif(which("g++") is None and which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own tracing
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same(checkpointing: bool) -> None:
    (plain, logprobs), (compiled, found) = compiled_and_not(gradient_checkpointing=checkpointing)
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)
    for row, expected in zip(found, logprobs, strict=True):
        assert row == pytest.approx(expected, abs=2e-5)


def broken_compile(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return lambda module, **_: setattr(module, "_compiled_call_impl", fail)


def test_what_cannot_be_compiled_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", broken_compile(TorchDynamoException("no C++ compiler found")))
    with pytest.raises(ConfigError, match=r"trainer\.compile is on, but torch .*no C\+\+ compiler found"):
        make_trainer(trainer={"compile": True})


def test_compiled_layers_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: torch.nn.Module, **_: object) -> None:
        module._compiled_call_impl = lambda *args, **kwargs: 1.5 * module._call_impl(*args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "compile", wrong)
    with pytest.raises(ConfigError, match=r"once compiled, log-probs differ by up to"):
        make_trainer(trainer={"compile": True})


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
