"""What a model's turn says: thoughts, text for the reader, and tool calls.

| style   | a call                                                                                               |
|---------|------------------------------------------------------------------------------------------------------|
| hermes  | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` (Qwen, Hermes, ChatML)                      |
| llama   | the whole turn is `{"name": ..., "parameters": {...}}`, or what follows `<|python_tag|>`               |
| mistral | `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, or `[TOOL_CALLS]name[ARGS]{...}`                    |
| xml     | `<tool name="f"><x>1</x></tool>`, or `<function=f><parameter=x>1</parameter></function>` (Qwen3-Coder) |

What looks like a call and cannot be read stays a call, with a reason that the model can learn from. All of it takes
time in proportion to the length of the turn, whatever the turn says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

CallStyle = Literal["hermes", "llama", "mistral", "xml"]

THOUGHTS_END = "</think>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call as the model wrote it."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class MalformedCall:
    """Something in the place of a call that is none."""

    text: str
    reason: str
    """For the model to read."""


Call = ToolCall | MalformedCall


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the model, read."""

    text: str
    """Without thoughts and calls."""
    thoughts: str
    calls: tuple[Call, ...]


def call_style_of(chat_template: str) -> CallStyle | None:
    """The style in which a chat template writes calls, by the marks in its source; None where there is none of them."""
    for mark, style in _MARKS.items():
        if mark in chat_template:
            return style
    return None


_MARKS: dict[str, CallStyle] = {
    "[TOOL_CALLS]": "mistral",
    "<function=": "xml",  # before hermes: Qwen3-Coder wraps it in <tool_call>
    "<tool name=": "xml",
    "<tool_call>": "hermes",
    "<|python_tag|>": "llama",
    "ipython": "llama",
}


def read_turn(
    said: str,
    style: CallStyle = "hermes",
    thoughts_open: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Turn:
    """Take a turn apart. Calls inside of thoughts are thoughts.

    Args:
        said: The turn, without its end-of-turn token.
        style: How the model writes calls.
        thoughts_open: The chat template has opened the thoughts already, so a turn that does not close them is
            nothing else.
        tools: Their schemas. The xml style has no types of its own: `1` is a text where the schema says so.
    """
    thoughts, closed, rest = said.partition(THOUGHTS_END)
    if not closed:
        thoughts, rest = "", said
        if thoughts_open or said.lstrip().startswith("<think>"):
            thoughts, rest = said, ""
    match style:
        case "hermes":
            text, calls = _read_hermes(rest)
        case "llama":
            text, calls = _read_llama(rest)
        case "mistral":
            text, calls = _read_mistral(rest)
        case "xml":
            text, calls = _read_xml(rest, tools)
    return Turn(text.strip(), thoughts.strip().removeprefix("<think>").strip(), tuple(calls))


_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def _read_hermes(rest: str) -> tuple[str, list[Call]]:
    return _HERMES.sub("", rest), [_json_call(match[1]) for match in _HERMES.finditer(rest)]


_BARE_CALL = re.compile(r'\s*\{\s*"(?:type|name|function|parameters|arguments)"')


def _read_llama(rest: str) -> tuple[str, list[Call]]:
    """A turn that is JSON is an answer, unless it has the keys of a call."""
    text, *bodies = rest.split("<|python_tag|>")
    if not bodies and _BARE_CALL.match(rest) and ('"parameters"' in rest or '"arguments"' in rest):
        text, bodies = "", [rest]
    return text, [_json_call(part) for body in bodies for part in _split_objects(body.strip())]


def _split_objects(text: str) -> Iterator[str]:
    """JSON objects one after the other, with or without `;` between them; what cannot be read comes last."""
    at = 0
    while at < len(text) or not text:
        try:
            _, end = _decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield text[at:]
            return
        yield text[at:end]
        between = _BETWEEN.match(text, end)
        at = between.end() if between else end


_decoder = json.JSONDecoder()
_BETWEEN = re.compile(r"[\s;]+")


def _read_mistral(rest: str) -> tuple[str, list[Call]]:
    text, *bodies = rest.split("[TOOL_CALLS]")
    return text, [call for body in bodies for call in _mistral_calls(body)]


def _mistral_calls(body: str) -> Iterator[Call]:
    name, separator, arguments = body.partition("[ARGS]")
    if separator:
        yield _named_call(name.partition("[CALL_ID]")[0].strip(), arguments, body)
        return
    try:
        calls = _parse(body)
    except ValueError as error:
        yield MalformedCall(body.strip(), str(error))
        return
    for call in calls if isinstance(calls, list) and calls else [calls]:
        yield as_call(call, json.dumps(call))


_XML = re.compile(
    r"<tool_call>(?!\s*<function=)(?P<unknown>.*?)(?:</tool_call>|\Z)"
    r"|(?:<tool_call>\s*)?<function=(?P<function>[^<>]*)>(?P<parameters>.*?)(?:</function>(?:\s*</tool_call>)?|\Z)"
    r"|<tool(?P<attributes>(?:[\s/][^<>]*)?)>(?:(?<=/>)|(?P<elements>.*?)(?:</tool>|\Z))",
    re.DOTALL,
)
_TOOL_NAME = re.compile(r"""name\s*=\s*["']?([^"'\s]+)["']?""")
_ELEMENT = re.compile(r"\s*<(parameter=)?([^<>/\s=]+)\s*>")


def _read_xml(rest: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[Call]]:
    return _XML.sub("", rest), [_xml_call(match, tools) for match in _XML.finditer(rest)]


def _xml_call(match: re.Match[str], tools: Sequence[Mapping[str, Any]]) -> Call:
    text = match[0].strip()
    if match["unknown"] is not None or match["function"] == "":
        return MalformedCall(text, "expected <function=name><parameter=key>value</parameter></function>")
    if match["function"] is not None:
        name, body = match["function"].strip(), match["parameters"]
    else:
        named = _TOOL_NAME.fullmatch(match["attributes"].removesuffix("/").strip())
        if named is None:
            return MalformedCall(text, 'expected <tool name="..."><key>value</key></tool>')
        name, body = named[1], match["elements"] or ""
    if body.lstrip().startswith("{"):
        return _named_call(name, body, text)
    types = _parameter_schemas(name, tools)
    arguments: dict[str, Any] = {}
    at = 0
    while element := _ELEMENT.match(body, at):
        mark, key = element.groups()
        closing = "</parameter>" if mark else f"</{key}>"
        end = body.find(closing, element.end())
        if end < 0:
            return MalformedCall(text, f"the value of {key} is not closed with {closing}")
        value = body[element.end() : end].removeprefix("\n").removesuffix("\n")
        arguments[key] = _typed(value, types.get(key, {}))
        at = end + len(closing)
    if found := body[at:].strip():
        return MalformedCall(text, f"expected <key>value</key>, found {found[:40]!r}")
    return ToolCall(name, arguments)


def _parameter_schemas(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    for tool in tools:
        function = tool.get("function", tool)
        if function.get("name") == name:
            return _mapping(_mapping(function.get("parameters")).get("properties"))
    return {}


def _typed(value: str, schema: Any) -> Any:
    """Text where the schema takes text, else JSON where it is JSON: whoever runs the tool checks the types.

    Schemas come from clients and servers, and may be `true` for anything, or no schema at all.
    """
    options = [schema, *(option for key in ("anyOf", "oneOf") for option in _listed(_mapping(schema).get(key)))]
    types = [name for option in options for name in _listed(_mapping(option).get("type"))]
    if "string" in types and not ("null" in types and value == "null"):
        return value
    try:
        return _parse(value)
    except ValueError:
        return value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _parse(text: str) -> Any:
    """As `json.loads`, but strict: no NaN, no half of a surrogate pair, which nobody downstream could write out.

    Raises:
        ValueError: it is not JSON, or nested too deep; says where.
    """
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def _json_call(body: str) -> Call:
    try:
        return as_call(_parse(body), body)
    except ValueError as error:
        return MalformedCall(body.strip(), str(error))


def _named_call(name: str, arguments: str, text: str) -> Call:
    """A call whose name stands outside of the JSON."""
    try:
        return as_call({"name": name, "arguments": _parse(arguments)}, text)
    except ValueError as error:
        return MalformedCall(text.strip(), str(error))


def as_call(call: Any, text: str) -> Call:
    """A call from its parsed JSON; `text` is what the model wrote, for one that is none."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"]:
        return MalformedCall(text.strip(), 'expected {"name": "...", "arguments": {...}}')
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # OpenAI's habit: arguments as JSON in a string
        try:
            arguments = _parse(arguments)
        except ValueError as error:
            return MalformedCall(text.strip(), str(error))
    if not isinstance(arguments, dict):
        return MalformedCall(text.strip(), f"arguments must be a JSON object, found {json.dumps(arguments)[:200]}")
    return ToolCall(call["name"], arguments)
