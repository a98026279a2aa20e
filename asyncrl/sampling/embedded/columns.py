"""The KV cache of a decode batch: all rows end at the same column.

    column        0 . . . . . . . . . . . . cursor
    row 0         . . . p p p p t t t t t t |          p prompt, t drawn
    row 1         . . . . . . . p p p p t t |          a row that joined later
    row 2         . p p p p p p p p p t t t |

Every row's next key goes to column `cursor`: one slice copy for the whole batch. Because each row's columns
are consecutive, distances between columns are distances between positions, and every mask that `transformers`
builds from a two-dimensional attention mask (causal, sliding window, chunked) is right as it stands.

Shapes: R rows allocated, H key-value heads, C columns allocated, D head dimension, Q new columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

States = list[tuple[Tensor, Tensor] | None]
"""Keys and values [H, columns, D] of one row, layer by layer; None where a layer has none of its own."""


@dataclass(slots=True)
class Window:
    """Which part of the cache the next forward reads and writes."""

    rows: slice
    first: int
    """First column that is read."""
    cursor: int
    """First column that is written."""


class ColumnLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer. Owned by a `ColumnCache`, which sets the window."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        self.room = (0, 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, columns = self.room
        self.keys = _blank(key_states, rows, columns)  # [R, H, C, D]
        self.values = _blank(value_states, rows, columns)  # [R, H, C, D]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [rows, H, Q, D] at the cursor; return all columns of the window, the new ones included."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        end = window.cursor + key_states.shape[-2]
        self.keys[window.rows, :, window.cursor : end] = key_states
        self.values[window.rows, :, window.cursor : end] = value_states
        if window.first == window.cursor:
            return key_states, value_states
        return self.keys[window.rows, :, window.first : end], self.values[window.rows, :, window.first : end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.cursor - self.window.first

    def get_max_length(self) -> int:
        return -1


class ColumnCache(Cache):  # type: ignore[misc]
    """The layers, and the room they share."""

    def __init__(self, layers: int) -> None:
        self.window = Window(slice(0, 0), 0, 0)
        super().__init__(layers=[ColumnLayer(self.window) for _ in range(layers)])

    @classmethod
    def of_row(cls, states: States, length: int, columns: int) -> ColumnCache:
        """A cache of one row: its first `length` columns are those of `states`, and there is room for `columns`."""
        cache = cls(len(states))
        cache.reallocate(1, columns, keep_rows=0, first=0, end=0, to=0)
        cache.write(0, 0, states, length)
        cache.look(slice(0, 1), 0, length)
        return cache

    def look(self, rows: slice, first: int, cursor: int) -> None:
        """Aim the next forward."""
        self.window.rows, self.window.first, self.window.cursor = rows, first, cursor

    def read(self, row: int, first: int, end: int) -> States:
        """A copy of what one row has between two columns."""
        return [
            (_copied(layer.keys[row, :, first:end]), _copied(layer.values[row, :, first:end]))
            if layer.is_initialized
            else None
            for layer in self.layers
        ]

    def write(self, row: int, first: int, states: States, length: int) -> None:
        """Put the first `length` columns of `states` into one row, from column `first` on."""
        for layer, pair in zip(self.layers, states, strict=True):
            if pair is None:
                continue
            keys, values = pair
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            layer.keys[row, :, first : first + length] = keys[:, :length]
            layer.values[row, :, first : first + length] = values[:, :length]

    def move_rows(self, sources: list[int], targets: list[int], first: int, end: int) -> None:
        """Copy rows over others, between two columns."""
        for layer in self._allocated():
            source = torch.tensor(sources, device=layer.keys.device)
            for states in (layer.keys, layer.values):
                states[targets, :, first:end] = states[source, :, first:end]

    def reallocate(self, rows: int, columns: int, *, keep_rows: int, first: int, end: int, to: int) -> None:
        """Make room for `rows` x `columns`; columns [first, end) of the first `keep_rows` rows move to column `to`."""
        for layer in self.layers:
            layer.room = (rows, columns)
        for layer in self._allocated():
            layer.keys = _moved(layer.keys, rows, columns, keep_rows, first, end, to)
            layer.values = _moved(layer.values, rows, columns, keep_rows, first, end, to)

    def _allocated(self) -> list[ColumnLayer]:
        return [layer for layer in self.layers if layer.is_initialized]


def _copied(states: Tensor) -> Tensor:
    # Never in the strides of the cache, whose columns lie apart.
    return states.clone(memory_format=torch.contiguous_format)


def _blank(like: Tensor, rows: int, columns: int) -> Tensor:
    # Zeros, because masked columns are multiplied by zero weights and 0 x NaN is NaN.
    return like.new_zeros(rows, like.shape[1], columns, like.shape[3])


def _moved(states: Tensor, rows: int, columns: int, keep_rows: int, first: int, end: int, to: int) -> Tensor:
    moved = _blank(states, rows, columns)
    if keep_rows:
        moved[:keep_rows, :, to : to + end - first] = states[:keep_rows, :, first:end]
    return moved
