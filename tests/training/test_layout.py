"""The row: what sequences share lies there once, and every path leads through its own tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.training.layout import BLOCK_SPREAD, SHORT_TOKENS, block_sizes, lay_out, padded_tokens


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_row_by_hand() -> None:
    """a b c d e; a b c f; a b c f g h; x y: 5 + 1 + 2 + 2 tokens, what shares nothing first."""
    layout, paths = lay_out(used=numbers(5, 4, 6, 2), shared=numbers(0, 3, 4, 0))
    assert layout.tokens == 10
    assert layout.spans.tolist() == [5, 2, 2, 1]
    assert layout.depths.tolist() == [0, 0, 4, 3]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 4, 5, 3]
    first, fourth, sixth, last = [0, 1, 2, 3, 4], [0, 1, 2, 9], [0, 1, 2, 9, 7, 8], [5, 6]
    assert paths.tolist() == [*first, *fourth, *sixth, *last]
    assert layout.paths.tolist() == [*first, *last, *sixth, *fourth]


def test_sequences_that_add_nothing_have_no_span() -> None:
    layout, paths = lay_out(used=numbers(4, 4, 3), shared=numbers(0, 4, 3))
    assert layout.spans.tolist() == [4]
    assert paths.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_the_row_is_the_trie(sequences: list[tuple[int, ...]]) -> None:
    """Sorted, neighbours share so much that the row has one token for each different beginning."""
    sequences = sorted(sequences)
    shared = [0]
    for one, other in pairwise(sequences):
        same = [a == b for a, b in zip(one, other, strict=False)]
        shared.append(same.index(False) if False in same else len(same))
    layout, paths = lay_out(numbers(*map(len, sequences)), numbers(*shared))
    assert layout.tokens == len({tokens[: end + 1] for tokens in sequences for end in range(len(tokens))})
    row = np.full(layout.tokens, -1)
    row[paths] = [token for tokens in sequences for token in tokens]
    assert row[paths].tolist() == [token for tokens in sequences for token in tokens]
    assert layout.positions[paths].tolist() == [place for tokens in sequences for place in range(len(tokens))]
    ends = np.cumsum(layout.spans + layout.depths)
    for span, start, end in zip(layout.spans, np.cumsum(layout.spans) - layout.spans, ends, strict=True):
        assert layout.paths[end - span : end].tolist() == list(range(start, start + span))


def test_blocks_by_hand() -> None:
    """Spans of their own and spans that share never meet; nor do lengths beyond the spread, but short ones."""
    used = numbers(100, 70, 60, 16, 3, 2, 90, 90, 90)
    shared = numbers(0, 0, 0, 0, 0, 0, 0, 80, 50)
    layout, _ = lay_out(used, shared)
    assert layout.spans.tolist() == [100, 90, 70, 60, 16, 3, 2, 40, 10]
    assert block_sizes(layout) == [3, 1, 3, 1, 1]
    assert padded_tokens(layout) == 3 * 100 + 60 + 3 * 16 + 40 + 10


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_padding_is_bounded(pairs: list[tuple[int, int]]) -> None:
    """A block has spans and paths within the spread of its longest, or short ones."""
    own, depths = map(np.array, zip(*pairs, strict=True))
    # A sequence of its own before each that shares, for it to take from.
    used = np.stack([np.maximum(depths, 1), own + depths], axis=1).ravel()
    layout, _ = lay_out(used, np.stack([np.zeros_like(depths), depths], axis=1).ravel())
    ends = np.cumsum(block_sizes(layout))
    assert ends[-1] == len(layout.spans)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        spans, depths = layout.spans[start:end], layout.depths[start:end]
        assert depths.all() or not depths.any()
        assert spans.max() <= max(SHORT_TOKENS, BLOCK_SPREAD * spans.min())
        assert (spans + depths).max() <= max(SHORT_TOKENS, BLOCK_SPREAD * (spans + depths).min())
    assert layout.tokens <= padded_tokens(layout) <= max(SHORT_TOKENS, BLOCK_SPREAD) * layout.tokens
