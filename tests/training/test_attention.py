"""The kernels: every span attends to its path as it would alone, in values and gradients, and nothing else."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asyncrl.training.attention import Blocks, Packed, packed_attention, prepare_blocks, prepare_varlen
from asyncrl.training.layout import Layout, lay_out, padded_tokens

CPU = torch.device("cpu")
HEADS, KV_HEADS, WIDTH = 4, 2, 8
WINDOWS = (None, 1, 5, 40)


def make_layout(used: list[int], shared: list[int]) -> Layout:
    return lay_out(np.array(used, dtype=np.int64), np.array(shared, dtype=np.int64))[0]


def make_inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((1, HEADS, tokens, WIDTH), (1, KV_HEADS, tokens, WIDTH), (1, KV_HEADS, tokens, WIDTH))
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def attend(inputs: tuple[Tensor, Tensor, Tensor], row: Packed, window: int | None) -> Tensor:
    output, _ = packed_attention(torch.nn.Identity(), *inputs, None, packed=row, scaling=0.3, sliding_window=window)
    return output[0]  # [T, heads, D]


def one_query_at_a_time(inputs: tuple[Tensor, Tensor, Tensor], layout: Layout, window: int | None) -> Tensor:
    """[T, heads, D]: what each query sees is its path up to itself, the last `window` of it."""
    query, key, value = (tensor[0] for tensor in inputs)  # [heads, T, D]
    key, value = (tensor.repeat_interleave(HEADS // KV_HEADS, dim=0) for tensor in (key, value))
    outputs, row, start = [], 0, 0
    for span, depth in zip(layout.spans.tolist(), layout.depths.tolist(), strict=True):
        path = layout.paths[start : start + depth + span]
        for place in range(depth, depth + span):
            seen = path[max(0, place + 1 - (window or place + 1)) : place + 1]
            scores = torch.einsum("hd,htd->ht", query[:, row], key[:, seen]) * 0.3
            outputs.append(torch.einsum("ht,htd->hd", scores.softmax(dim=1), value[:, seen]))
            row += 1
        start += depth + span
    return torch.stack(outputs)


def assert_same(layout: Layout, row: Packed, window: int | None) -> None:
    inputs = make_inputs(layout.tokens)
    found, expected = attend(inputs, row, window), one_query_at_a_time(inputs, layout, window)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    weights = torch.cos(torch.arange(found.numel(), dtype=found.dtype)).view_as(found)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(
        gradients, torch.autograd.grad((expected * weights).sum(), inputs), rtol=1e-9, atol=1e-11
    )


# Of their own in three blocks, then sharing: with one before, with one that shares, all of it, and a deep short one.
USED = [70, 30, 28, 9, 40, 44, 44, 90, 20, 61]
SHARED = [0, 0, 0, 0, 9, 25, 44, 44, 20, 1]
RAGGED = make_layout(USED, SHARED)
EQUAL = make_layout([12, 12, 12], [0, 0, 0])
GROUPS = make_layout([20, 20, 20, 20, 20, 20], [0, 15, 15, 0, 15, 15])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", [RAGGED, EQUAL, GROUPS], ids=["ragged", "equal", "groups"])
def test_blocks_see_their_paths(layout: Layout, window: int | None) -> None:
    assert_same(layout, prepare_blocks(layout, CPU), window)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    used = draw(st.lists(st.integers(1, 50), min_size=1, max_size=8))
    shared = [0, *(draw(st.integers(0, min(pair))) for pair in pairwise(used))]
    return make_layout(used, shared)


@given(layout=layouts(), window=st.sampled_from(WINDOWS))
@settings(max_examples=40, deadline=None)
def test_blocks_see_their_paths_in_any_tree(layout: Layout, window: int | None) -> None:
    assert_same(layout, prepare_blocks(layout, CPU), window)


def test_what_needs_no_padding_is_not_copied() -> None:
    equal, groups, ragged = (prepare_blocks(layout, CPU) for layout in (EQUAL, GROUPS, RAGGED))
    assert (equal.queries, equal.keys, equal.restore) == (None, None, None)
    assert (groups.queries, groups.restore) == (None, None)
    assert [(block.spans, block.queries, block.keys) for block in groups.blocks] == [(2, 20, 20), (4, 5, 20)]
    assert ragged.queries is not None
    for layout, row in ((EQUAL, equal), (GROUPS, groups), (RAGGED, ragged)):
        assert row.padded_tokens == padded_tokens(layout)


def test_masks_are_made_once_and_as_small_as_they_can_be() -> None:
    row = prepare_blocks(GROUPS, CPU)
    for _ in range(2):
        attend(make_inputs(GROUPS.tokens), row, None)
    own, sharing = row.blocks
    assert own.masks == {}
    (mask,) = sharing.masks.values()
    assert mask.shape == (1, 1, 5, 20)


def slow_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch's `varlen_attn` computes: its causal mask ends at the last query and the last key."""
    assert enable_gqa
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert window_size[1] == 0
    outputs = []
    lengths = zip(query_starts.diff().tolist(), key_starts.diff().tolist(), strict=True)
    for q, k, (queries, keys) in zip(query_starts.tolist(), key_starts.tolist(), lengths, strict=False):
        assert queries <= longest_query
        assert keys <= longest_key
        distance = torch.arange(queries)[:, None] + (keys - queries) - torch.arange(keys)
        seen = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        parts = (
            tensor[None].transpose(1, 2) for tensor in (query[q : q + queries], key[k : k + keys], value[k : k + keys])
        )
        output = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", [RAGGED, EQUAL, GROUPS], ids=["ragged", "equal", "groups"])
def test_flash_attention_is_given_the_paths(
    layout: Layout, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel needs a GPU; what it is asked for does not."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", slow_varlen)
    row = prepare_varlen(layout, CPU)
    assert (row.keys is None) == (not layout.depths.any())
    assert_same(layout, row, window)


def test_flash_attention_computes_in_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.extend(tensor.dtype for tensor in (query, key, value))
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", spy)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda _: torch.bfloat16)
    attend(make_inputs(GROUPS.tokens), prepare_varlen(GROUPS, CPU), None)
    assert seen == [torch.bfloat16] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention needs a GPU")
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("layout", [RAGGED, EQUAL, GROUPS], ids=["ragged", "equal", "groups"])
def test_flash_attention_agrees_with_blocks(layout: Layout, window: int | None) -> None:
    device = torch.device("cuda")
    inputs = make_inputs(layout.tokens)
    half = tuple(tensor.detach().to(device, torch.bfloat16) for tensor in inputs)
    found = attend(half, prepare_varlen(layout, device), window)  # type: ignore[arg-type]
    row = prepare_blocks(layout, CPU)
    assert isinstance(row, Blocks)
    torch.testing.assert_close(found.cpu().double(), attend(inputs, row, window).detach(), rtol=0.05, atol=0.05)
