"""From messages to tokens by the tokenizer's chat template, one turn at a time.

What the model said is never rendered again: a re-rendered turn often has other tokens than those that were drawn. So
the template is asked for the opening, and later only for what it puts between two turns of the model:

    opening                     | drawn             | continuation                        | drawn
    <system><user><assistant>     ...<end of turn>    \\n<tool result>...<assistant>         ...<end of turn>

A continuation is cut out of a short conversation with a marker in the model's place, so it costs what the new messages
cost, however long the history is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import jinja2

from asyncrl.agents.calls import CallStyle, MalformedCall, Turn, as_call, call_style_of, read_turn
from asyncrl.agents.messages import Message, normalise, one_call_each
from asyncrl.errors import ModelError

MARKER = "asyncrl0marker"
"""Stands where the model spoke. Letters and digits only, which no template escapes."""

ANSWER = "asyncrl0answer"
"""Stands for a tool result or a user message."""

MAX_KINDS = 256
"""Kinds of continuations to remember. Chats have three or four; a client that makes up histories has any number."""


@dataclass(frozen=True, slots=True)
class _Join:
    """How one kind of continuation is cut out of a short conversation, found by its check."""

    calls: int
    """In the turn before. One, though there are more results, where the template refuses several calls in a turn."""
    markers: int
    """How often the short conversation shows the marker."""
    needs_tools: bool
    """Whether the tools show in the continuation; elsewhere they need not be rendered again."""


class TurnTemplate:
    """The chat template of one tokenizer. Checked at birth, and once for each kind of continuation.

    Args:
        tokenizer: Of `transformers`, with a chat template.
        kwargs: More arguments for every render, such as `{"enable_thinking": False}`.

    Raises:
        ModelError: there is no template, or it has no turns; the message says why.
    """

    def __init__(self, tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._kwargs = dict(kwargs or {})
        self._joins: dict[object, _Join] = {}
        self._call_form = _CallForm()
        self._short_ids = False
        self.end_of_turn: int
        """The token that closes a turn of the model."""
        self.end_of_turn, self._end_text = self._find_end_of_turn()
        style = call_style_of(tokenizer.get_chat_template(tools=[]))
        self.call_style: CallStyle = style or "hermes"
        """How the model writes calls."""
        self._short_ids = style == "mistral"
        self._call_form = self._find_call_form()
        self._prompt = self.text([{"role": "user", "content": "?"}], ())
        self.thoughts_open = self._prompt.rstrip().endswith("<think>")
        """Whether the model begins to speak inside of its thoughts."""
        # The styles that are known here name every malformed call, so the tokenizer's own parser is for others only.
        self._has_parser = style is None and getattr(tokenizer, "response_template", None) is not None

    def text(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
        """A whole conversation, up to where the model begins to speak."""
        plain: list[Message] = [normalise(message) for message in messages]
        try:
            return self._render(plain, tools)
        except ModelError:
            apart = one_call_each(plain)
            if len(apart) == len(plain):
                raise
            return self._render(apart, tools)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, special ones included; nothing is added."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        except TypeError:  # half a surrogate pair, which no tokenizer takes: as in tool results, a question mark
            ids = self._tokenizer.encode(text.encode(errors="replace").decode(), add_special_tokens=False)
        return ids

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Everything up to where the model begins to speak, as tokens."""
        return self.encode(self.text(messages, tools))

    def continuation(
        self, answers: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, system: bool = False
    ) -> list[int]:
        """What comes between the model's end-of-turn token and its next turn, for these new messages.

        Args:
            answers: At least one, in any mixture of roles; tool results first, if the turn before made calls.
            tools: Those of the whole conversation.
            system: Whether the conversation has a system message: some templates move it as the conversation grows.

        Raises:
            ModelError: turns cannot be joined with this template; the conversation has to be rendered as a whole.
        """
        messages = [normalise(answer) for answer in answers]
        names = tuple(str(tool.get("function", tool).get("name")) for tool in tools)
        kind = (tuple(role for role, _ in groupby(_roles(messages))), len(_called(messages)), names, system)
        join = self._joins.get(kind)
        if join is None:
            join = self._check(messages, tools, system)
            if len(self._joins) >= MAX_KINDS:
                self._joins.clear()
            self._joins[kind] = join
        text = self._render([*_past(messages, join.calls, system), *messages], tools if join.needs_tools else ())
        return self.encode(text[self._cut(text, join.markers) :])

    def read(self, said: str, tools: Sequence[Mapping[str, Any]] = ()) -> Turn:
        """Take a turn of the model apart, given without its end-of-turn token."""
        if not self._has_parser:
            return read_turn(said, self.call_style, self.thoughts_open, tools)
        try:
            message = self._tokenizer.parse_response(said, prefix=self._prompt, tools=list(tools))
            calls = [as_call(call["function"], json.dumps(call)) for call in message.get("tool_calls", ())]
        except (ValueError, KeyError, TypeError) as error:  # it reads all of a turn or nothing
            return Turn(said, "", (MalformedCall(said, str(error)),))
        thoughts = message.get("reasoning_content") or message.get("thinking") or ""
        return Turn(message.get("content") or "", thoughts, tuple(calls))

    def _find_end_of_turn(self) -> tuple[int, str]:
        text = self._render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARKER}], (), generation_prompt=False
        )
        _, found, tail = text.rpartition(MARKER)
        if not found:
            raise self._refusal("it drops what the assistant said")
        ids = self.encode(tail or "?")
        end = self._tokenizer.decode(ids[:1])
        if not tail.startswith(end) or ids[0] not in self._tokenizer.get_added_vocab().values():
            raise self._refusal(f"it closes a turn with {tail!r}, which does not begin with a token of its own")
        return ids[0], end

    def _find_call_form(self) -> _CallForm:
        """The first form in which the template shows a call with its arguments."""
        probe = {"role": "tool", "tool_call_id": "call00000", "name": "f", "content": ANSWER}
        messages = [*_past([probe], 1, system=False), probe]
        messages[1]["content"] = ""
        for form in (_CallForm(), _CallForm(as_text=True), _CallForm(as_text=True, no_content=True)):
            self._call_form = form
            try:
                if MARKER in self._render(messages, ()):
                    return form
            except ModelError:
                continue
        return _CallForm()

    def _check(self, answers: Sequence[Message], tools: Sequence[Mapping[str, Any]], system: bool) -> _Join:
        """What joining turns rests on: nothing earlier is rewritten, nothing is lost, no token crosses the seam."""
        probes = [{**answer, "content": "" if answer.get("tool_calls") else ANSWER} for answer in answers]
        calls = len(_called(probes))
        past = _past(probes, calls, system)
        try:
            before = self._render([*past, *probes], tools, generation_prompt=False)
        except ModelError:
            if calls < 2:
                raise
            calls = 1
            past = _past(probes, calls, system)
            before = self._render([*past, *probes], tools, generation_prompt=False)
        said = past[-1]
        after = self._render([*past, *probes, said, *probes], tools)
        roles = " and ".join(dict.fromkeys(_roles(answers)))
        if not after.startswith(before):
            raise self._not_joined(f"it renders earlier messages differently once a {roles} message follows")
        markers = before.count(MARKER)
        cut = self._cut(after, 2 * markers)
        if after.count(ANSWER, cut) != sum(probe["content"] == ANSWER for probe in probes):
            raise self._not_joined(f"it drops {roles} messages, or does not close the turn before them")
        if self.encode(after) != self.encode(after[:cut]) + self.encode(after[cut:]):
            raise self._not_joined(f"the tokenizer merges {self._end_text!r} with what follows it")
        if after[cut:] != self._tail([*past, *probes], tools, markers):
            raise self._not_joined(f"it renders a {roles} message differently in a longer conversation")
        return _Join(calls, markers, needs_tools=after[cut:] != self._tail([*past, *probes], (), markers))

    def _tail(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], markers: int) -> str:
        text = self._render(messages, tools)
        return text[self._cut(text, markers) :]

    def _cut(self, text: str, markers: int) -> int:
        """Where the turn with the last of so many markers has ended, behind its end-of-turn token.

        They are counted from the start, because a message behind them may say anything, the marker too.
        """
        pieces = text.split(MARKER, markers)
        end = text.find(self._end_text, len(text) - len(pieces[-1]))
        if not markers or len(pieces) <= markers or end < 0:
            raise self._not_joined(f"it does not close a turn that others follow with {self._end_text!r}")
        return end + len(self._end_text)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> str:
        if self._short_ids:
            messages = [_with_short_ids(message) for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                [self._call_form.apply(message) for message in messages],
                tools=list(tools) or None,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self._kwargs,
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise self._refusal(
                f"it cannot render messages with the roles {', '.join(_roles(messages))}: {str(error).rstrip('.')}"
            ) from error
        return text

    def _refusal(self, reason: str) -> ModelError:
        return ModelError(
            f"the chat template of {self._name()} cannot be used for chats: {reason}. Use an instruction-tuned model, "
            "set another tokenizer.chat_template, or build the tokens yourself with policy.generate(token_ids)."
        )

    def _not_joined(self, reason: str) -> ModelError:
        return ModelError(
            f"the chat template of {self._name()} cannot join turns: {reason}. Use history=None or 'render', and such "
            "conversations fork; or set another tokenizer.chat_template."
        )

    def _name(self) -> str:
        return repr(self._tokenizer.name_or_path or type(self._tokenizer).__name__)


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template wants the calls of a message. Most take objects; those of DeepSeek only text, and no content."""

    as_text: bool = False
    no_content: bool = False

    def apply(self, message: Message) -> Message:
        if not self.as_text or not message.get("tool_calls"):
            return message
        calls = [
            {
                **call,
                "function": {
                    **call["function"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for call in message["tool_calls"]
        ]
        content = None if self.no_content and not message["content"] else message["content"]
        return {**message, "content": content, "tool_calls": calls}


def _roles(messages: Sequence[Message]) -> list[str]:
    return [str(message.get("role")) for message in messages]


def _called(answers: Sequence[Message]) -> list[Message]:
    """The tool results that answer the turn before, not one of the messages."""
    return list(takewhile(lambda answer: answer["role"] == "tool", answers))


def _past(answers: Sequence[Message], calls: int, system: bool) -> list[dict[str, Any]]:
    """The shortest conversation that `answers` can follow, with so many of the calls that they answer."""
    said: dict[str, Any] = {"role": "assistant", "content": MARKER}
    if calls:
        said["tool_calls"] = [
            {
                "type": "function",
                "id": answer.get("tool_call_id", ""),
                "function": {"name": answer.get("name", "f"), "arguments": {"x": MARKER}},
            }
            for answer in _called(answers)[:calls]
        ]
    opening = [{"role": "system", "content": "?"}] if system else []
    return [*opening, {"role": "user", "content": "?"}, said]


def _with_short_ids(message: Message) -> Message:
    """Mistral's templates take ids of nine letters and digits only; clients make up their own."""
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short_id(call.get("id", ""))} for call in message["tool_calls"]]
    if message["role"] == "tool":
        changed["tool_call_id"] = _short_id(message.get("tool_call_id", ""))
    return changed


def _short_id(name: str) -> str:
    if re.fullmatch("[A-Za-z0-9]{9}", name):
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:9]
