"""Where the tokens of sequences lie in a row, when what they have in common lies there once.

    sequences in the order of their tokens:     the row, one span for each:
      a b c d e                                   a b c d e
      a b c f        shares 3 with the one above        f
      a b c f g h    shares 4                             g h
      x y            shares 0                     x y

Next to each other in lexicographic order, two sequences share as much as any two that they lie between, so one
number per sequence holds the whole tree: how many leading tokens it takes from the sequence before it. The *path*
of a sequence is the places of its tokens in the row; its *span* is what it adds to the row.
B sequences, U tokens of all of them, S spans, T tokens of the row, K keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Numbers = NDArray[Any]

# Spans of one attention block may differ in length by this factor: more blocks are more calls, fewer more padding.
BLOCK_SPREAD = 1.5
# Below this length attention is so cheap that a further block costs more than the padding.
SHORT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """A row of T tokens as S spans, those that attend alike beside each other: shared by none first, longest first."""

    spans: Integers
    """[S] tokens of each span, in the order of the row."""
    depths: Integers
    """[S] tokens of its path before it: the position of its first token."""
    paths: Integers
    """[K] the places that each span attends to, its own last: depth + span of them, span after span."""

    @property
    def tokens(self) -> int:
        """T"""
        return int(self.spans.sum())

    @property
    def positions(self) -> Integers:
        """[T] the place of each token in its sequence."""
        return ranges(self.depths, self.spans)


def lay_out(used: Integers, shared: Integers) -> tuple[Layout, Integers]:
    """The row of sequences with `used` [B] tokens, of which each takes `shared` [B] from the one before it.

    Also gives the paths of all sequences, one after the other: [U] places in the row.
    """
    own = used - shared  # [B]
    order = _row_order(own, shared)  # [S]
    starts = np.zeros_like(used)
    starts[order] = before(own[order])
    offsets = before(used)  # [B]
    places = ranges(starts - shared, used)  # [U], right beyond what is shared
    for index in np.flatnonzero(shared).tolist():
        source, target, count = offsets[index - 1], offsets[index], shared[index]
        places[target : target + count] = places[source : source + count]
    paths = places[ranges(offsets[order], used[order])]
    return Layout(spans=own[order], depths=shared[order], paths=paths), places


def block_sizes(layout: Layout) -> list[int]:
    """How many spans each attention block takes, in the order of the row."""
    sizes: list[int] = []
    kind, longest = -1, 0
    kinds = _kinds(layout.spans, layout.depths).tolist()
    for found, keys in zip(kinds, (layout.spans + layout.depths).tolist(), strict=True):
        if found == kind and (keys * BLOCK_SPREAD >= longest or longest <= SHORT_TOKENS):
            sizes[-1] += 1
        else:
            sizes.append(1)
            kind, longest = found, keys
    return sizes


def padded_tokens(layout: Layout) -> int:
    """Tokens of the row and the padding of its attention blocks: each span is as long as the longest of its block."""
    sizes = np.array(block_sizes(layout), dtype=np.int64)
    if not len(sizes):
        return 0
    return int((np.maximum.reduceat(layout.spans, before(sizes)) * sizes).sum())


def _row_order(own: Integers, shared: Integers) -> Integers:
    """[S] the sequences that add to the row, in the order of their spans."""
    order = np.lexsort((-own, -own - shared, -_kinds(own, shared)))
    return order[own[order] > 0]


def _kinds(own: Integers, shared: Integers) -> Integers:
    """Spans of one kind may share a block. Those that share nothing are the first kind: they need no mask."""
    steps = np.ceil(np.log(np.maximum(own, SHORT_TOKENS) / SHORT_TOKENS) / np.log(BLOCK_SPREAD))
    return np.where(shared == 0, np.iinfo(np.int64).max, steps.astype(np.int64))


def before(counts: Integers) -> Integers:
    """What is before each: the running sum, the own count left out."""
    return np.cumsum(counts) - counts


def ranges(starts: Integers, counts: Integers) -> Integers:
    """start, start + 1, ... of each, `count` of them, one after the other."""
    return np.repeat(starts - before(counts), counts) + np.arange(counts.sum(), dtype=np.int64)
