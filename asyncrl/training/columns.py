"""Sequences as flat arrays, so that nothing after this loops over tokens.

B sequences, M tokens of all of them, N targets: the tokens whose log-prob is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from asyncrl.training.layout import Integers, before
from asyncrl.types import TrainSequence

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Columns:
    """The sequences of one call, one after the other."""

    tokens: Integers
    """[M] token ids"""
    starts: Integers
    """[B] where each sequence begins in `tokens`."""
    lengths: Integers
    """[B] tokens of each."""
    used: Integers
    """[B] leading tokens that must go through the model: those before the last target."""
    groups: Integers
    """[B] sequences of one group have tokens in common."""
    targets: Integers
    """[N] places in `tokens`. The first token of a sequence is none: nothing predicts it."""
    first_target: Integers
    """[B + 1] where the targets of each sequence begin in `targets`, and the end."""
    behavior_logprobs: NDArray[np.float64]
    """[N]"""
    advantages: NDArray[np.float64]
    """[N]"""


def token_columns(sequences: Sequence[Sequence[int]]) -> Columns:
    """Token sequences of no group; all tokens but each first are targets, without log-probs and advantages."""
    lengths = _lengths(sequences)  # [B]
    tokens = _flat(sequences, np.int64)  # [M]
    targets, first_target = _targets(np.ones(len(tokens), dtype=np.bool_), lengths)
    nothing = np.zeros(len(targets), dtype=np.float64)
    groups = np.arange(len(lengths), dtype=np.int64)
    return _columns(tokens, lengths, groups, targets, first_target, nothing, nothing)


def train_columns(sequences: Sequence[TrainSequence]) -> Columns:
    """Sequences to train; their loss tokens are the targets."""
    lengths = _lengths([sequence.tokens for sequence in sequences])  # [B]
    mask = _flat((sequence.loss_mask for sequence in sequences), np.bool_)  # [M]
    targets, first_target = _targets(mask, lengths)
    return _columns(
        tokens=_flat((sequence.tokens for sequence in sequences), np.int64),
        lengths=lengths,
        groups=np.array([sequence.group for sequence in sequences], dtype=np.int64),
        targets=targets,
        first_target=first_target,
        behavior_logprobs=_flat((sequence.behavior_logprobs for sequence in sequences), np.float64)[targets],
        advantages=_advantages(sequences, lengths, targets, first_target),
    )


def _targets(wanted: NDArray[np.bool_], lengths: Integers) -> tuple[Integers, Integers]:
    """`Columns.targets` and `Columns.first_target`, of the tokens that are `wanted` [M]."""
    starts = before(lengths)  # [B]
    wanted[starts[lengths > 0]] = False
    targets = np.flatnonzero(wanted)  # [N]
    return targets, np.searchsorted(targets, np.append(starts, len(wanted)))


def _columns(
    tokens: Integers,
    lengths: Integers,
    groups: Integers,
    targets: Integers,
    first_target: Integers,
    behavior_logprobs: NDArray[np.float64],
    advantages: NDArray[np.float64],
) -> Columns:
    starts = before(lengths)  # [B]
    # The last target of each sequence is the one before the first of the next. The -1 is read where there is none.
    last = np.append(targets, -1)[first_target[1:] - 1]  # [B]
    used = np.where(first_target[1:] > first_target[:-1], last - starts, 0)
    return Columns(tokens, starts, lengths, used, groups, targets, first_target, behavior_logprobs, advantages)


def _advantages(
    sequences: Sequence[TrainSequence], lengths: Integers, targets: Integers, first_target: Integers
) -> NDArray[np.float64]:
    """[N] the advantage of each target: its own, or that of its sequence."""
    advantages = [sequence.advantage for sequence in sequences]
    if all(isinstance(advantage, int | float) for advantage in advantages):
        return np.repeat(np.array(advantages, dtype=np.float64), np.diff(first_target))
    each = (np.asarray(advantage, dtype=np.float64) for advantage in advantages)
    spread = [np.broadcast_to(values, length) for values, length in zip(each, lengths, strict=True)]
    return np.concatenate(spread)[targets]


def _lengths(sequences: Sequence[Sequence[int]]) -> Integers:
    return np.array([len(tokens) for tokens in sequences], dtype=np.int64)


def _flat(sequences: Iterable[Sequence[float]], dtype: type[Scalar]) -> NDArray[Scalar]:
    return np.fromiter(chain.from_iterable(sequences), dtype)
