"""Which sequences go into which microbatch, and what they share there.

    columns -> order (what has much in common is neighbours) -> trees -> microbatches of at most `max_tokens`

Groups stay together and are sorted by their tokens, so that a prompt is shared by its group, and the system prompt
of all prompts by all groups. Numpy and sorting only: tens of thousands of sequences per second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from asyncrl.training.columns import Columns
from asyncrl.training.layout import Integers

# Less in common is not worth an attention with a mask: this many tokens at least, and this part of the sequence.
MIN_SHARED_TOKENS = 8
MIN_SHARED_PART = 1 / 16
# A shared token is not computed again, but its keys and values are gathered again: a small part of its memory.
SHARED_TOKEN_COST = 1 / 16


@dataclass(frozen=True, slots=True)
class Cut:
    """The sequences of one microbatch."""

    indices: Integers
    """[B] into the columns, in the order of sharing."""
    shared: Integers
    """[B] leading tokens that each takes from the one before it."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Sequences from `first` to `end` in the order of sharing, which stay together."""

    first: int
    end: int
    cost: float
    """In tokens of the row."""


def plan(columns: Columns, max_tokens: int, *, share: bool, whole_groups: bool = False) -> list[Cut]:
    """Cut the sequences into microbatches of at most `max_tokens` of the row.

    A group stays in one microbatch where it fits and shares, and always with `whole_groups`. What cannot be cut is
    alone where it is longer than `max_tokens`: results do not change, memory does. Runs are placed by best fit
    from the largest on, within 11/9 of the fewest microbatches. Sequences without a target are in none.
    """
    order = _order(columns, share, whole_groups)
    order = order[columns.used[order] > 0]
    shared = _shared(columns, order) if share else np.zeros(len(order), dtype=np.int64)
    costs = columns.used[order] - shared * (1 - SHARED_TOKEN_COST)  # [B]
    atoms = _atoms(columns.groups[order], shared, costs, max_tokens, share or whole_groups, whole_groups)
    runs = _runs(atoms, shared, max_tokens)
    cuts = []
    for members in _best_fit([run.cost for run in runs], max_tokens):
        taken = shared.copy()
        taken[[runs[member].first for member in members]] = 0
        places = np.concatenate([np.arange(runs[member].first, runs[member].end) for member in members])
        cuts.append(Cut(order[places], taken[places]))
    return cuts


def _order(columns: Columns, share: bool, whole_groups: bool) -> Integers:
    """[B] groups beside each other; where they share, sorted by tokens, and groups by their smallest sequence."""
    if not share:
        return np.argsort(columns.groups, kind="stable") if whole_groups else np.arange(len(columns.groups))
    # Which of two tokens is the smaller does not matter, as long as it is always the same one: their bytes will do.
    content, width = columns.tokens.tobytes(), columns.tokens.itemsize
    starts, ends = columns.starts * width, (columns.starts + columns.used) * width
    keys = [content[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    groups = columns.groups.tolist()
    smallest: dict[int, bytes] = {}
    for group, key in zip(groups, keys, strict=True):
        smallest[group] = min(smallest.get(group, key), key)
    order = sorted(range(len(keys)), key=lambda index: (smallest[groups[index]], groups[index], keys[index]))
    return np.array(order, dtype=np.int64)


def _shared(columns: Columns, order: Integers) -> Integers:
    """[B] the leading tokens that each has in common with the one before it in `order`, 0 where they are too few."""
    starts, used = columns.starts[order].tolist(), columns.used[order].tolist()
    shared = np.zeros(len(order), dtype=np.int64)
    for place in range(1, len(used)):
        most = min(used[place - 1], used[place])
        if most < MIN_SHARED_TOKENS:
            continue
        first, second = starts[place - 1], starts[place]
        differs = columns.tokens[first : first + most] != columns.tokens[second : second + most]
        common = int(differs.argmax())
        common = common if differs[common] else most
        if common >= max(MIN_SHARED_TOKENS, used[place] * MIN_SHARED_PART):
            shared[place] = common
    return shared


def _atoms(
    groups: Integers, shared: Integers, costs: NDArray[np.float64], max_tokens: int, together: bool, whole: bool
) -> list[_Run]:
    """What is never cut, in order: groups where they stay `together` and fit or must be `whole`, else sequences."""
    borders = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1)) if together else np.arange(len(groups))
    atoms: list[_Run] = []
    for first, end in pairwise([*borders.tolist(), len(groups)]):
        cost = float(costs[first:end].sum())
        if whole or cost + _of_its_own(shared, first) <= max_tokens:
            atoms.append(_Run(first, end, cost))
        else:
            atoms += [_Run(place, place + 1, float(costs[place])) for place in range(first, end)]
    return atoms


def _runs(atoms: list[_Run], shared: Integers, max_tokens: int) -> list[_Run]:
    """Atoms joined to those before them that they share with, as far as `max_tokens` allows."""
    runs: list[_Run] = []
    for atom in atoms:
        if shared[atom.first] and runs[-1].cost + atom.cost <= max_tokens:
            runs[-1] = _Run(runs[-1].first, atom.end, runs[-1].cost + atom.cost)
        else:
            runs.append(_Run(atom.first, atom.end, atom.cost + _of_its_own(shared, atom.first)))
    return runs


def _of_its_own(shared: Integers, first: int) -> float:
    """What it costs when a sequence has nothing before it to take from."""
    return float(shared[first]) * (1 - SHARED_TOKEN_COST)


def _best_fit(costs: list[float], max_tokens: int) -> list[list[int]]:
    """Items in bins: each, from the largest on, goes where it leaves the least room."""
    bins: list[list[int]] = []
    rooms: list[tuple[float, int]] = []  # sorted: what is free, and in which bin
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        slot = bisect_left(rooms, (costs[item], -1))
        if slot < len(rooms):
            free, number = rooms.pop(slot)
        else:
            free, number = float(max_tokens), len(bins)
            bins.append([])
        bins[number].append(item)
        insort(rooms, (free - costs[item], number))
    return bins
