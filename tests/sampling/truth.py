"""Tiny models and adapters under versions, and what transformers in float32 says about their log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.types import Sampler, Weights
from tests.sampling.contract import Subject

NEEDS_VLLM = (
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: docs/vllm.md says how to install it"),
)

CONTEXT = 2048
PROMPT = [(7 * index * index + 3) % 256 for index in range(100)]
"""Three blocks of 32 tokens and a rest."""
SHARPEN = 8.0
"""Random models are nearly uniform; their versions must differ by much more than the tolerance."""


class Truth:
    """Every version of one tiny model, in transformers and on disk. `lora`: versions are adapters of the base."""

    def __init__(self, folder: Path, *, kind: Literal["llama", "qwen3"], tied: bool, lora: bool) -> None:
        self.folder = folder
        self.lora = lora
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None  # nothing but stop_token_ids ends a completion
        self.vocab_size = len(tokenizer)
        self.base = folder / "base"
        tiny_model(self.base, kind=kind, tied=tied, max_seq_len=CONTEXT, tokenizer=tokenizer)
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        self._randomize(model, 0)
        model.save_pretrained(self.base)
        self._models: dict[int, Any] = {0: model.eval()}

    def _randomize(self, model: Any, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02 * SHARPEN)

    def weights(self, version: int) -> Weights:
        """New weights on disk; the same seed would make the same weights."""
        folder = self.folder / f"v{version}-{len(list(self.folder.iterdir()))}"
        model = deepcopy(self._models[0])
        if self.lora:
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
            random = torch.Generator().manual_seed(100 + version)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
        else:
            self._randomize(model, 100 + version)
        model.save_pretrained(folder)
        self._models[version] = model.eval()
        return Weights(version, adapter=self.lora, folder=folder)

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int], version: int, temperature: float = 1.0) -> list[float]:
        """[N - 1] of tokens[1:]."""
        logits = self._models[version](torch.tensor([list(tokens)])).logits[0, :-1]  # [N - 1, V]
        return _pick(logits, tokens[1:], temperature)

    @torch.no_grad()
    def next_token(self, tokens: Sequence[int], version: int) -> list[float]:
        """[V] of what may follow, at temperature 1."""
        logits = self._models[version](torch.tensor([list(tokens)])).logits[0, -1]  # [V]
        every: list[float] = torch.log_softmax(logits, dim=-1).tolist()
        return every

    @torch.no_grad()
    def kept(self, tokens: Sequence[int], cuts: Sequence[tuple[int, int]]) -> list[float]:
        """[N - 1] of tokens[1:], where the KV cache of older versions is kept.

        `cuts`: (version, end) in order; the forward passes over tokens before `end` ran on `version`.
        """
        cache, start, found = None, 0, []
        for version, end in cuts:
            answer = self._models[version](
                torch.tensor([list(tokens[start:end])]), past_key_values=cache, use_cache=True
            )
            cache, start = answer.past_key_values, end
            found.append(answer.logits[0])
        return _pick(torch.cat(found)[:-1], tokens[1:], 1.0)

    def subject(self, sampler: Sampler) -> Subject:
        return Subject(
            sampler=sampler,
            prompt=PROMPT,
            vocab_size=self.vocab_size,
            context_tokens=CONTEXT,
            weights=self.weights,
            truth=self.logprobs,
            next_token=self.next_token,
            keeps_versions=self.lora,
        )


def _pick(logits: torch.Tensor, targets: Sequence[int], temperature: float) -> list[float]:
    logprobs = torch.log_softmax(logits / temperature, dim=-1)  # [N - 1, V]
    picked: list[float] = logprobs.gather(-1, torch.tensor(list(targets))[:, None])[:, 0].tolist()
    return picked
