from __future__ import annotations

import re
import sys
from typing import Any, get_args

import pytest

from asyncrl.agents.calls import CallStyle, MalformedCall, ToolCall, call_style_of, read_turn
from asyncrl.testing.templates import Style, styled_tokenizer

F, G = ToolCall("f", {"x": 1}), ToolCall("g", {})

WRITTEN: list[tuple[CallStyle, str, str]] = [
    (
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><tool_call>{"name": "g"}</tool_call>',
        "",
    ),
    ("hermes", '<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>So<tool_call>{"name": "g"}', "So"),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call><tool_call>{"name": "g"}', ""),
    ("llama", '{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', ""),
    ("llama", ' {"type": "function", "name": "f", "parameters": {"x": 1}}\n{"name": "g", "arguments": {}} ', ""),
    ("llama", 'So<|python_tag|>{"name": "f", "parameters": {"x": 1}}<|python_tag|>{"name": "g"}', "So"),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "call00000"}, {"name": "g"}]', ""),
    ("mistral", 'So[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]call00001[ARGS]{}', "So"),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {"x": 1}}[TOOL_CALLS]{"name": "g"}', ""),
    ("xml", '<tool name="f"><x>1</x></tool>So<tool name="g"></tool>', "So"),
    ("xml", "<tool name='f'>\n  <x>\n1\n</x>\n</tool><tool name=g/>", ""),
    ("xml", '<tool name="f">{"x": 1}</tool><tool name="g" />', ""),
    (
        "xml",
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n<function=g>\n</function>",
        "",
    ),
]


@pytest.mark.parametrize("style", get_args(CallStyle))
def test_text_alone_is_an_answer(style: CallStyle) -> None:
    for said in ("The answer is 4.", '{"answer": 4}', '{"name": "Ada"}', "if x < 3 > 2: <b>4</b>", "[1, 2]"):
        turn = read_turn(f"  {said}\n", style)
        assert (turn.text, turn.thoughts, turn.calls) == (said, "", ())


@pytest.mark.parametrize(("style", "said", "text"), WRITTEN)
def test_calls_are_taken_out_of_the_text_in_order(style: CallStyle, said: str, text: str) -> None:
    turn = read_turn(said, style)
    assert turn.calls == (F, G)
    assert turn.text == text


@pytest.mark.parametrize("style", get_args(Style))
def test_what_a_template_writes_is_read_back(style: Style) -> None:
    """The style is detected, and arguments of any kind survive."""
    tokenizer = styled_tokenizer(style)
    arguments = {"x": 1, "text": 'a "b"\n<c> & {d} [e]', "many": [1, {"k": None}], "on": True}
    call = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": arguments}}
    asked = [{"role": "user", "content": "?"}]
    before = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    after = tokenizer.apply_chat_template([*asked, turn], tokenize=False)
    said = after.removeprefix(before).rstrip("\n").removesuffix(tokenizer.eos_token)
    found = call_style_of(tokenizer.chat_template)
    assert found == {"chatml": "hermes", "qwen3": "hermes", "llama3": "llama"}.get(style, style)
    assert read_turn(said, found).calls == (ToolCall("f", arguments),)


@pytest.mark.parametrize(
    ("source", "style"),
    [
        ("'<tool_call>\\n<function=' + call.name + '>'", "xml"),
        ("{'role': 'ipython'}", "llama"),
        ("{%- for m in messages %}{{ m.content }}{%- endfor %}", None),
    ],
)
def test_the_style_is_in_the_source_of_the_template(source: str, style: CallStyle | None) -> None:
    assert call_style_of(source) == style


@pytest.mark.parametrize(
    ("schema", "value", "expected"),
    [
        ({"type": "string"}, "1", "1"),
        ({"type": "integer"}, "1", 1),
        ({"type": "integer"}, "one", "one"),
        ({"type": "array"}, "[1, 2]", [1, 2]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "2", "2"),
        ({"type": ["string", "null"]}, "2", "2"),
        ({"$ref": "#/$defs/Point"}, '{"x": 1}', {"x": 1}),
        ({}, "\n  indented\n\n", "  indented\n"),
    ],
)
def test_values_in_xml_have_the_types_of_the_schema(schema: dict[str, Any], value: str, expected: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": schema}}}}]
    (call,) = read_turn(f'<tool name="f"><x>{value}</x></tool>', "xml", tools=tools).calls
    assert call == ToolCall("f", {"x": expected})


NOT_JSON = "not valid JSON"


@pytest.mark.parametrize(
    ("style", "body", "reason"),
    [
        ("hermes", "<tool_call>f(1)</tool_call>", NOT_JSON),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', f"{NOT_JSON}: EOF"),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{"}</tool_call>', NOT_JSON),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', NOT_JSON),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', NOT_JSON),
        ("hermes", f"<tool_call>{'[' * 100_000}</tool_call>", NOT_JSON),
        ("hermes", '<tool_call>["f"]</tool_call>', "expected"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', "expected"),
        ("hermes", '<tool_call>{"name": ""}</tool_call>', "expected"),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', "expected"),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', r"must be a JSON object, found \[1\]"),
        ("hermes", "<tool_call>", NOT_JSON),
        ("llama", '{"name": "f", "parameters": {"x": 1}', NOT_JSON),
        ("llama", '{"name": "f", "parameters": {}} and so on', NOT_JSON),
        ("llama", "<|python_tag|>print(1)", NOT_JSON),
        ("llama", "<|python_tag|>", NOT_JSON),
        ("llama", f'{{"name": "f", "parameters": {"[" * 100_000}', NOT_JSON),
        ("mistral", "[TOOL_CALLS]f(1)", NOT_JSON),
        ("mistral", "[TOOL_CALLS][]", "expected"),
        ("mistral", "[TOOL_CALLS][3]", "expected"),
        ("mistral", '[TOOL_CALLS][{"name": "f"}', NOT_JSON),
        ("mistral", "[TOOL_CALLS]f[ARGS]x=1", NOT_JSON),
        ("mistral", "[TOOL_CALLS][ARGS]{}", "expected"),
        ("xml", "<tool><x>1</x></tool>", "expected <tool name="),
        ("xml", '<tool id="3">', "expected <tool name="),
        ("xml", '<tool name="f"><x>1</tool>', "x is not closed with </x>"),
        ("xml", '<tool name="f">x = 1</tool>', "expected <key>value</key>, found 'x = 1'"),
        ("xml", '<tool name="f"><x>1</x>, too</tool>', "found ', too'"),
        ("xml", '<tool name="f">{"x": </tool>', NOT_JSON),
        ("xml", '<tool_call>{"name": "f"}</tool_call>', "expected <function=name>"),
        ("xml", "<function=></function>", "expected <function=name>"),
        ("xml", "<function=f><parameter=x>1</function>", "x is not closed with </parameter>"),
    ],
)
def test_a_malformed_call_says_why(style: CallStyle, body: str, reason: str) -> None:
    turn = read_turn(f"<think>Hm.</think>{body}", style)
    assert turn.text == ""
    (call, *_) = (call for call in turn.calls if isinstance(call, MalformedCall))
    assert call.text in body
    assert re.search(reason, call.reason)
    assert len(call.reason) < 300


def test_one_malformed_call_spoils_no_other() -> None:
    calls = read_turn('[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}, {"name": 3}, {"name": "g"}]', "mistral").calls
    assert (calls[0], calls[2]) == (F, G)
    assert isinstance(calls[1], MalformedCall)
    assert calls[1].text == '{"name": 3}'


@pytest.mark.parametrize(
    ("said", "thoughts", "text"),
    [
        ("<think>\nhm\n</think>\n\n4", "hm", "4"),
        ("hm\n</think>\n4", "hm", "4"),
        ("<think>never closed <tool_call>{}</tool_call>", "never closed <tool_call>{}</tool_call>", ""),
        ('<think><tool_call>{"name": "f"}</tool_call></think>4', '<tool_call>{"name": "f"}</tool_call>', "4"),
        ("<think>hm</think>It writes </think> there.", "hm", "It writes </think> there."),
    ],
)
def test_thoughts_are_no_text_and_their_calls_are_not_made(said: str, thoughts: str, text: str) -> None:
    turn = read_turn(said)
    assert (turn.thoughts, turn.text, turn.calls) == (thoughts, text, ())


def test_thoughts_that_the_template_opened_may_never_close() -> None:
    said = 'hm <tool_call>{"name": "f"}</tool_call>'
    assert read_turn(said, thoughts_open=True).thoughts == said
    assert read_turn(said, thoughts_open=True).calls == ()
    assert read_turn(said).text == "hm"


HOSTILE = [
    "<tool_call>",
    "<tool_call> ",
    "</tool_call>",
    "<think>",
    "{",
    '{"a":',
    "[",
    '{"name": "f", "parameters": ',
    '{"name": "f", "parameters": {}} ',
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[TOOL_CALLS][",
    "[ARGS]",
    "[TOOL_CALLS]f[ARGS]{",
    '<tool name="f">',
    "<tool ",
    '<tool name="f"><x></tool>',
    "<x>",
    "<function=f><parameter=x>",
    "<parameter=x>",
    "<function=",
    " ",
    "1 ",
    "1,",
]


def steps(said: str, style: CallStyle) -> int:
    """Characters handled while reading: lines of `calls.py` that ran, and the length of the texts that came out."""
    count = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith("agents/calls.py"):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        turn = read_turn(said, style)
    finally:
        sys.settrace(before)
    kept = {id(call.text): len(call.text) + len(call.reason) for call in turn.calls if isinstance(call, MalformedCall)}
    return count + sum(kept.values()) + len(turn.text)


@pytest.mark.parametrize("style", get_args(CallStyle))
@pytest.mark.parametrize("opening", ["", "<|python_tag|>", "[TOOL_CALLS][", '<tool name="f">', "<function=f>"])
def test_hostile_turns_take_steps_in_proportion_to_their_length(style: CallStyle, opening: str) -> None:
    for unit in HOSTILE:
        small, large = (steps(opening + unit * count, style) for count in (100, 400))
        assert large <= 4 * small + 100, (unit, small, large)


@pytest.mark.parametrize("style", get_args(CallStyle))
def test_a_megabyte_of_marks_is_read(style: CallStyle) -> None:
    """Backtracking would take hours here: what matters is that the test ends."""
    for unit in HOSTILE:
        read_turn(unit * (1_000_000 // len(unit)), style)


@pytest.mark.parametrize(
    "parameters",
    [
        *({"properties": {"x": schema}} for schema in (True, None, {"type": None}, {"anyOf": None}, {"anyOf": [True]})),
        *({"properties": properties} for properties in (True, [])),
        [],
    ],
)
def test_a_schema_that_says_nothing_of_a_type_stops_no_turn(parameters: Any) -> None:
    """They come from clients and MCP servers; some write `true` for anything."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    assert read_turn("<function=f><parameter=x>1</parameter></function>", "xml", tools=tools).calls == (F,)
