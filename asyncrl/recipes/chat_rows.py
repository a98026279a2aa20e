"""What a dataset row says: messages, or texts; checked, and in the form that chat templates take.

    {"messages": [...], "tools": [...]}                    a conversation
    {"prompt": ..., "completion": ...}                     both text, or messages
    {"text": ...}                                          plain text, trained whole

Nothing here names the row: whoever goes through a dataset does (`supervised.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from asyncrl.errors import DataError
from asyncrl.recipes.examples import Encoder, Example

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]
TrainOn = Literal["last", "all"]

SHAPES = "`messages`, `prompt` and `completion`, or `text`"


def supervised_examples(row: Row, encoder: Encoder, train_on: TrainOn) -> tuple[Example, ...]:
    """The examples of one row; none where all that could be trained has weight 0.

    Raises:
        DataError: the row has no shape that is known here, or something in it cannot be used.
    """
    if "messages" in row:
        messages = read_messages(row["messages"], "messages")
        weights = message_weights(messages, train_on)
        return tuple(encoder.conversation(bare(messages), weights, read_tools(row)))
    if "prompt" in row and "completion" in row:
        prompt, completion = read_prompt(row["prompt"], "prompt"), read_prompt(row["completion"], "completion")
        if isinstance(prompt, str) and isinstance(completion, str):
            return (encoder.text(prompt, completion),)
        before, said = as_messages(prompt, "user"), as_messages(completion, "assistant")
        weights = [0.0] * len(before) + message_weights(said, train_on)
        return tuple(encoder.conversation(bare(before + said), weights, read_tools(row)))
    if "text" in row:
        return (encoder.text("", read_text(row["text"], "text")),)
    raise DataError(f"found the fields {names(row)}. Expected {SHAPES}.")


def message_weights(messages: Messages, train_on: TrainOn) -> list[float]:
    """The weight of each message: its own `weight`, else 1, where the assistant speaks; 0 elsewhere."""
    spoken = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"no message is the assistant's, so there is nothing to train: found the roles {roles}.")
    trained = spoken[-1:] if train_on == "last" else spoken
    return [_weight(message) if place in trained else 0.0 for place, message in enumerate(messages)]


def read_messages(value: Any, field: str, expected: str = "a list of messages") -> Messages:
    """Check a list of messages. Content in parts becomes one text, arguments of calls become objects."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{field} is {_seen(value)}. Expected {expected}.")
    return [_message(message, f"{field}[{place}]") for place, message in enumerate(value)]


def read_prompt(value: Any, field: str) -> str | Messages:
    """A text, or messages."""
    return value if isinstance(value, str) else read_messages(value, field, "text, or a list of messages")


def read_text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"{field} is {_seen(value)}. Expected text.")
    return value


def read_tools(row: Row) -> list[dict[str, Any]]:
    """The JSON schemas of the tools, as chat templates take them."""
    tools = row.get("tools") or []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools is {_seen(tools)}. Expected a list of JSON schemas of functions.")
    return [dict(tool) for tool in tools]


def as_messages(value: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def bare(messages: Messages) -> Messages:
    """Without what is ours: templates need not know of weights."""
    return [{name: part for name, part in message.items() if name != "weight"} for message in messages]


def names(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def _message(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        raise DataError(f'{field} is {_seen(value)}. Expected {{"role": ..., "content": ...}}.')
    message = {name: part for name, part in value.items() if part is not None}  # a table's empty cells
    _weight(message, f"{field}.weight")
    message["content"] = _content(message.get("content", ""), f"{field}.content")
    if calls := message.get("tool_calls"):
        if not isinstance(calls, Sequence):
            raise DataError(f"{field}.tool_calls is {_seen(calls)}. Expected a list of calls.")
        message["tool_calls"] = [_call(call, f"{field}.tool_calls[{place}]") for place, call in enumerate(calls)]
    return message


def _weight(message: Mapping[str, Any], field: str = "weight") -> float:
    weight = message.get("weight", 1.0 if message["role"] == "assistant" else 0.0)
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise DataError(f"{field} is {_seen(weight)}. Expected a number from 0 (not trained), 1 by default.")
    if weight and message["role"] != "assistant":
        raise DataError(
            f"{field} is {weight:g} on a message of role {message['role']!r}. Only the assistant's turns can be "
            "trained: leave it out, or set 0."
        )
    return float(weight)


def _content(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    texts: list[Any] = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{field} is {_seen(content)}. Expected text, or parts of type 'text' alone.")
    return "".join(texts)


def _call(call: Any, field: str) -> dict[str, Any]:
    """OpenAI's files hold arguments as JSON in a string; templates take the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f'{field} is {_seen(call)}. Expected {{"function": {{"name": ..., "arguments": {{...}}}}}}.')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise DataError(f"{field}.function.arguments is no JSON: {error.msg} in {_seen(arguments)}.") from None
    if not isinstance(arguments, Mapping):
        raise DataError(f"{field}.function.arguments is {_seen(arguments)}. Expected a JSON object.")
    return {**call, "function": {**function, "arguments": dict(arguments)}}


def _seen(value: Any) -> str:
    """A value for a message, short."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
