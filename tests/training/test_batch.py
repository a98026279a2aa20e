"""Packing: which sequence goes where, and the tensors of one microbatch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import TrainerError
from asyncrl.training.batch import check_sequences, check_tokens, make_batch, make_tokens, plan
from asyncrl.types import TrainSequence

CPU = torch.device("cpu")


def test_plan_by_hand() -> None:
    assert plan([3, 9, 5, 2, 4, 20], 10) == [[5], [1], [2, 4], [0, 3]]
    assert plan([3, 9, 5], 100) == [[1, 2, 0]]
    assert plan([], 10) == []


@given(lengths=st.lists(st.integers(1, 40), max_size=60), budget=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_plan_places_each_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = plan(lengths, budget)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    for indices in bins:
        inside = [lengths[index] for index in indices]
        assert sum(inside) <= budget or len(inside) == 1
        assert inside == sorted(inside, reverse=True)


def test_batch_by_hand() -> None:
    """A mask on a first token trains nothing: no token predicts it."""
    long = TrainSequence([5, 6, 7, 8], [0.0, -1.0, -2.0, -3.0], [1, 0, 1, 1], 0.5, group=0)
    short = TrainSequence([9, 4], [0.0, -4.0], [0, 1], -2.0, group=0)
    silent = TrainSequence([3], [0.0], [1], 7.0, group=0)
    batch = make_batch([long, short, silent], CPU)
    assert batch.tokens.token_ids.tolist() == [5, 6, 7, 8, 9, 4, 3]
    assert batch.tokens.layout.lengths == (4, 2, 1)
    assert batch.tokens.layout.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert batch.tokens.predictors.tolist() == [1, 2, 4]
    assert batch.tokens.targets.tolist() == [7, 8, 4]
    assert batch.behavior_logprobs.tolist() == [-2.0, -3.0, -4.0]
    assert batch.advantages.tolist() == [0.5, 0.5, -2.0]
    assert batch.sequence_ids.tolist() == [0, 0, 1]
    assert batch.sequences == 2


def test_tokens_by_hand() -> None:
    tokens = make_tokens([[5, 6, 7], [9, 4]], CPU)
    assert tokens.predictors.tolist() == [0, 1, 3]
    assert tokens.targets.tolist() == [6, 7, 4]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [([], "empty"), ([1, 100], "token id 100.*0 to 99"), ([-1, 5], "token id -1"), ([1] * 9, "9 tokens.*at most 8")],
)
def test_unreadable_tokens(tokens: list[int], words: str) -> None:
    with pytest.raises(TrainerError, match=f"sequence 1 .*{words}"):
        check_tokens([[1, 2], tokens], vocab_size=100, max_length=8)


def test_parts_of_different_length() -> None:
    with pytest.raises(TrainerError, match="3 tokens, 2 behaviour log-probs and 3 loss mask"):
        check_sequences([TrainSequence([1, 2, 3], [0.0, 0.0], [0, 1, 1], 1.0, 0)])
