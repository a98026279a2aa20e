"""The tensors of one microbatch, and what is refused before there are any."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from asyncrl.errors import TrainerError
from asyncrl.training.batch import check_sequences, check_tokens, make_batch, make_tokens
from asyncrl.training.columns import token_columns, train_columns
from asyncrl.training.plan import Cut
from asyncrl.types import TrainSequence

CPU = torch.device("cpu")


def cut(*pairs: tuple[int, int]) -> Cut:
    indices, shared = np.array(pairs, dtype=np.int64).T
    return Cut(indices, shared)


LONG = TrainSequence([5, 6, 7, 8], [0.0, -1.0, -2.0, -3.0], [1, 0, 1, 1], 0.5, group=4)
SHORT = TrainSequence([9, 4], [0.0, -4.0], [0, 1], -2.0, group=2)


def test_batch_by_hand() -> None:
    """A mask on a first token trains nothing: no token predicts it. The last token predicts nothing."""
    silent = TrainSequence([3], [0.0], [1], 7.0, group=4)
    trailing = TrainSequence([1, 2, 3, 4], [-0.5] * 4, [0, 1, 0, 0], 1.0, group=2)
    columns = train_columns([silent, LONG, SHORT, trailing])
    assert columns.used.tolist() == [0, 3, 1, 1]
    batch = make_batch(columns, cut((1, 0), (2, 0), (3, 0)), CPU)
    assert batch.tokens.token_ids.tolist() == [5, 6, 7, 9, 1]
    assert batch.tokens.position_ids.tolist() == [0, 1, 2, 0, 0]
    assert batch.tokens.predictors.tolist() == [1, 2, 3, 4]
    assert batch.tokens.targets.tolist() == [7, 8, 4, 2]
    assert batch.behavior_logprobs.tolist() == [-2.0, -3.0, -4.0, -0.5]
    assert batch.advantages.tolist() == [0.5, 0.5, -2.0, 1.0]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2]
    assert batch.group_ids.tolist() == [1, 1, 0, 0]
    assert (batch.sequences, batch.train_tokens, batch.shared_tokens) == (3, 10, 0)


def test_shared_places_predict_the_targets_of_several() -> None:
    """1 2 3 is there once. Each sequence keeps its loss tokens there, and the token after it."""
    one = TrainSequence([1, 2, 3, 4, 5], [-0.1, -0.2, -0.3, -0.4, -0.5], [0, 1, 1, 1, 1], 1.0, group=0)
    other = TrainSequence([1, 2, 3, 6], [-1.1, -1.2, -1.3, -1.4], [0, 0, 1, 1], [9.0, 2.0, 3.0, 4.0], group=0)
    same = TrainSequence([1, 2, 3, 7], [-2.0] * 4, [0, 0, 0, 1], 5.0, group=0)
    batch = make_batch(train_columns([one, other, same]), cut((0, 0), (1, 3), (2, 3)), CPU)
    assert batch.tokens.token_ids.tolist() == [1, 2, 3, 4]
    assert batch.tokens.predictors.tolist() == [0, 1, 2, 3, 1, 2, 2]
    assert batch.tokens.targets.tolist() == [2, 3, 4, 5, 3, 6, 7]
    assert batch.advantages.tolist() == [1.0, 1.0, 1.0, 1.0, 3.0, 4.0, 5.0]
    assert batch.behavior_logprobs.tolist() == pytest.approx([-0.2, -0.3, -0.4, -0.5, -1.3, -1.4, -2.0])
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert (batch.sequences, batch.train_tokens, batch.shared_tokens) == (3, 13, 6)


def test_tokens_by_hand() -> None:
    tokens = make_tokens(token_columns([[5, 6, 7], [9, 4], [2]]), cut((1, 0), (0, 0)), CPU)
    assert tokens.token_ids.tolist() == [5, 6, 9]
    assert tokens.predictors.tolist() == [2, 0, 1]
    assert tokens.targets.tolist() == [4, 6, 7]


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
    with pytest.raises(TrainerError, match="sequence 0 has 3 tokens and 2 advantages"):
        check_sequences([TrainSequence([1, 2, 3], [0.0] * 3, [0, 1, 1], [1.0, 2.0], 0)])
