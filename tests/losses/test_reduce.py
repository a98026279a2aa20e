"""The reduction over an optimizer batch, and its independence of the cut."""

from __future__ import annotations

import pytest
import torch

from asyncrl.losses import Counts, LossInputs, Normalization, count, denominator, loss_sum, policy_loss, reduce
from tests.losses.cases import make_inputs, random_inputs

LENGTHS = (5, 1, 9, 4, 7, 3)
ALL: list[Normalization] = ["num_loss_tokens", "num_sequences", "sequence_mean", "none", 37.0]


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("num_loss_tokens", 16 / 4),
        ("num_sequences", 16 / 2),
        ("sequence_mean", (2 + 10) / 2),
        ("none", 16.0),
        (8.0, 2.0),
    ],
)
def test_by_hand(normalization: Normalization, expected: float) -> None:
    """Losses 1, 2, 3 of one sequence, 10 of another, 99 behind the mask of a third."""
    inputs = make_inputs(logprobs=[0.0] * 5, mask=[1, 1, 1, 1, 0], sequence_ids=[0, 0, 0, 1, 2])
    per_token = torch.tensor([1.0, 2.0, 3.0, 10.0, 99.0], dtype=torch.float64)
    assert reduce(per_token, inputs, normalization).item() == pytest.approx(expected)


def part(inputs: LossInputs, sequences: list[int]) -> LossInputs:
    """Those sequences alone, numbered anew; they share the tensor that gathers the gradient."""
    keep = torch.isin(inputs.sequence_ids, torch.tensor(sequences))
    assert inputs.ref_logprobs is not None
    _, ids = inputs.sequence_ids[keep].unique(return_inverse=True)
    return LossInputs(
        inputs.logprobs[keep],
        inputs.old_logprobs[keep],
        inputs.behavior_logprobs[keep],
        inputs.ref_logprobs[keep],
        inputs.advantages[keep],
        inputs.loss_mask[keep],
        ids,
    )


@pytest.mark.parametrize("normalization", ALL)
@pytest.mark.parametrize("cut", [[[0, 1, 2], [3, 4, 5]], [[5], [4], [3], [2], [1], [0]], [[1, 4], [0, 2, 3, 5]]])
def test_gradient_does_not_depend_on_the_cut(normalization: Normalization, cut: list[list[int]]) -> None:
    whole = random_inputs(seed=11, lengths=LENGTHS)
    reduce(policy_loss("grpo", whole, kl_beta=0.1), whole, normalization).backward()
    pieces = random_inputs(seed=11, lengths=LENGTHS)
    counts = Counts()
    for sequences in cut:
        inputs = part(pieces, sequences)
        loss_sum(policy_loss("grpo", inputs, kl_beta=0.1), inputs, normalization).backward()
        counts += count(inputs)
    assert whole.logprobs.grad is not None
    assert pieces.logprobs.grad is not None
    gradient = pieces.logprobs.grad / denominator(counts, normalization)
    assert torch.allclose(gradient, whole.logprobs.grad, rtol=1e-12, atol=0)


def test_an_empty_batch_divides_by_one() -> None:
    assert [denominator(Counts(), normalization) for normalization in ALL] == [1.0, 1.0, 1.0, 1.0, 37.0]
