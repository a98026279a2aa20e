"""The last layer does less, and nothing changes for what is read: log-probs, gradients, the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from asyncrl.training import last_layer
from asyncrl.training import model as model_module
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence
from tests.training.cases import fresh_model, gradients, make_trainer, plain_logprobs, token_lists

LENGTHS = (40, 31, 30, 12, 5)
COMPLETION = 3


def sequences() -> list[TrainSequence]:
    """Long prompts, of which two begin alike, and a few tokens to train."""
    lists = token_lists(2, LENGTHS)
    lists[2] = lists[1][:-COMPLETION] + lists[2][-COMPLETION:]
    return [
        TrainSequence(
            tokens, [-4.5] * len(tokens), [0] * (len(tokens) - COMPLETION) + [1] * COMPLETION, index - 1.5, index // 2
        )
        for index, tokens in enumerate(lists)
    ]


def widths(trainer: TorchTrainer, part: nn.Module) -> list[int]:
    """The tokens that a part is given in a forward and backward over the sequences."""
    seen: list[int] = []
    handle = part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    trainer.forward_backward(sequences())
    handle.remove()
    return seen


def whole(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **settings: Any) -> TorchTrainer:
    """A trainer whose last layer is left alone."""
    with monkeypatch.context() as patch:
        patch.setattr(model_module, "narrow_last_layer", lambda causal_lm: [])
        return make_trainer(*arguments, **settings)


@pytest.mark.parametrize("kind", ["llama", "llama-biased", "qwen3", "mistral", "gemma3", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"lora": {"rank": 4}}, {"trainer": {"gradient_checkpointing": True}}])
def test_gradients_are_the_same(kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = make_trainer(kind, **settings), whole(monkeypatch, kind, **settings)
    assert found.policy.narrowed
    assert not expected.policy.narrowed
    for trainer in (found, expected):
        trainer.forward_backward(sequences())
    torch.testing.assert_close(gradients(found), gradients(expected), rtol=1e-4, atol=1e-5)


def test_only_what_is_read_goes_through() -> None:
    trainer = make_trainer()
    first, last = trainer.policy.causal_lm.model.layers
    row = widths(trainer, first.mlp)[0]
    assert row > 60
    # Three of each sequence, and the place before the completion that two sequences share.
    assert widths(trainer, last.mlp) == widths(trainer, last.self_attn.o_proj) == [COMPLETION * len(LENGTHS) - 1]


def test_where_most_is_read_all_goes_through() -> None:
    trainer = make_trainer()
    seen: list[int] = []
    trainer.policy.causal_lm.model.layers[-1].mlp.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    tokens = token_lists(0, (30,))
    assert trainer.forward(tokens)[0] == pytest.approx(plain_logprobs(fresh_model(), tokens[0]).tolist(), abs=2e-5)
    assert seen == [29]


def test_the_model_itself_is_as_it_was() -> None:
    """Its own forward, which tells it nothing of what is read, gives all tokens."""
    trainer = make_trainer()
    trainer.forward_backward(sequences())
    tokens = token_lists(0, (30,))[0]
    causal_lm = trainer.policy.causal_lm
    causal_lm.set_attn_implementation("sdpa")
    torch.testing.assert_close(plain_logprobs(causal_lm, tokens), plain_logprobs(fresh_model(), tokens))


def test_a_reference_copy_is_narrowed_by_its_own_rows() -> None:
    """A copy has hooks of its own: what one model reads is not what the other does."""
    trainer = make_trainer("llama", loss={"kl_beta": 0.1})
    trainer.forward_backward(sequences())
    assert float(trainer.optim_step().metrics["ref_kld"]) == pytest.approx(0.0, abs=1e-7)


def test_a_part_that_others_read_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are read by the attention of later tokens: sparing them would be wrong, and is undone at load."""
    monkeypatch.setattr(last_layer, "PARTS", ("self_attn.v_proj",))
    policy = make_trainer().policy
    assert not policy.narrowed
    assert not [module for module in policy.causal_lm.modules() if module._forward_pre_hooks or module._forward_hooks]


def test_a_part_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that gives more than a tensor, as some mixtures of experts do."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, hidden: (forward(self, hidden), None))
    monkeypatch.setattr(LlamaDecoderLayer, "forward", _layer_of_pairs)
    trainer = make_trainer()
    assert trainer.policy.packed
    assert not trainer.policy.narrowed


def _layer_of_pairs(layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
    hidden = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
    output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))[0]
    return output
