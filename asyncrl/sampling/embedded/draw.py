"""From logits to tokens: temperature, top-k, top-p, one uniform number per row.

Shapes: n rows, V vocabulary.

A token is drawn by inverting the cumulative distribution at a uniform number, and that number is a
function of (seed of the request, place of the token) alone. So a seeded request draws the same whoever
shares its batch, on any device, and no generator has to be kept per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UInt64s = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: UInt64s) -> UInt64s:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def stream_of_seed(seed: int) -> np.uint64:
    """The state from which a request's uniforms are counted. Neighbouring seeds land far apart."""
    return np.uint64(_mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)[0])


def uniforms(streams: UInt64s, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """[n] float64 in [0, 1): number `places[i]` of stream i.

    SplitMix64 (Steele, Lea, Flood 2014), whose state after k draws is known without drawing them.
    """
    state = streams + (places.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


@dataclass(frozen=True, slots=True)
class DrawParams:
    """How each row is drawn, on the device of the logits. None: no row asks for it."""

    temperature: Tensor
    """[n, 1] float32, 1 where the row is greedy."""
    greedy: Tensor | None
    """[n] bool."""
    top_k: Tensor | None
    """[n, 1] int64, V where it is off."""
    top_p: Tensor | None
    """[n, 1] float32, 1 where it is off."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One token per row."""

    tokens: Tensor
    """[n] int64."""
    logprobs: Tensor
    """[n] float32, of the distribution that was drawn from; for a greedy row at temperature 1."""


def draw(logits: Tensor, params: DrawParams, uniform: NDArray[np.float64]) -> Drawn:
    """Draw one token per row. `logits` [n, V] of any float type, `uniform` [n] in [0, 1)."""
    scores = logits.float() / params.temperature  # [n, V]
    if params.top_k is not None or params.top_p is not None:
        scores = _truncate(scores, params.top_k, params.top_p)
    logprobs = scores.log_softmax(-1)  # [n, V]
    # float32 cannot resolve the tail of a large vocabulary's sum; MPS has nothing better.
    precise = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = logprobs.exp().to(precise).cumsum_(-1)  # [n, V]
    height = torch.from_numpy(uniform[:, None]).to(logits.device, precise)  # [n, 1]
    # A hair under the total, so that rounding never lands behind the last possible token.
    height = height * (cumulative[:, -1:] * (1 - torch.finfo(precise).eps))
    tokens = torch.searchsorted(cumulative, height, right=True)  # [n, 1]
    if params.greedy is not None:
        tokens = torch.where(params.greedy[:, None], scores.argmax(-1, keepdim=True), tokens)
    return Drawn(tokens[:, 0], logprobs.gather(-1, tokens)[:, 0])


def _truncate(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Rule out all but the `top_k` best tokens, then all but the fewest of these that hold `top_p` of the mass."""
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)  # [n, V]
    if top_k is not None:
        rank = torch.arange(scores.shape[-1], device=scores.device)  # [V]
        ranked = ranked.masked_fill(rank >= top_k, -torch.inf)
    if top_p is not None:
        mass = ranked.softmax(-1)  # [n, V]
        ranked = ranked.masked_fill((mass.cumsum(-1) - mass >= top_p) & (top_p < 1), -torch.inf)
    return torch.empty_like(scores).scatter_(-1, order, ranked)
