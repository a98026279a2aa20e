"""What a forward keeps for its backward: little with checkpointing, and never the logits."""

from __future__ import annotations

from typing import Any

import torch

from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence
from tests.training.cases import VOCABULARY, make_trainer, token_lists

LENGTHS = (100, 90, 80, 70)


def kept_tensors(trainer: TorchTrainer) -> dict[int, tuple[int, int]]:
    """Storage -> (elements of its largest view, bytes), of what autograd saves in a step; parameters left out."""
    parameters = {parameter.data_ptr() for parameter in trainer.policy.causal_lm.parameters()}
    kept: dict[int, tuple[int, int]] = {}
    alive: list[torch.Tensor] = []  # so that no storage is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            alive.append(tensor)
            kept[storage.data_ptr()] = (max(tensor.numel(), kept.get(storage.data_ptr(), (0, 0))[0]), storage.nbytes())
        return tensor

    sequences = [
        TrainSequence(tokens, [-4.5] * len(tokens), [1] * len(tokens), 1.0, group)
        for group, tokens in enumerate(token_lists(0, LENGTHS))
    ]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.forward_backward(sequences)
    return kept


def test_checkpointing_keeps_a_fraction() -> None:
    def kept_bytes(**settings: Any) -> int:
        return sum(size for _, size in kept_tensors(make_trainer(trainer=settings)).values())

    assert kept_bytes(gradient_checkpointing=True) < 0.6 * kept_bytes()


def test_no_step_keeps_its_logits(monkeypatch: Any) -> None:
    monkeypatch.setattr("asyncrl.training.logprobs.CHUNK_LOGITS", 16 * VOCABULARY)
    tokens = sum(LENGTHS) - len(LENGTHS)
    assert max(elements for elements, _ in kept_tensors(make_trainer()).values()) < tokens * VOCABULARY
