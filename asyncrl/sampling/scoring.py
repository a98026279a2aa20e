"""Log-probs of given tokens from one vLLM server, in the two ways that it has, and whether servers agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.endpoint import Endpoint, all_of
from asyncrl.sampling.params import (
    GENERATE_PATH,
    next_token_bodies,
    read_next_token,
    read_scores,
    read_spans,
    scoring_body,
)

REPLICA_TOLERANCE = 0.25
"""Servers that hold the same weights differ by rounding alone; bfloat16 kernels round by up to this much."""


async def score_by_prompt(end: Endpoint, token_ids: Sequence[int], start: int, *, salt: str, label: int) -> list[float]:
    """[N - start] log-probs of `token_ids[start:]` under full weights, in one request; `label` is their version."""
    answer = await end.post(GENERATE_PATH, scoring_body(token_ids, model=None, cache_salt=salt), timeout_s=None)
    _check_label(answer, label)
    return read_scores(answer, token_ids, start)


async def score_by_token(
    end: Endpoint, token_ids: Sequence[int], start: int, *, salt: str, model: str | None, label: int | None
) -> list[float]:
    """The same in one request for each token. `label`: None for an adapter, which is asked for by its name."""
    bodies = next_token_bodies(token_ids, start=start, model=model, cache_salt=salt)
    answers = await all_of([partial(end.post, GENERATE_PATH, body, timeout_s=None) for body in bodies])
    if label is not None:
        for answer in answers:
            _check_label(answer, label)
    return [read_next_token(answer, token) for answer, token in zip(answers, token_ids[start:], strict=True)]


def _check_label(answer: Mapping[str, Any], label: int) -> None:
    """Full weights may have been replaced meanwhile."""
    check_pinned(label, read_spans(answer["choices"][0]["weight_versions"], 1))


def check_pinned(wanted: int | None, versions: Sequence[int]) -> None:
    if wanted is not None and any(version != wanted for version in versions):
        raise SamplerRequestError(
            f"version {wanted} was asked for, but a hot-load came in between: drawn by {sorted(set(versions))}."
        )


def check_agreement(scores: Mapping[str, Sequence[float]], version: int, tolerance: float | None) -> None:
    """`scores`: log-probs of the same tokens under `version`, by who computed them.

    Raises `SamplerError` that names two who are further apart than `tolerance`; None: than rounding.
    """
    tolerance = tolerance or REPLICA_TOLERANCE
    (first, expected), *others = scores.items()
    for name, found in others:
        worst = max((abs(a - b) for a, b in zip(expected, found, strict=True)), default=0.0)
        if not worst <= tolerance:
            raise SamplerError(
                f"{name} and {first} disagree on version {version} by {worst:.3g} in a log-prob; at most "
                f"{tolerance:g} was expected. They do not hold the same weights."
            )
