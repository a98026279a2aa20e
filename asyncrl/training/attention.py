"""Causal attention over a row of spans, as an attention function of `transformers`.

Every linear layer runs on the row of T tokens as it is. Attention alone must know what each span sees: its path,
which is what it shares with others and then itself (layout.py). Queries stay where they are; keys and values of
shared tokens are gathered once for each span that sees them. A mask over the whole row would cost T^2, so there are
- `Varlen`: torch's flash attention for variable lengths, on CUDA in half precision. Where a span has fewer queries
  than keys, its causal mask is aligned to the last of both, which is what a path needs;
- `Blocks`: spans of similar lengths in padded blocks through sdpa, on any device and in any precision. Padding is on
  the right, where causal attention never looks.
The package `flash_attn` has the kernels that torch brings. Flex attention needs a compiler (without, it makes all T^2
scores), works in tiles of 128 tokens that short spans would leave empty, and has no backward on the CPU. Both are
left out.

The prepared row travels as the keyword `packed` through the model's forward, so that gradient checkpointing,
which runs a layer again in backward, finds it again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from asyncrl.training.layout import Integers, Layout, before, block_sizes

NAME = "asyncrl_packed"


@dataclass(frozen=True, slots=True)
class Varlen:
    """A row for flash attention: where the queries of each span begin, and its keys."""

    query_starts: Tensor
    """[S + 1] int32, the end included."""
    key_starts: Tensor
    """[S + 1] int32"""
    longest_query: int
    longest_key: int
    keys: Tensor | None
    """[K] places in the row; None where nothing is shared: the keys are the row itself."""


@dataclass(frozen=True, slots=True)
class Block:
    """Spans that attend in one call: b spans of q queries and k keys, the shorter ones padded."""

    spans: int
    queries: int
    keys: int
    positions: Tensor | None
    """[b or 1, q] how many keys before its own a query sees; None where that is its number, 0 to q - 1."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Filled on demand, once for all layers: sliding window and dtype -> mask."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A row for sdpa. The places of the blocks are those of the first block, then of the second, ..."""

    blocks: tuple[Block, ...]
    queries: Tensor | None
    """[sum of b q] places in the row; None where the blocks hold the row as it is."""
    keys: Tensor | None
    """[sum of b k] places in the row; None as above."""
    restore: Tensor | None
    """[T] the place of each of the row's tokens among the queries; None as above."""
    longest_key: int

    @property
    def padded_tokens(self) -> int:
        """Queries with those that are padding: at least the tokens of the row."""
        return sum(block.spans * block.queries for block in self.blocks)


Packed = Varlen | Blocks


def prepare_varlen(layout: Layout, device: torch.device) -> Varlen:
    """Made once per microbatch, read by every layer."""
    keys = layout.spans + layout.depths  # [S]
    return Varlen(
        query_starts=_on(np.append(before(layout.spans), layout.tokens).astype(np.int32), device),
        key_starts=_on(np.append(before(keys), keys.sum()).astype(np.int32), device),
        longest_query=int(layout.spans.max()),
        longest_key=int(keys.max()),
        keys=_on(layout.paths, device) if layout.depths.any() else None,
    )


def prepare_blocks(layout: Layout, device: torch.device) -> Blocks:
    """Made once per microbatch, read by every layer."""
    lengths = layout.spans + layout.depths  # [S] keys
    query_starts, key_starts = before(layout.spans), before(lengths)
    blocks, queries, keys, real = [], [], [], []
    sizes = block_sizes(layout)
    for first, size in zip(accumulate(sizes, initial=0), sizes, strict=False):
        part = slice(first, first + size)
        spans, depths = layout.spans[part], layout.depths[part]  # [b]
        queries.append(_padded(query_starts[part], spans).ravel())
        keys.append(_padded(key_starts[part], lengths[part]).ravel())
        real.append((np.arange(spans.max()) < spans[:, None]).ravel())
        positions = None
        if depths.any():
            places = _padded(depths, spans)  # [b, q]
            positions = _on(places[:1] if (places == places[0]).all() else places, device)
        blocks.append(Block(size, int(spans.max()), int(lengths[part].max()), positions))
    whole = all(part.all() for part in real)
    return Blocks(
        blocks=tuple(blocks),
        queries=None if whole else _on(np.concatenate(queries), device),
        keys=None if whole and not layout.depths.any() else _on(layout.paths[np.concatenate(keys)], device),
        restore=None if whole else _on(np.flatnonzero(np.concatenate(real)), device),
        longest_key=int(lengths.max()),
    )


def _padded(starts: Integers, counts: Integers) -> Integers:
    """[b, longest] start, start + 1, ... of each. Padding repeats the last: a query that sees nothing would be NaN."""
    return starts[:, None] + np.minimum(np.arange(counts.max()), counts[:, None] - 1)


def _on(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """`transformers`' attention signature: query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, ...]."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    window = None if sliding_window is None or sliding_window >= packed.longest_key else sliding_window
    if isinstance(packed, Varlen):
        return _varlen(query, key, value, packed, scaling, window)[None], None
    return _blocks(query, key, value, packed, scaling, window)[None], None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, row: Varlen, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The weights are float32; autocast says in what the products are computed.
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    output = varlen_attn(
        query.contiguous(),
        _gather(key, row.keys).contiguous(),
        _gather(value, row.keys).contiguous(),
        row.query_starts,
        row.key_starts,
        row.longest_query,
        row.longest_key,
        scale=scaling,
        # A window of W in a model's config counts the query itself; in flash attention it does not.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, row: Blocks, scaling: float | None, window: int | None
) -> Tensor:
    query, key, value = _gather(query, row.queries), _gather(key, row.keys), _gather(value, row.keys)
    queries = torch.split(query, [block.spans * block.queries for block in row.blocks])
    keys, values = (torch.split(part, [block.spans * block.keys for block in row.blocks]) for part in (key, value))
    outputs = []
    for block, q, k, v in zip(row.blocks, queries, keys, values, strict=True):
        mask = _mask(block, window, query)
        # [b, heads, q or k, D]
        q, k, v = (part.view(block.spans, -1, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        output = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [b * q, heads, D]
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return _gather(attended, row.restore)


def _gather(rows: Tensor, places: Tensor | None) -> Tensor:
    """`rows` [T, heads, D] at `places` [P]. The backward of `embedding` sums in a fixed order, that of indexing does
    not on CUDA."""
    if places is None:
        return rows
    return embedding(places, rows.flatten(1)).view(-1, *rows.shape[1:])


def _mask(block: Block, window: int | None, like: Tensor) -> Tensor | None:
    """What is added to the scores of a block, [b or 1, 1, q, k]; None where plain causal attention is right."""
    if block.positions is None and window is None:
        return None
    if (window, like.dtype) not in block.masks:
        key = torch.arange(block.keys, device=like.device)  # [k]
        position = key[None] if block.positions is None else block.positions  # [b or 1, q]
        distance = position[:, None, :, None] - key
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        block.masks[window, like.dtype] = mask.masked_fill_(hidden, -torch.inf)
    return block.masks[window, like.dtype]


def _no_mask(*_: Any, **__: Any) -> None:
    """`transformers` must build no mask: the layout says it all."""


# Compiled layers call it as it is: its shapes differ from block to block, and sdpa is compiled already.
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))  # type: ignore[no-untyped-call]
AttentionMaskInterface.register(NAME, _no_mask)

__all__ = ["NAME", "Block", "Blocks", "Packed", "Varlen", "prepare_blocks", "prepare_varlen"]
