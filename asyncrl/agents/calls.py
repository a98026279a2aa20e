"""What a model's turn says: thoughts, text for the reader, and tool calls.

The format is that of Hermes and Qwen: each call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

THOUGHTS_END = "</think>"
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model wrote it."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """Something between the marks of a call that is none."""

    text: str
    reason: str
    """For the model to read."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the model, read."""

    text: str
    """Without thoughts and calls."""
    thoughts: str
    calls: tuple[ToolCall | MalformedCall, ...]


def read_turn(said: str) -> Turn:
    """Take a turn apart. Calls inside of thoughts are thoughts.

    Thoughts end at `</think>`; where they begin is not asked, because many templates open them in the prompt.
    """
    thoughts, closed, rest = said.rpartition(THOUGHTS_END)
    if not closed and rest.lstrip().startswith("<think>"):
        thoughts, rest = rest, ""
    calls = tuple(_read_call(match[1]) for match in _CALL.finditer(rest))
    return Turn(
        text=_CALL.sub("", rest).strip(),
        thoughts=thoughts.strip().removeprefix("<think>").strip(),
        calls=calls,
    )


def _read_call(body: str) -> ToolCall | MalformedCall:
    try:
        call = json.loads(body)
        if isinstance(call, dict) and isinstance(call.get("arguments"), str):
            call["arguments"] = json.loads(call["arguments"])  # OpenAI's habit: arguments as JSON in a string
    except (ValueError, RecursionError) as error:
        return MalformedCall(body.strip(), f"not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return MalformedCall(body.strip(), 'expected {"name": "...", "arguments": {...}}')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return MalformedCall(body.strip(), f"arguments must be a JSON object, found {json.dumps(arguments)}")
    return ToolCall(call["name"], arguments)
