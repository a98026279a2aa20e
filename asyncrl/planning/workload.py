"""What rollouts do: how many turns, how many tokens, how long the tools take. Pure: no clock.

A workload is a pool of rows, each with the rollouts of its group as they went in a real run, or as somebody describes
them. What belongs together stays together: the turns of a rollout with its tools, tokens and reward, and the rollouts
of one row with each other, since hard rows take long in all of their members. A simulation draws rows from the pool.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from asyncrl.errors import DataError

Outcome = Literal["done", "dropped", "failed", "timed out"]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model."""

    fresh: int
    """Prompt tokens that the rollout's earlier calls have not brought into the sampler's cache."""
    context: int
    """Prompt tokens in all."""
    drawn: int
    """Tokens that come back."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Calls that are made at once, nearly always a single one, after whatever came before them."""

    gap_s: float
    """From the end of the turn before, or the beginning of the rollout: tools, environments, parsing."""
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of the rollout function."""

    turns: tuple[Turn, ...]
    after_s: float
    """From the end of the last turn to the end of the rollout: its verifier."""
    outcome: Outcome = "done"
    reward: float = 0.0
    tokens: int = 0
    """That are trained on, prompts included; 0 unless `done`."""
    loss_tokens: int = 0

    @classmethod
    def of_turns(cls, turns: Iterable[tuple[float, int, int]], *, after_s: float = 0.0, reward: float = 0.0) -> Attempt:
        """A rollout that succeeds, of (seconds before the turn, tokens that are new in its prompt, tokens drawn): each
        turn reads what came before, and all that is drawn is trained."""
        made, context, loss_tokens = [], 0, 0
        for gap_s, fresh, drawn in turns:
            context += fresh
            made.append(Turn(gap_s, (Call(fresh, context, drawn),)))
            context, loss_tokens = context + drawn, loss_tokens + drawn
        return cls(tuple(made), after_s, reward=reward, tokens=context, loss_tokens=loss_tokens)

    @property
    def prompt(self) -> int:
        """Tokens that the members of a group have in common, as far as one can tell."""
        return self.turns[0].calls[0].context if self.turns else 0

    @property
    def drawn(self) -> int:
        return sum(call.drawn for turn in self.turns for call in turn.calls)

    @property
    def idle_s(self) -> float:
        """Seconds outside of the model."""
        return self.after_s + sum(turn.gap_s for turn in self.turns)


Member = tuple[Attempt, ...]
"""What became of one place in a group: its attempts, in order. All but the last one failed."""


@dataclass(frozen=True)
class Workload:
    """A pool of rows to draw from."""

    rows: tuple[tuple[Member, ...], ...]
    """The members of each row's group. At least one row, and one member in each."""
    about: str = ""
    """Where it comes from, in words."""

    def __post_init__(self) -> None:
        if not self.rows or not all(self.rows) or not all(member for row in self.rows for member in row):
            raise DataError(
                "there is no rollout to learn durations from. Expected a run in which at least one group of rollouts "
                "has ended, or a described workload."
            )

    # What the simulation asks

    def order(self, seed: int, count: int = 1 << 16) -> list[int]:
        """Rows to use, one after the other: each as often as any other, give or take one, in a random order."""
        rng = np.random.default_rng(seed)
        rounds = -(-count // len(self.rows))
        return [int(row) for row in np.concatenate([rng.permutation(len(self.rows)) for _ in range(rounds)])[:count]]

    def member(self, row: int, turn: int, index: int) -> Member:
        """The rollout in place `index` of a group of `row`, which is used for the `turn`-th time. Groups larger than
        the recorded one use rollouts twice, smaller ones others each time."""
        members = self.rows[row]
        return members[(index + turn) % len(members)]

    # What people ask

    @cached_property
    def attempts(self) -> list[Attempt]:
        return [attempt for row in self.rows for member in row for attempt in member]

    @property
    def rollouts(self) -> int:
        return sum(map(len, self.rows))

    @property
    def mean_idle_s(self) -> float:
        return float(np.mean([attempt.idle_s for attempt in self.attempts]))

    @property
    def mean_drawn(self) -> float:
        return float(np.mean([attempt.drawn for attempt in self.attempts]))

    @property
    def mean_tokens(self) -> float:
        """Of a sample."""
        return float(np.mean([attempt.tokens for attempt in self.attempts if attempt.outcome == "done"] or [0]))
