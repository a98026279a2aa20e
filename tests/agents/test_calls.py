from __future__ import annotations

import re

import pytest

from asyncrl.agents.calls import MalformedCall, ToolCall, read_turn


def test_text_alone_is_an_answer() -> None:
    turn = read_turn("  The answer is 4.\n")
    assert (turn.text, turn.thoughts, turn.calls) == ("The answer is 4.", "", ())


def test_calls_are_taken_out_of_the_text_in_order() -> None:
    turn = read_turn(
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
        '<tool_call>{"name": "g"}</tool_call>'
    )
    assert turn.text == "Let me see."
    assert turn.calls == (ToolCall("f", {"x": 1}), ToolCall("g", {}))


def test_a_last_call_may_be_closed_by_the_end_of_the_turn() -> None:
    assert read_turn('<tool_call>{"name": "f", "arguments": {}}').calls == (ToolCall("f", {}),)


def test_arguments_may_be_json_in_a_string() -> None:
    assert read_turn('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>').calls == (
        ToolCall("f", {"x": 1}),
    )


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("f(1)", "not valid JSON"),
        ('{"name": "f", "arguments": {"x": 1}', "not valid JSON"),
        ('{"name": "f", "arguments": "{"}', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["f"]', "expected"),
        ('{"arguments": {}}', "expected"),
        ('{"name": 3}', "expected"),
        ('{"name": "f", "arguments": [1]}', r"must be a JSON object, found \[1\]"),
    ],
)
def test_a_malformed_call_says_why(body: str, reason: str) -> None:
    (call,) = read_turn(f"<tool_call>{body}</tool_call>").calls
    assert isinstance(call, MalformedCall)
    assert call.text == body
    assert re.search(reason, call.reason)


@pytest.mark.parametrize(
    ("said", "thoughts", "text"),
    [
        ("<think>\nhm\n</think>\n\n4", "hm", "4"),
        ("hm\n</think>\n4", "hm", "4"),
        ("<think>never closed <tool_call>{}</tool_call>", "never closed <tool_call>{}</tool_call>", ""),
        ('<think><tool_call>{"name": "f"}</tool_call></think>4', '<tool_call>{"name": "f"}</tool_call>', "4"),
    ],
)
def test_thoughts_are_no_text_and_their_calls_are_not_made(said: str, thoughts: str, text: str) -> None:
    turn = read_turn(said)
    assert (turn.thoughts, turn.text, turn.calls) == (thoughts, text, ())
