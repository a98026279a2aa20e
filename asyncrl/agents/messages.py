"""Messages of the OpenAI API, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from pydantic_core import from_json

from asyncrl.errors import RolloutContractError

Message = Mapping[str, Any]

_ROLES = {"developer": "system", "function": "tool"}


def normalise(message: Message) -> dict[str, Any]:
    """One message with a text as its content, objects as the arguments of its calls, and nothing that is None.

    Templates differ in what they make of None, of lists of parts and of arguments in a string: some write them out
    as they are, others stop (https://github.com/huggingface/transformers/issues/45419).

    Raises:
        RolloutContractError: it has no role, or holds something other than text.
    """
    plain = {key: value for key, value in message.items() if value is not None}
    role = plain.get("role")
    if not isinstance(role, str):
        raise RolloutContractError(
            f"found a message with the keys {list(message)} and role={role!r}. Expected "
            '{"role": "user", "content": "..."}, or the role system, assistant or tool.'
        )
    plain["role"] = _ROLES.get(role, role)
    plain["content"] = _text_of(plain.get("content", ""), role)
    if "reasoning" in plain:
        plain.setdefault("reasoning_content", plain.pop("reasoning"))
    if calls := plain.pop("tool_calls", ()):
        plain["tool_calls"] = [
            _normalise_call(call) for call in (calls if isinstance(calls, list | tuple) else [calls])
        ]
    return plain


def _text_of(content: Any, role: str) -> str:
    """The text of a content; parts become lines, as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RolloutContractError(
            f"the content of a {role} message is a {type(content).__name__}. Expected a text, or a list of text parts."
        )
    return "\n".join(_text_of_part(part, role) for part in content)


def _text_of_part(part: Any, role: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise RolloutContractError(
            f"a {role} message holds a part of the type {kind!r}. Expected text: asyncrl trains models of text only."
        )
    return text


def _normalise_call(call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RolloutContractError(
            f"an assistant message holds a tool call that is none: {str(call)[:200]}. Expected "
            '{"type": "function", "id": "...", "function": {"name": "...", "arguments": "{...}"}}.'
        )
    return {**call, "function": {**function, "arguments": _arguments_of(function.get("arguments"))}}


def _arguments_of(arguments: Any) -> dict[str, Any]:
    """As an object. What a model wrote in place of one stands under the key `text`."""
    if isinstance(arguments, Mapping):
        return dict(arguments)
    try:
        parsed = from_json(arguments or "{}")
    except (ValueError, TypeError):
        return {"text": str(arguments)}
    return parsed if isinstance(parsed, dict) else {"text": str(arguments)}


def one_call_each(messages: Sequence[Message]) -> list[Message]:
    """The same history for templates that refuse several calls in one turn: each call is followed by its result."""
    apart: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls", ())
        results = list(takewhile(lambda later: later["role"] == "tool", messages[at:]))
        if len(calls) < 2 or len(results) != len(calls):
            apart.append(message)
            continue
        at += len(results)
        for index, (call, result) in enumerate(zip(calls, results, strict=True)):
            apart += [{**message, "content": "" if index else message["content"], "tool_calls": [call]}, result]
    return apart
