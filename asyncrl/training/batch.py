"""From lists of sequences to the tensors of a microbatch.

    sequences -> plan (which sequence in which microbatch) -> Batch (flat tensors)

A microbatch is one row of T tokens, its B sequences one after the other with no padding between them;
what keeps them apart is `Layout`. Only tokens to be trained have a log-prob computed: N of the T.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.errors import TrainerError
from asyncrl.types import TrainSequence

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the sequences lie in a row of T tokens."""

    lengths: tuple[int, ...]
    """[B], longest first; adds up to T."""
    position_ids: Tensor
    """[T] int64, restarts at each sequence."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What goes through the model, and which log-probs are wanted of it."""

    token_ids: Tensor
    """[T] int64"""
    layout: Layout
    predictors: Tensor
    """[N] int64: the place in the row whose output predicts the target (the one before it)."""
    targets: Tensor
    """[N] int64: token ids."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch of training. All but `tokens` are [N], over the loss tokens."""

    tokens: Tokens
    behavior_logprobs: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    """0 to B - 1."""
    sequences: int
    """Sequences that have a loss token."""


def plan(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Which sequences share a microbatch: indices, longest first, at most `max_tokens` together.

    First fit in decreasing order, within 11/9 of the fewest microbatches. A sequence longer than `max_tokens`
    goes alone: results do not change, memory does.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    if sum(lengths) <= max_tokens:
        return [order] if order else []
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        length = lengths[index]
        slot = next((number for number, free in enumerate(room) if free >= length), None)
        if slot is None:
            bins.append([index])
            room.append(max_tokens - length)
        else:
            bins[slot].append(index)
            room[slot] -= length
    return bins


def make_tokens(sequences: Sequence[Sequence[int]], device: torch.device) -> Tokens:
    """A row of token sequences, longest first; all tokens but each first are targets."""
    lengths = np.array([len(tokens) for tokens in sequences], dtype=np.int64)  # [B]
    token_ids = _flat(sequences, np.int64)  # [T]
    wanted = np.ones(len(token_ids), dtype=np.bool_)  # [T]
    return _tokens(token_ids, lengths, wanted, device)[0]


def make_batch(sequences: Sequence[TrainSequence], device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    """The tensors of a microbatch; `sequences` come longest first. The first token of each is never trained."""
    lengths = np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)  # [B]
    token_ids = _flat((sequence.tokens for sequence in sequences), np.int64)  # [T]
    mask = _flat((sequence.loss_mask for sequence in sequences), np.bool_)  # [T]
    behavior = _flat((sequence.behavior_logprobs for sequence in sequences), np.float64)  # [T]
    advantages = np.array([sequence.advantage for sequence in sequences], dtype=np.float64)  # [B]
    tokens, wanted = _tokens(token_ids, lengths, mask, device)
    ids = np.repeat(np.arange(len(sequences), dtype=np.int64), lengths)[wanted]  # [N]
    return Batch(
        tokens=tokens,
        behavior_logprobs=torch.from_numpy(behavior[wanted]).to(device, dtype),
        advantages=torch.from_numpy(advantages[ids]).to(device, dtype),
        sequence_ids=torch.from_numpy(ids).to(device),
        sequences=len(np.unique(ids)),
    )


def _tokens(
    token_ids: NDArray[np.int64], lengths: NDArray[np.int64], wanted: NDArray[np.bool_], device: torch.device
) -> tuple[Tokens, NDArray[np.int64]]:
    """The row, and the places [N] of its targets: those `wanted` [T] that have a token before them."""
    starts = np.cumsum(lengths) - lengths  # [B]
    wanted[starts] = False
    places = np.flatnonzero(wanted)  # [N]
    positions = np.arange(len(token_ids), dtype=np.int64) - np.repeat(starts, lengths)  # [T]
    tokens = Tokens(
        token_ids=torch.from_numpy(token_ids).to(device),
        layout=Layout(tuple(lengths.tolist()), torch.from_numpy(positions).to(device)),
        predictors=torch.from_numpy(places - 1).to(device),
        targets=torch.from_numpy(token_ids[places]).to(device),
    )
    return tokens, places


def _flat(sequences: Iterable[Sequence[float]], dtype: type[Scalar]) -> NDArray[Scalar]:
    return np.fromiter(chain.from_iterable(sequences), dtype)


def check_tokens(sequences: Iterable[Sequence[int]], vocab_size: int, max_length: int | None) -> None:
    """Raises `TrainerError` for a sequence that the model cannot read."""
    for index, tokens in enumerate(sequences):
        if not tokens:
            raise TrainerError(f"sequence {index} is empty. Expected at least one token.")
        if max_length is not None and len(tokens) > max_length:
            raise TrainerError(
                f"sequence {index} has {len(tokens)} tokens, but the model reads at most {max_length}. "
                "Lower max_seq_len or sampling.max_tokens, or use a model with a longer context."
            )
        lowest, highest = min(tokens), max(tokens)
        if lowest < 0 or highest >= vocab_size:
            raise TrainerError(
                f"sequence {index} holds the token id {lowest if lowest < 0 else highest}, but the model's vocabulary "
                f"is 0 to {vocab_size - 1}. Use the tokenizer of the model that is trained."
            )


def check_sequences(sequences: Sequence[TrainSequence]) -> None:
    """Raises `TrainerError` where the parts of a sequence differ in length."""
    for index, sequence in enumerate(sequences):
        lengths = len(sequence.tokens), len(sequence.behavior_logprobs), len(sequence.loss_mask)
        if len(set(lengths)) > 1:
            raise TrainerError(
                f"sequence {index} has {lengths[0]} tokens, {lengths[1]} behaviour log-probs and {lengths[2]} loss "
                "mask entries. Expected one of each per token."
            )
