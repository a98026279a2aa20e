"""The tensors of one microbatch.

A microbatch is one row of T tokens without padding, in which its B sequences lie as `Layout` says: what they have
in common lies there once. Of each sequence only the tokens before its last target are in the row, and only the
targets, N in all, have a log-prob computed. Where a place is shared, several targets are predicted by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncrl.errors import TrainerError
from asyncrl.training.columns import Columns
from asyncrl.training.layout import Integers, Layout, before, lay_out, ranges
from asyncrl.training.plan import Cut
from asyncrl.types import TrainSequence


@dataclass(frozen=True, slots=True)
class Tokens:
    """What goes through the model, and which log-probs are wanted of it."""

    token_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64: the place of each token in its sequence."""
    layout: Layout
    predictors: Tensor
    """[N] int64: the place in the row whose output predicts the target (the one before it)."""
    targets: Tensor
    """[N] int64: token ids."""
    read: Tensor
    """[R] int64: the places that are in `predictors`, each once."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One microbatch of training. The tensors but those of `tokens` are [N], over the loss tokens."""

    tokens: Tokens
    behavior_logprobs: Tensor
    advantages: Tensor
    sequence_ids: Tensor
    """0 to B - 1."""
    group_ids: Tensor
    """0 to G - 1: sequences of one group share a prompt, or are a preference pair."""
    sequences: int
    """Sequences that have a loss token."""
    train_tokens: int
    """Tokens of all sequences, each counted as often as it occurs."""
    shared_tokens: int
    """Tokens that the row was spared because another sequence had brought them."""


def make_tokens(columns: Columns, cut: Cut, device: torch.device) -> Tokens:
    """The row of the sequences of `cut`."""
    return _tokens(columns, cut, _targets(columns, cut), device)


def make_batch(columns: Columns, cut: Cut, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
    """The tensors of the microbatch `cut`, in its order of sequences."""
    chosen, counts = _targets(columns, cut), _target_counts(columns, cut)
    ids = np.repeat(np.arange(len(counts), dtype=np.int64), counts)  # [N]
    groups = np.unique(columns.groups[cut.indices], return_inverse=True)[1]  # [B]
    return Batch(
        tokens=_tokens(columns, cut, chosen, device),
        behavior_logprobs=torch.from_numpy(columns.behavior_logprobs[chosen]).to(device, dtype),
        advantages=torch.from_numpy(columns.advantages[chosen]).to(device, dtype),
        sequence_ids=torch.from_numpy(ids).to(device),
        group_ids=torch.from_numpy(groups[ids]).to(device),
        sequences=int(np.count_nonzero(counts)),
        train_tokens=int(columns.lengths[cut.indices].sum()),
        shared_tokens=int(cut.shared.sum()),
    )


def _target_counts(columns: Columns, cut: Cut) -> Integers:
    """[B] targets of each sequence of `cut`."""
    return columns.first_target[cut.indices + 1] - columns.first_target[cut.indices]


def _targets(columns: Columns, cut: Cut) -> Integers:
    """[N] the targets of `cut`, as indices into those of `columns`."""
    return ranges(columns.first_target[cut.indices], _target_counts(columns, cut))


def _tokens(columns: Columns, cut: Cut, chosen: Integers, device: torch.device) -> Tokens:
    starts, used = columns.starts[cut.indices], columns.used[cut.indices]  # [B]
    layout, paths = lay_out(used, cut.shared)
    token_ids = np.empty(layout.tokens, dtype=np.int64)  # [T]
    token_ids[paths] = columns.tokens[ranges(starts, used)]  # what is shared is written more than once, the same
    targets = columns.targets[chosen]  # [N]
    # From a place in the columns to the same place in the paths of this cut, and one back: the token before.
    shift = np.repeat(before(used) - starts - 1, _target_counts(columns, cut))
    predictors = paths[targets + shift]
    return Tokens(
        token_ids=torch.from_numpy(token_ids).to(device),
        position_ids=torch.from_numpy(layout.positions).to(device),
        layout=layout,
        predictors=torch.from_numpy(predictors).to(device),
        targets=torch.from_numpy(columns.tokens[targets]).to(device),
        read=torch.from_numpy(np.unique(predictors)).to(device),
    )


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
        advantages = 1 if isinstance(sequence.advantage, int | float) else np.size(sequence.advantage)
        if advantages not in (1, lengths[0]):
            raise TrainerError(
                f"sequence {index} has {lengths[0]} tokens and {advantages} advantages. Expected one per token, or one "
                "number for all."
            )
