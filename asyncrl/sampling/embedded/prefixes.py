"""Keys and values of sessions whose last request has ended: the next one computes only what is new.

They belong to the model that computed them, and to no other: a session goes on under new weights from nothing.

Shapes: N tokens, H key-value heads, D head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from asyncrl.sampling.embedded.columns import States
from asyncrl.sampling.embedded.versions import LiveModel

LEAST_BYTES = 512 * 2**20
"""May always be kept; beyond it half of what the weights take, since large models remember more per token."""
_PATIENCE, _SAMPLE = 256, 16
"""After 256 in a row that nobody came back for, only every 16th is kept: in rollouts of one turn, or where new weights
come with every turn, copying takes 5 to 12% of a tiny model's time and serves nobody."""
_BRANCHES = 4
"""Of one session: sub-agents take turns, and a conversation may fork."""


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """One sequence that a model has seen."""

    tokens: np.ndarray
    """[N] int64."""
    states: States
    """Keys and values [H, N, D] of each layer."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.states if layer is not None for tensor in layer)


class PrefixStore:
    """Owned by the worker. The sessions that rested longest go first once `limit_bytes` are kept."""

    @classmethod
    def beside(cls, model: LiveModel) -> PrefixStore:
        """As large as it may be where this model is loaded."""
        weights = sum(parameter.nbytes for parameter in model.module.parameters())
        return cls(max(LEAST_BYTES, weights // 2))

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._unclaimed = 0  # since somebody came back
        self._sessions: OrderedDict[tuple[LiveModel, str], list[Past]] = OrderedDict()

    def find(self, model: LiveModel, session: str, tokens: np.ndarray) -> tuple[States, int]:
        """Keys and values that begin with those of `tokens`, and of how many; ([], 0) where `model` has seen none.

        Never all of them: the last one must be computed, for its logits.
        """
        branches = self._sessions.get((model, session))
        if not branches:
            return [], 0
        self._sessions.move_to_end((model, session))
        seen, past = max(((_common(past.tokens, tokens), past) for past in branches), key=lambda found: found[0])
        self._unclaimed = 0
        return past.states, min(seen, len(tokens) - 1)

    def wants_more(self) -> bool:
        """Asked once for each sequence that could be kept."""
        self._unclaimed += 1
        return self._unclaimed <= _PATIENCE or self._unclaimed % _SAMPLE == 0

    def keep(self, model: LiveModel, session: str, past: Past) -> None:
        """It takes the place of what it goes on from."""
        if past.nbytes > self.limit_bytes:
            return
        older = self._forget((model, session))
        forks = [other for other in older if _common(other.tokens, past.tokens) < len(other.tokens)]
        self._sessions[model, session] = branches = [*forks[1 - _BRANCHES :], past]
        self.kept_bytes += sum(branch.nbytes for branch in branches)
        while self.kept_bytes > self.limit_bytes:
            self._forget(next(iter(self._sessions)))

    def retain(self, models: Collection[LiveModel]) -> None:
        """Forget what other models have seen."""
        for key in [key for key in self._sessions if key[0] not in models]:
            self._forget(key)

    def _forget(self, key: tuple[LiveModel, str]) -> list[Past]:
        branches = self._sessions.pop(key, [])
        self.kept_bytes -= sum(branch.nbytes for branch in branches)
        return branches


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens both begin with."""
    shorter = min(len(one), len(other))
    differs = one[:shorter] != other[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
