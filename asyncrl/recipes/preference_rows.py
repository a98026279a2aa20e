"""Dataset rows that say which of two answers is better, in the three shapes that are common.

{"prompt": ..., "chosen": ..., "rejected": ...}                  messages or texts; without `prompt`, what both
                                                                 begin with is the prompt
{"prompt": ..., "samples": [{"text": ..., "score": ...}, ...]}   `messages` instead of `text` for conversations
{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from asyncrl.errors import DataError
from asyncrl.recipes.chat_rows import (
    Messages,
    Row,
    as_messages,
    bare,
    message_weights,
    names,
    read_messages,
    read_prompt,
    read_tools,
)
from asyncrl.recipes.examples import Encoder, Example

Pairing = Literal["best_worst", "all"]
Answer = str | Messages

SHAPES = "`chosen` and `rejected`; `prompt` and `samples`; or `input`, `preferred_output` and `non_preferred_output`"


@dataclass(frozen=True, slots=True)
class Preference:
    """One answer is preferred to another one."""

    prompt: Answer | None
    """None: both answers begin with it."""
    chosen: Answer
    rejected: Answer
    tools: Sequence[Mapping[str, Any]] = ()


def preference_encoder(pairing: Pairing) -> Callable[[Encoder], Callable[[Row], list[tuple[Example, ...]]]]:
    """From a row to its pairs of examples; an empty one for each tie."""

    def encoder_of(encoder: Encoder) -> Callable[[Row], list[tuple[Example, ...]]]:
        return lambda row: [
            () if preference is None else preference_examples(preference, encoder)
            for preference in read_preferences(row, pairing)
        ]

    return encoder_of


def read_preferences(row: Row, pairing: Pairing) -> list[Preference | None]:
    """The pairs of a row; None for each tie.

    Raises:
        DataError: the row has no shape that is known here, or something in it cannot be used.
    """
    if "samples" in row:
        return _scored(row, pairing)
    if "preferred_output" in row and "non_preferred_output" in row:
        given = row.get("input")
        if not isinstance(given, Mapping) or "messages" not in given:
            raise DataError('input is missing or has no messages. Expected {"input": {"messages": [...]}, ...}.')
        chosen, rejected = (read_messages(row[name], name) for name in ("preferred_output", "non_preferred_output"))
        return [Preference(read_messages(given["messages"], "input.messages"), chosen, rejected, read_tools(given))]
    if "chosen" in row and "rejected" in row:
        prompt = None if row.get("prompt") is None else read_prompt(row["prompt"], "prompt")
        better, worse = (read_prompt(row[name], name) for name in ("chosen", "rejected"))
        return [Preference(prompt, better, worse, read_tools(row))]
    raise DataError(f"found the fields {names(row)}. Expected {SHAPES}.")


def preference_examples(preference: Preference, encoder: Encoder) -> tuple[Example, ...]:
    """The chosen and the rejected example; none where both say the same."""
    texts = [side for side in (preference.chosen, preference.rejected) if isinstance(side, str)]
    if len(texts) == 2 and not isinstance(preference.prompt, list):
        chosen, rejected = _texts(preference.prompt, texts[0], texts[1], encoder)
    else:
        chosen, rejected = _conversations(preference, encoder)
    return () if chosen.tokens == rejected.tokens else (chosen, rejected.rejected())


def _scored(row: Row, pairing: Pairing) -> list[Preference | None]:
    if "prompt" not in row:
        raise DataError(f"found the fields {names(row)}. Expected `prompt` beside `samples`.")
    samples = row["samples"]
    if not isinstance(samples, Sequence) or isinstance(samples, str) or len(samples) < 2:
        raise DataError("samples must be a list of at least two answers, each with its score.")
    prompt = read_prompt(row["prompt"], "prompt")
    answers = [_sample(sample, f"samples[{place}]") for place, sample in enumerate(samples)]
    ranked = sorted(answers, key=lambda answer: answer[0], reverse=True)
    chosen_and_rejected = [(ranked[0], ranked[-1])] if pairing == "best_worst" else combinations(ranked, 2)
    return [
        Preference(prompt, better, worse, read_tools(row)) if high > low else None
        for (high, better), (low, worse) in chosen_and_rejected
    ]


def _sample(sample: Any, field: str) -> tuple[float, Answer]:
    if not isinstance(sample, Mapping) or not ("text" in sample or "messages" in sample):
        raise DataError(f'{field} is {sample!r:.60}. Expected {{"text" or "messages": ..., "score": ...}}.')
    score = sample.get("score")
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise DataError(f"{field}.score is {score!r}. Expected a finite number.")
    said = "text" if "text" in sample else "messages"
    return float(score), read_prompt(sample[said], f"{field}.{said}")


def _texts(prompt: str | None, chosen: str, rejected: str, encoder: Encoder) -> tuple[Example, Example]:
    if prompt is not None:
        return encoder.text(prompt, chosen), encoder.text(prompt, rejected)
    sides = encoder.text("", chosen), encoder.text("", rejected)
    shortest = min(len(side.tokens) for side in sides)
    same = (first == second for first, second in zip(*(side.tokens for side in sides), strict=False))
    shared = next((place for place, equal in enumerate(same) if not equal), shortest)
    # One token of each answer must be left to compare where one of them is the beginning of the other.
    masked = min(shared, shortest - 1)
    return sides[0].masked(masked), sides[1].masked(masked)


def _conversations(preference: Preference, encoder: Encoder) -> tuple[Example, Example]:
    chosen, rejected = (as_messages(side, "assistant") for side in (preference.chosen, preference.rejected))
    if preference.prompt is not None:
        prompt = as_messages(preference.prompt, "user")
    else:
        same = (first == second for first, second in zip(chosen, rejected, strict=False))
        shared = next((place for place, equal in enumerate(same) if not equal), min(len(chosen), len(rejected)) - 1)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return (
        _answer(prompt, chosen, preference.tools, "chosen", encoder),
        _answer(prompt, rejected, preference.tools, "rejected", encoder),
    )


def _answer(
    prompt: Messages, said: Messages, tools: Sequence[Mapping[str, Any]], name: str, encoder: Encoder
) -> Example:
    try:
        weights = [0.0] * len(prompt) + [float(weight > 0) for weight in message_weights(said, "all")]
    except DataError as error:
        raise DataError(f"the {name} answer: {error}") from None
    examples = encoder.conversation(bare(prompt + said), weights, tools)
    if len(examples) != 1:
        raise DataError(
            f"the {name} answer is {len(examples)} token sequences, because the chat template renders earlier turns of "
            "the assistant differently once others follow, or nothing of it is trained. Expected one trained turn."
        )
    return examples[0]
