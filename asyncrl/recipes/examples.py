"""From texts and conversations to tokens, each with the weight of its loss. Token-exact, by any tokenizer.

    messages with a weight each -> text, and the spans of the trained turns in it -> Example

A turn of the model begins where the template's generation prompt ends, because there the model begins to speak when
it is used; and it ends behind the token that closes it, because that is how the model says that it is done.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from typing import Any

import jinja2

from asyncrl.errors import DataError, ModelError

Message = Mapping[str, Any]
Span = tuple[int, int, float]
"""Begin and end in a text, and the weight of its tokens."""

MARKER = "asyncrl0marker"
"""Stands where the model spoke. Letters and digits only, which no template escapes."""

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a template writes around what the model said, if its author marked it."""


@dataclass(frozen=True, slots=True)
class Example:
    """One token sequence. Eight bytes a token: a whole dataset stays in memory."""

    tokens: array[int]
    weights: array[float]
    """One per token. 0 carries no loss; below 0 is the rejected answer of a pair."""

    @property
    def trained(self) -> bool:
        return any(self.weights)

    def cut(self, length: int) -> Example:
        """The first `length` tokens."""
        return Example(self.tokens[:length], self.weights[:length])

    def masked(self, length: int) -> Example:
        """Without loss on the first `length` tokens."""
        return Example(self.tokens, array("f", [0.0] * length) + self.weights[length:])

    def rejected(self) -> Example:
        """As the rejected answer of a pair."""
        return Example(self.tokens, array("f", (-weight for weight in self.weights)))


class Encoder:
    """The tokenizer of one model, as supervised training needs it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix, self._end_token = _frame(tokenizer)
        self._added = tuple(tokenizer.get_added_vocab())
        pieces = self._ids(["a", "b"])
        self._joins = tokenizer.decode(pieces[0] + pieces[1]) == "ab"  # else there would be a space between pieces
        self._endings: tuple[str, str] | None = None  # asked of the template when the first conversation comes

    def text(self, prompt: str, completion: str) -> Example:
        """A text after another one: the second is trained, with the end-of-text token that closes it."""
        ids, weights = self._tokenise(prompt + completion, [(len(prompt), len(prompt) + len(completion), 1.0)])
        ids, weights = [*self._prefix, *ids], [*(0.0 for _ in self._prefix), *weights]
        if self._end_token is not None and ids[-1:] != [self._end_token]:
            ids.append(self._end_token)
            weights.append(1.0)
        return _example(ids, weights)

    def conversation(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Example]:
        """A conversation whose messages with a weight above 0 are trained; they must be the assistant's.

        One example, unless the template renders earlier turns differently once others follow (it drops thoughts,
        for one): then each turn is trained after the history that the model will see before it, in several examples.

        Raises:
            DataError: the template cannot render these messages.
            ModelError: the template cannot be used for training; the message says why.
        """
        if not any(weights):
            return []
        if MARKS.search(self._template(tools)) and self._tokenizer.is_fast:
            return [self._marked(messages, weights, tools)]
        trained = [place for place, weight in enumerate(weights) if weight]
        if trained[0] == 0:
            raise DataError(
                "the first message is the assistant's, and nothing comes before it. Give it a message to answer, or "
                '"weight": 0.'
            )
        heads = self._render([messages[:place] for place in trained], tools, generation_prompt=True)
        turns = self._render([messages[: place + 1] for place in trained], tools)
        examples: list[Example] = []
        text, spans = "", list[Span]()
        for place, head, turn in zip(trained, heads, turns, strict=True):
            if not turn.startswith(head):
                raise self._refusal(f"it lets the model begin with {head[-40:]!r}, but renders its turn otherwise")
            if not turn.startswith(text):
                examples.append(_example(*self._tokenise(text, spans)))
                spans = []
            text = turn[: self._turn_end(turn, len(head))]
            spans.append((len(head), len(text), weights[place]))
        return [*examples, _example(*self._tokenise(text, spans))]

    def _turn_end(self, text: str, begin: int) -> int:
        """Where the turn that begins at `begin` and ends the text is over: behind the token that closes it."""
        if self._endings is None:
            self._endings = self._find_endings()
        closing, after = self._endings
        if text.endswith(closing + after):
            return len(text) - len(after)
        bare = text.rstrip()  # some templates close calls of tools with another token
        return len(bare) if len(bare) > begin and bare.endswith(self._added) else len(text)

    def _find_endings(self) -> tuple[str, str]:
        """What closes a turn of the model, and what the template writes after that before the next one."""
        (text,) = self._render([[{"role": "user", "content": "?"}, {"role": "assistant", "content": MARKER}]], ())
        _, found, tail = text.rpartition(MARKER)
        if not found:
            raise self._refusal("it drops what the assistant said")
        ends = [tail.find(token) + len(token) for token in self._added if token in tail]
        end = min(ends, default=len(tail))
        return tail[:end], tail[end:]

    def _marked(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Sequence[Mapping[str, Any]]
    ) -> Example:
        """As the author of the template marked the turns of the assistant."""
        encoded = self._apply([messages], tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        of_turns = [weight for message, weight in zip(messages, weights, strict=True) if message["role"] == "assistant"]
        runs = [(marked, sum(1 for _ in run)) for marked, run in groupby(encoded["assistant_masks"][0])]
        if sum(marked for marked, _ in runs) != len(of_turns) and len(set(of_turns)) > 1:
            raise DataError(
                f"{len(of_turns)} turns of the assistant have different weights, but the chat template marks "
                f"{sum(marked for marked, _ in runs)} of them with {{% generation %}}. Use one weight for all."
            )
        left = iter(of_turns)
        by_run = [[next(left, of_turns[-1]) if marked else 0.0] * length for marked, length in runs]
        return _example(encoded["input_ids"][0], list(chain.from_iterable(by_run)))

    def _tokenise(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[float]]:
        """Token ids, and the weight of each."""
        edges = [0, *chain.from_iterable((begin, end) for begin, end, _ in spans), len(text)]
        pieces = [text[begin:end] for begin, end in pairwise(edges)]
        if self._joins:
            # A token that would cross an edge is cut there: when the model is used, its prompt ends there too.
            parts = self._ids(pieces)
        else:
            (whole,) = self._ids([text])
            parts = [whole[begin:end] for begin, end in pairwise(self._places(text, edges, whole))]
        turns = [weight for _, _, weight in spans]
        by_piece = chain.from_iterable(zip([0.0] * len(turns), turns, strict=True))
        weights = [[weight] * len(part) for weight, part in zip([*by_piece, 0.0], parts, strict=True)]
        return list(chain.from_iterable(parts)), list(chain.from_iterable(weights))

    def _places(self, text: str, edges: Sequence[int], whole: list[int]) -> list[int]:
        """Where the edges of a text lie in its tokens, for tokenizers that put a space before each piece."""
        places = [0]
        for before in self._ids([text[:edge] for edge in edges[1:-1]]):
            if whole[: len(before)] != before:
                raise self._refusal("its tokenizer lets a token cross the edge of a turn")
            places.append(len(before))
        return [*places, len(whole)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _render(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool = False,
    ) -> list[str]:
        """The text of each conversation; with `generation_prompt`, up to where the model begins to speak."""
        texts: list[str] = self._apply(conversations, tools, tokenize=False, add_generation_prompt=generation_prompt)
        return texts

    def _apply(self, conversations: Sequence[Sequence[Message]], tools: Sequence[Mapping[str, Any]], **how: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [list(messages) for messages in conversations], tools=list(tools) or None, **how
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(str(message["role"]) for message in conversations[-1])
            raise DataError(f"the chat template cannot render messages with the roles {roles}: {error}") from error

    def _template(self, tools: Sequence[Mapping[str, Any]]) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=list(tools) or None))
        except ValueError:
            raise self._refusal("there is none") from None

    def _refusal(self, reason: str) -> ModelError:
        name = self._tokenizer.name_or_path or type(self._tokenizer).__name__
        return ModelError(
            f"the chat template of {name!r} cannot be used for training: {reason}. Use an instruction-tuned model, set "
            "another tokenizer.chat_template, or give rows of plain text with `prompt` and `completion`."
        )


def _frame(tokenizer: Any) -> tuple[list[int], int | None]:
    """What the tokenizer puts before a text, and the token that ends one."""
    alone, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = (place for place in range(len(framed)) if framed[place : place + len(alone)] == alone)
    return framed[: next(starts, 0)], tokenizer.eos_token_id


def _example(ids: Sequence[int], weights: Sequence[float]) -> Example:
    """The first token of a sequence has nothing that predicts it: it is never trained."""
    return Example(array("i", ids), array("f", [0.0, *weights[1:]] if weights else []))
