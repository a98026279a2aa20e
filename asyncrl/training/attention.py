"""Causal attention over packed sequences, as an attention function of `transformers`.

A pack is one row of T tokens; every linear layer runs on it as it is. Attention alone must keep the
sequences apart. A block-diagonal mask would cost T^2, so here
- on CUDA in half precision, torch's variable-length flash attention reads the row as it lies;
- elsewhere the sequences are gathered into padded blocks of similar lengths, attention runs on each block
  with `is_causal`, and the result is put back. Padding is on the right, where causal attention never looks.

The layout travels as the keyword `packed` through the model's forward, so that gradient checkpointing,
which runs a layer again in backward, finds it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from asyncrl.training.batch import Layout

NAME = "asyncrl_packed"

# Lengths of one block may differ by this factor: more blocks cost more calls, fewer cost more padding.
BLOCK_SPREAD = 1.5
# Below this length attention is so cheap that a further block costs more than the padding.
SHORT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Block:
    """Sequences that attend in one call."""

    sequences: int
    length: int
    """Of the longest one; the others are padded to it."""
    window_masks: dict[int, Tensor]
    """Filled on demand: sliding window -> which keys a query sees, [length, length]."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A layout prepared for attention: made once per microbatch, read by every layer."""

    blocks: tuple[Block, ...]
    gather: Tensor | None
    """[P] the row's token in each place of the padded blocks; None where the blocks are the row itself."""
    restore: Tensor | None
    """[T] the place of each of the row's tokens in the padded blocks."""
    boundaries: Tensor
    """[B + 1] int32: where each sequence begins, and the end."""
    longest: int


def pack(layout: Layout) -> Packed:
    """Prepare `layout`. Its sequences come longest first, so those of a block are neighbours."""
    device = layout.position_ids.device
    lengths = np.array(layout.lengths, dtype=np.int64)  # [B]
    starts = np.cumsum(lengths) - lengths  # [B]
    counts = _block_sizes(layout.lengths)
    blocks: list[Block] = []
    places: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    first = 0
    for count in counts:
        length = int(lengths[first])
        inside = np.minimum(np.arange(length), lengths[first : first + count, None] - 1)  # [count, length]
        places.append((starts[first : first + count, None] + inside).ravel())
        blocks.append(Block(count, length, {}))
        first += count
    gather, restore = np.concatenate(places), None  # [P]
    padded = len(gather) > len(layout.position_ids)
    if padded:
        bases = np.repeat([base for base, _ in _block_places(blocks)], counts) if counts else np.empty(0)
        rank = np.concatenate([np.arange(count) * block.length for count, block in zip(counts, blocks, strict=True)])
        within = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
        restore = np.repeat(bases + rank, lengths) + within  # [T]
    return Packed(
        blocks=tuple(blocks),
        gather=torch.from_numpy(gather).to(device) if padded else None,
        restore=None if restore is None else torch.from_numpy(restore).to(device),
        boundaries=torch.from_numpy(np.append(starts, lengths.sum()).astype(np.int32)).to(device),
        longest=max(layout.lengths, default=0),
    )


def padded_tokens(lengths: tuple[int, ...]) -> int:
    """The places of the padded blocks of these sequences, longest first: at least their tokens."""
    firsts = accumulate(_block_sizes(lengths), initial=0)
    return sum(size * lengths[first] for size, first in zip(_block_sizes(lengths), firsts, strict=False))


def _block_sizes(lengths: tuple[int, ...]) -> list[int]:
    """How many sequences each block takes, from the longest on."""
    sizes: list[int] = []
    longest = 0
    for length in lengths:
        if sizes and (length * BLOCK_SPREAD >= longest or longest <= SHORT_TOKENS):
            sizes[-1] += 1
        else:
            sizes.append(1)
            longest = length
    return sizes


def _block_places(blocks: list[Block]) -> list[tuple[int, Block]]:
    ends = accumulate((block.sequences * block.length for block in blocks), initial=0)
    return list(zip(ends, blocks, strict=False))


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
    if sliding_window is not None and sliding_window >= packed.longest:
        sliding_window = None
    if query.is_cuda and _half_precision(query) is not None:
        return _flash(query, key, value, packed, scaling, sliding_window)[None], None
    return _blocks(query, key, value, packed, scaling, sliding_window)[None], None


def _half_precision(query: Tensor) -> torch.dtype | None:
    """The dtype in which flash attention would run, None where it cannot."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    dtype = _half_precision(query)
    query, key, value = (tensor.to(dtype).contiguous() for tensor in (query, key, value))
    output = varlen_attn(
        query,
        key,
        value,
        packed.boundaries,
        packed.boundaries,
        packed.longest,
        packed.longest,
        scale=scaling,
        # A window of W in a model's config counts the query itself; in flash attention it does not.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None, window: int | None
) -> Tensor:
    """The same in blocks of padded sequences, on any device and in any precision."""
    if packed.gather is not None:
        query, key, value = (tensor.index_select(0, packed.gather) for tensor in (query, key, value))  # [P, heads, D]
    outputs = []
    for start, block in _block_places(list(packed.blocks)):
        size, part = (block.sequences, block.length), slice(start, start + block.sequences * block.length)
        # [b, heads, t, D]
        q, k, v = (tensor[part].view(*size, *tensor.shape[1:]).transpose(1, 2) for tensor in (query, key, value))
        output = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if window is None else _window_mask(block, window, query.device),
            is_causal=window is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))  # [b * t, heads, D]
    attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [P, heads, D]
    return attended if packed.restore is None else attended.index_select(0, packed.restore)


def _window_mask(block: Block, window: int, device: torch.device) -> Tensor:
    if window not in block.window_masks:
        distance = torch.arange(block.length, device=device)
        distance = distance[:, None] - distance[None, :]
        block.window_masks[window] = (distance >= 0) & (distance < window)
    return block.window_masks[window]


def _no_mask(*_: Any, **__: Any) -> None:
    """`transformers` must build no mask: the layout says it all."""


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)
