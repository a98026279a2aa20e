from __future__ import annotations

from typing import Any

import pytest

from asyncrl.agents.template import TurnTemplate
from asyncrl.errors import ModelError
from asyncrl.testing.models import tiny_tokenizer

USER = [{"role": "user", "content": "Well?"}]
TOOLS = [
    {"role": "tool", "name": "f", "tool_call_id": "call00000", "content": "1"},
    {"role": "tool", "name": "g", "tool_call_id": "call00001", "content": "two <b>"},
]

PLAIN = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

# Writes empty thoughts into the last assistant message and none into earlier ones.
THINKING = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{{ m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""


DROPS = "it drops (user|tool) messages, or does not close the turn before them"


def template(source: str) -> TurnTemplate:
    return TurnTemplate(tiny_tokenizer(chat_template=source))


@pytest.mark.parametrize("answers", [USER, TOOLS, [*TOOLS, *USER], TOOLS[:1]], ids=["user", "tools", "both", "tool"])
def test_a_continuation_is_the_difference_of_two_renders(answers: list[dict[str, Any]]) -> None:
    tokenizer = tiny_tokenizer()
    calls = [{"function": {"name": "f", "arguments": {"x": 1}}}] * (answers is not USER)
    past = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Said.", "tool_calls": calls}]
    before = tokenizer.apply_chat_template(past, tokenize=False).removesuffix("\n")
    after = tokenizer.apply_chat_template([*past, *answers], add_generation_prompt=True, tokenize=False)
    turns = TurnTemplate(tokenizer)
    assert tokenizer.encode(before) + turns.continuation(answers, ()) == tokenizer.encode(after)
    assert turns.end_of_turn == tokenizer.eos_token_id


def test_thoughts_that_only_the_last_turn_shows_do_not_matter() -> None:
    turns = template(THINKING)
    tokens = turns.continuation(USER, ())
    assert turns._tokenizer.decode(tokens) == "\n<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "cannot render messages"),
        (PLAIN.replace("m.content", "(m.content if m.role == 'user' else '')"), "drops what the assistant said"),
        (PLAIN.replace("<|im_end|>", " END "), "does not begin with a token of its own"),
        (PLAIN.replace("<|im_end|>\\n", ""), "does not begin with a token of its own"),
        ("{{ raise_exception('no assistants here') }}", "no assistants here"),
    ],
)
def test_a_template_without_turns_is_refused_at_once(source: str | None, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        template(source)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "answers", "reason"),
    [
        ("{{ messages | length }}" + PLAIN, USER, "renders earlier messages differently once a user message follows"),
        (PLAIN.replace("<|im_end|>", "' + ('<|im_end|>' if loop.last or m.role == 'user' else '') + '"), USER, DROPS),
        (PLAIN.replace("<|im_end|>", "' + ('<|im_end|>' if loop.last else '') + '"), USER, "renders earlier messages"),
        (PLAIN.replace("m.content", "(m.content if m.role != 'tool' else '')"), TOOLS, DROPS),
        (
            "{%- for m in messages if m.role == 'tool' -%}{{ raise_exception('no tools here') }}{%- endfor -%}" + PLAIN,
            TOOLS,
            "cannot render messages with the roles user, assistant, tool.*no tools here",
        ),
    ],
)
def test_a_template_that_cannot_be_continued_is_refused(source: str, answers: Any, reason: str) -> None:
    turns = template(source)
    with pytest.raises(ModelError, match=reason):
        turns.continuation(answers, ())


def test_a_tokenizer_that_merges_across_the_seam_is_refused() -> None:
    turns = TurnTemplate(tiny_tokenizer(words=["<|im_end|>\n<|im_start|>user"]))
    with pytest.raises(ModelError, match=r"merges '<\|im_end\|>' with what follows it"):
        turns.continuation(USER, ())
