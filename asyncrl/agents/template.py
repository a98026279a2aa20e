"""From messages to tokens by the tokenizer's chat template, one turn at a time.

What the model said is never rendered again: a re-rendered turn often has other tokens than those that were drawn. So
the template is asked for the opening, and later only for what it puts between two turns of the model:

    opening                     | drawn             | continuation                        | drawn
    <system><user><assistant>     ...<end of turn>    \\n<tool result>...<assistant>         ...<end of turn>

A continuation is cut out of a short conversation with a marker in the model's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from asyncrl.errors import ModelError

Message = Mapping[str, Any]

MARKER = "asyncrl0marker"
"""Stands where the model spoke. Letters and digits only, which no template escapes."""

ANSWER = "asyncrl0answer"
"""Stands for a tool result or a user message."""


class TurnTemplate:
    """The chat template of one tokenizer. Checked at birth, and once for each kind of continuation.

    Thoughts of earlier turns stay in the context, also where the template would drop them from the history: the
    tokens that were drawn are the ones that are trained.

    Raises:
        ModelError: there is no template, or turns cannot be joined with it; the message says why.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._checked: set[frozenset[str]] = set()
        self.end_of_turn: int
        """The token that closes a turn of the model."""
        self.end_of_turn, self._end_text = self._find_end_of_turn()

    def opening(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Everything up to where the model begins to speak."""
        return self._encode(self._render(messages, tools))

    def continuation(self, answers: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """What comes between the model's end-of-turn token and its next turn, for these new messages."""
        roles = frozenset(str(answer["role"]) for answer in answers)
        if roles not in self._checked:
            self._check(answers, tools)
            self._checked.add(roles)
        text = self._render([*_past(answers), *answers], tools)
        return self._encode(text[self._cut(text) :])

    def _find_end_of_turn(self) -> tuple[int, str]:
        text = self._render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARKER}], (), generation_prompt=False
        )
        _, found, tail = text.rpartition(MARKER)
        if not found:
            raise self._refusal("it drops what the assistant said")
        ids = self._encode(tail or "?")
        end = self._tokenizer.decode(ids[:1])
        if not tail.startswith(end) or ids[0] not in self._tokenizer.get_added_vocab().values():
            raise self._refusal(f"it closes a turn with {tail!r}, which does not begin with a token of its own")
        return ids[0], end

    def _cut(self, text: str) -> int:
        """Where the model's last turn has ended, behind its end-of-turn token."""
        end = text.find(self._end_text, text.rfind(MARKER))
        if end < 0:
            raise self._refusal(f"it does not close a turn that others follow with {self._end_text!r}")
        return end + len(self._end_text)

    def _check(self, answers: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
        """What joining turns rests on: nothing earlier is rewritten, nothing is lost, no token crosses the seam."""
        probes: list[Message] = [{**answer, "content": ANSWER} for answer in answers]
        history = [*_past(probes), *probes]
        before = self._render(history, tools, generation_prompt=False)
        after = self._render([*history, *_past(probes)[1:], *probes], tools)
        role = answers[0]["role"]
        if not after.startswith(before):
            raise self._refusal(f"it renders earlier messages differently once a {role} message follows")
        cut = self._cut(after)
        if after.count(ANSWER, cut) != len(probes):
            raise self._refusal(f"it drops {role} messages, or does not close the turn before them")
        if self._encode(after) != self._encode(after[:cut]) + self._encode(after[cut:]):
            raise self._refusal(f"the tokenizer merges {self._end_text!r} with what follows it")

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, generation_prompt: bool = True
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tools=list(tools) or None, add_generation_prompt=generation_prompt, tokenize=False
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise self._refusal(f"it cannot render messages with the roles {roles}: {error}") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _refusal(self, reason: str) -> ModelError:
        name = self._tokenizer.name_or_path or type(self._tokenizer).__name__
        return ModelError(
            f"the chat template of {name!r} cannot be used for chats: {reason}. Use an instruction-tuned model, set "
            "another tokenizer.chat_template, or build the tokens yourself with policy.generate(token_ids)."
        )


def _past(answers: Sequence[Message]) -> list[Message]:
    """The shortest conversation that `answers` can follow: their calls, where they are tool results."""
    calls = [
        {
            "type": "function",
            "id": answer.get("tool_call_id", ""),
            "function": {"name": answer.get("name", "f"), "arguments": {"x": MARKER}},
        }
        for answer in answers
        if answer["role"] == "tool"
    ]
    said: dict[str, Any] = {"role": "assistant", "content": MARKER}
    return [{"role": "user", "content": "?"}, {**said, "tool_calls": calls} if calls else said]
