"""Strings that end a turn. The sampler stops at tokens alone, so a turn is cut afterwards."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from asyncrl.types import Completion


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """The stop string that comes first in the text."""
    found = [stop for stop in stops if stop in text]
    return min(found, key=text.find, default=None)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first stop string, all of it where there is none."""
    stop = first_stop(text, stops)
    return text if stop is None else text[: text.find(stop)]


def cut_at_stop(completion: Completion, stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> Completion:
    """The completion up to the token that completes the first stop string.

    These are the tokens that a sampler would have drawn that stops there: what it draws later has no influence on
    them. A turn that is cut has not been ended by the policy, so it has the finish reason `length`.
    """
    if not stops:
        return completion
    spoken = completion.tokens[:-1] if completion.finish_reason == "stop" else completion.tokens
    stop = first_stop(decode(spoken), stops)
    if stop is None:
        return completion
    count = bisect_left(range(len(spoken)), True, key=lambda kept: stop in decode(spoken[:kept]))
    return replace(
        completion,
        tokens=completion.tokens[:count],
        logprobs=completion.logprobs[:count],
        versions=completion.versions[:count],
        finish_reason="length",
    )
