from __future__ import annotations

from typing import Any

import pytest

from asyncrl.errors import DataError
from asyncrl.recipes.chat_rows import TrainOn, message_weights, read_messages, supervised_examples
from asyncrl.recipes.examples import Encoder
from asyncrl.testing.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ENCODER = Encoder(TOKENIZER)
USER, HELLO, BYE = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "assistant", "content": "Bye"},
)


def taught(row: dict[str, Any], train_on: TrainOn = "all") -> str:
    """The text of the trained tokens."""
    examples = supervised_examples(row, ENCODER, train_on)
    ids = [
        token for example in examples for token, weight in zip(example.tokens, example.weights, strict=True) if weight
    ]
    return str(TOKENIZER.decode(ids))


def shown(row: dict[str, Any]) -> str:
    return "".join(TOKENIZER.decode(list(example.tokens)) for example in supervised_examples(row, ENCODER, "all"))


@pytest.mark.parametrize(
    ("row", "all_turns", "last_turn"),
    [
        ({"messages": [USER, HELLO, USER, BYE]}, "Hello<|im_end|>Bye<|im_end|>", "Bye<|im_end|>"),
        ({"messages": [USER, {**HELLO, "weight": 0}, USER, BYE]}, "Bye<|im_end|>", "Bye<|im_end|>"),
        ({"messages": [USER, HELLO, USER, {**BYE, "weight": 0}]}, "Hello<|im_end|>", ""),
        ({"prompt": [USER, HELLO, USER], "completion": [BYE]}, "Bye<|im_end|>", "Bye<|im_end|>"),
        ({"prompt": "Hi", "completion": [BYE]}, "Bye<|im_end|>", "Bye<|im_end|>"),
        ({"prompt": [USER], "completion": "Bye"}, "Bye<|im_end|>", "Bye<|im_end|>"),
        ({"prompt": "2+2=", "completion": "4"}, "4<|im_end|>", "4<|im_end|>"),
        ({"text": "abc"}, "bc<|im_end|>", "bc<|im_end|>"),
    ],
)
def test_what_is_taught(row: dict[str, Any], all_turns: str, last_turn: str) -> None:
    assert taught(row, "all") == all_turns
    assert taught(row, "last") == last_turn


def test_a_completion_of_text_is_not_put_into_a_chat() -> None:
    assert shown({"prompt": "2+2=", "completion": "4"}) == "2+2=4<|im_end|>"
    assert shown({"prompt": [USER], "completion": "4"}).startswith("<|im_start|>user\nHi")


def test_message_weights() -> None:
    messages = read_messages([USER, {**HELLO, "weight": 0.5}, BYE], "messages")
    assert message_weights(messages, "all") == [0, 0.5, 1]
    assert message_weights(messages, "last") == [0, 0, 1]
    examples = supervised_examples({"messages": messages}, ENCODER, "all")
    assert sorted({weight for example in examples for weight in example.weights}) == [0, 0.5, 1]


def test_weights_are_not_shown_to_the_template() -> None:
    template = "{%- for m in messages -%}{{ m | length }}{{ m.content }};{%- endfor -%}"
    tokenizer = tiny_tokenizer(chat_template=template + "{%- if add_generation_prompt -%}{%- endif -%}")
    (example,) = supervised_examples({"messages": [USER, {**HELLO, "weight": 0.5}]}, Encoder(tokenizer), "all")
    assert tokenizer.decode(list(example.tokens)) == "2Hi;2Hello;"


def test_openai_files_are_read() -> None:
    """Content in parts or null, arguments as JSON in a string, weights of 0 and 1, tools beside the messages."""
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1},
            {"role": "tool", "tool_call_id": "c", "content": "2"},
            {"role": "assistant", "content": "3", "weight": 0, "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    assert taught(row) == '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    assert "user\n1+1<|im_end|>" in shown(row)
    assert "Tools:" in shown(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "?", "answer": "!"}, "found the fields 'question', 'answer'. Expected `messages`, `prompt`"),
        ({"prompt": "?"}, "found the fields 'prompt'"),
        ({"messages": []}, r"messages is list \[\]. Expected a list of messages"),
        ({"messages": "Hi"}, "messages is str 'Hi'"),
        ({"messages": [USER, "Hello"]}, r"messages\[1\] is str 'Hello'. Expected {\"role\""),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] is dict"),
        ({"messages": [USER]}, "no message is the assistant's.*found the roles user"),
        ({"messages": [USER, {**HELLO, "weight": -1}]}, r"messages\[1\].weight is int -1. Expected a number from 0"),
        ({"messages": [USER, {**HELLO, "weight": "1"}]}, "weight is str '1'"),
        ({"messages": [USER, {**HELLO, "weight": float("nan")}]}, "weight is float nan"),
        ({"messages": [{**USER, "weight": 1}, HELLO]}, r"messages\[0\].weight is 1 on a message of role 'user'"),
        ({"messages": [{"role": "user", "content": 3}, HELLO]}, r"messages\[0\].content is int 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, HELLO]}, "parts of type 'text' alone"),
        ({"messages": [USER, {**HELLO, "content": [{"type": "text"}]}]}, "parts of type 'text' alone"),
        ({"messages": [USER, {**HELLO, "content": [{"type": "text", "text": None}]}]}, "parts of type 'text' alone"),
        ({"messages": [USER, {**HELLO, "tool_calls": 3}]}, r"messages\[1\].tool_calls is int 3. Expected a list"),
        ({"prompt": 3, "completion": "4"}, "prompt is int 3. Expected text, or a list of messages"),
        ({"messages": [USER, {**HELLO, "tool_calls": ["f"]}]}, r"messages\[1\].tool_calls\[0\] is str 'f'"),
        (
            {"messages": [USER, {**HELLO, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            r"tool_calls\[0\].function.arguments is no JSON",
        ),
        (
            {"messages": [USER, {**HELLO, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            r"arguments is list \[1\]. Expected a JSON object",
        ),
        ({"messages": [USER, HELLO], "tools": ["add"]}, "tools is list .* Expected a list of JSON schemas"),
        ({"text": ""}, "text is str ''. Expected text"),
        ({"text": ["a"]}, "text is list"),
        ({"prompt": [USER], "completion": [USER]}, "no message is the assistant's"),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        supervised_examples(row, ENCODER, "all")
