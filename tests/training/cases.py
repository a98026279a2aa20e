"""Tiny models on disk, sequences for them, and the plain way to their log-probs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncrl.config import Config
from asyncrl.training import plan
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

VOCABULARY = 101
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # large, so that a wrong mask shows
}
GPT2_SHAPE: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}


@cache
def model_folder(kind: str) -> str:
    """A model with random weights, the same in every test run."""
    torch.manual_seed(7)
    models: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
        "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=6)),
        # Learned positions, and no float32 inside: what is computed in float64 is exact.
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**GPT2_SHAPE, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
        ),
        "gemma2": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SHAPE, sliding_window=6, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
        ),
    }
    folder = mkdtemp(prefix=f"asyncrl-{kind}-")
    models[kind]().save_pretrained(folder)
    return folder


def make_trainer(kind: str = "llama", publish_folder: Path | None = None, **settings: Any) -> TorchTrainer:
    """A trainer whose rate is large enough to see a step; `publish_folder` makes it write files."""
    settings.setdefault("optimizer", {"learning_rate": 1e-2})
    config = Config(model=model_folder(kind), **settings)
    return TorchTrainer(
        config,
        total_steps=None,
        weights_format="tensors" if publish_folder is None else "files",
        publish_folder=publish_folder,
    )


@contextmanager
def everything_shared() -> Iterator[None]:
    """Sequences share whatever they begin with in common, a single token too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MIN_SHARED_TOKENS", 1)
        patch.setattr(plan, "MIN_SHARED_PART", 0.0)
        yield


def token_lists(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def train_sequences(seed: int, lengths: Sequence[int]) -> list[TrainSequence]:
    """Two prompt tokens and one masked token in the middle of each."""
    rng = random.Random(seed)
    sequences = []
    for index, tokens in enumerate(token_lists(seed, lengths)):
        mask = [0 if place < 2 or place == len(tokens) // 2 else 1 for place in range(len(tokens))]
        behavior = [-4.5 + rng.gauss(0, 0.5) for _ in tokens]
        sequences.append(TrainSequence(tokens, behavior, mask, rng.gauss(0, 1), group=index // 2))
    return sequences


def fresh_model(kind: str = "llama") -> PreTrainedModel:
    """The model as it was before training, with the attention of `transformers`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model_folder(kind))
    return model


def plain_logprobs(model: PreTrainedModel, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probs [n - 1] of one sequence alone, by the model's own forward."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0, :-1]
    found: torch.Tensor = logits.log_softmax(dim=1).gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)
    return found


def gradients(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in trainer.policy.causal_lm.named_parameters()
        if parameter.grad is not None
    }


def weights(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in trainer.policy.causal_lm.named_parameters()}
