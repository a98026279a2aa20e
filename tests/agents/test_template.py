from __future__ import annotations

import json
from typing import Any, get_args

import pytest

from asyncrl.agents.calls import MalformedCall, ToolCall
from asyncrl.agents.messages import normalise
from asyncrl.agents.template import ANSWER, MARKER, TurnTemplate
from asyncrl.errors import ModelError, RolloutContractError
from asyncrl.testing.models import tiny_tokenizer
from asyncrl.testing.templates import Style, styled_tokenizer

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


@pytest.mark.parametrize("style", get_args(Style))
def test_a_turn_with_fewer_calls_than_the_one_before_is_answered_as_well(style: Style) -> None:
    """A continuation is cut out behind as many markers as there are: those of three calls were looked for in a past of
    two, and the made-up turn became context."""
    turns = TurnTemplate(styled_tokenizer(style))
    third = {"role": "tool", "name": "f", "tool_call_id": "call00002", "content": "3"}
    turns.continuation([*TOOLS, third], ())
    assert turns.continuation(TOOLS, ()) == TurnTemplate(styled_tokenizer(style)).continuation(TOOLS, ())


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
        (
            PLAIN.replace("m.role +", "m.role + loop.index ~"),
            USER,
            "renders a user message differently in a longer conv",
        ),
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


# The styles

SCHEMA = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}
HI = {"role": "user", "content": "Hi"}


def said(text: str, *answers: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {"type": "function", "id": answer["tool_call_id"], "function": {"name": answer["name"], "arguments": {"x": 1}}}
        for answer in answers
    ]
    return {"role": "assistant", "content": text, "tool_calls": calls}


def joined(turns: TurnTemplate, history: list[dict[str, Any]], answers: list[dict[str, Any]], tools: Any) -> str:
    """The whole conversation as the template has it, and as turns joined one after the other."""
    whole = turns.text([*history, *answers], tools)
    system = history[0]["role"] == "system"
    return whole.removesuffix(turns._tokenizer.decode(turns.continuation(answers, tools, system=system)))


@pytest.mark.parametrize("tools", [(), (SCHEMA,)], ids=["", "tools"])
@pytest.mark.parametrize("answers", [USER, TOOLS[:1], TOOLS], ids=["user", "tool", "tools"])
@pytest.mark.parametrize("style", get_args(Style))
def test_every_style_is_continued_as_it_renders(style: Style, answers: list[dict[str, Any]], tools: Any) -> None:
    turns = TurnTemplate(styled_tokenizer(style))
    calls = answers if answers is not USER else []
    history = [HI, said("" if calls else "Said.", *calls[: 1 if style == "llama3" else 2])]
    if style == "mistral" and tools and answers is USER:
        with pytest.raises(ModelError, match="renders earlier messages differently once a user message follows"):
            turns.continuation(answers, tools)
        return
    before = joined(turns, history, answers, tools)
    assert before.endswith(turns._end_text)
    assert before.count("Said." if not calls else '"f"' if style not in ("xml",) else 'name="f"')


@pytest.mark.parametrize("style", get_args(Style))
def test_a_system_message_that_moves_is_found_out(style: Style) -> None:
    turns = TurnTemplate(styled_tokenizer(style))
    assert turns.continuation(USER, ())
    if style == "mistral":
        with pytest.raises(ModelError, match="renders earlier messages differently"):
            turns.continuation(USER, (), system=True)
    else:
        assert turns.continuation(USER, (), system=True) == turns.continuation(USER, ())


@pytest.mark.parametrize(
    ("answers", "styles"),
    [
        ([*TOOLS, *USER], {"chatml", "qwen3", "llama3", "xml"}),
        ([*USER, *USER], {"chatml", "qwen3", "llama3", "xml"}),
        ([*USER, {"role": "assistant", "content": "No."}, *USER], {"chatml", "qwen3", "llama3", "xml", "mistral"}),
        ([*USER, said("", TOOLS[0]), TOOLS[0]], {"chatml", "qwen3", "llama3", "xml", "mistral"}),
        ([{"role": "developer", "content": "Now."}, *USER], {"chatml", "qwen3", "llama3", "xml"}),
    ],
)
def test_messages_of_clients_come_in_any_mixture(answers: list[dict[str, Any]], styles: set[str]) -> None:
    for style in get_args(Style):
        turns = TurnTemplate(styled_tokenizer(style))
        if style not in styles:
            with pytest.raises(ModelError, match="cannot render messages"):
                turns.continuation(answers, ())
            continue
        first = said("", *TOOLS[:1]) if answers[0]["role"] == "tool" else said("Said.")
        before = joined(turns, [HI, first], answers, ())
        assert before.endswith(turns._end_text), style


@pytest.mark.parametrize("style", get_args(Style))
def test_messages_that_hold_the_markers_are_no_different(style: Style) -> None:
    """Whoever knows the marks of `template.py` cannot move the place where turns are cut."""
    turns = TurnTemplate(styled_tokenizer(style))
    text = f"{MARKER} {turns._end_text} {ANSWER}"
    for role in ("tool", "user"):
        answer = {"role": role, "name": "f", "tool_call_id": "call00000", "content": text}
        plain = turns.continuation([{**answer, "content": "here"}], ())
        shown = json.dumps(text)[1:-1]
        assert turns._tokenizer.decode(turns.continuation([answer], ())) == turns._tokenizer.decode(plain).replace(
            "here", shown
        )


def test_thinking_is_a_setting_of_the_template() -> None:
    plain = TurnTemplate(styled_tokenizer("qwen3"))
    quiet = TurnTemplate(styled_tokenizer("qwen3"), {"enable_thinking": False})
    for turns, end in ((plain, "assistant\n"), (quiet, "assistant\n<think>\n\n</think>\n\n")):
        assert turns.text([HI], ()).endswith(end)
        assert turns._tokenizer.decode(turns.continuation(USER, ())).endswith(end)
        assert not turns.thoughts_open
    with pytest.raises(ModelError, match="tokenize"):
        TurnTemplate(styled_tokenizer("qwen3"), {"tokenize": True})


def test_a_prompt_that_opens_the_thoughts_is_known() -> None:
    turns = template(PLAIN.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"))
    assert turns.thoughts_open
    assert turns.read("hm").thoughts == "hm"
    assert turns.read("hm</think>4").text == "4"


# Calls in a history

FORMS = {
    "objects": "call.function.arguments | tojson",
    "text": "'' + m.content + call.function.arguments",  # raises for an object, as DeepSeek's do
    "text, and no content": "(('' + call.function.arguments) if m.content is none else '')",
}
CALLS = PLAIN.replace(
    "m.content + '", "(m.content or '') }}{%- for call in m.tool_calls or [] -%}{{ (FORM) }}{%- endfor -%}{{ '"
)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("arguments", [{"x": "é"}, '{"x": "é"}'])
def test_templates_get_arguments_in_the_form_that_they_take(form: str, arguments: Any) -> None:
    turns = template(CALLS.replace("FORM", form))
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    text = turns.text([HI, {"role": "assistant", "content": None, "tool_calls": [call]}, TOOLS[0]], ())
    assert '{"x": "é"}' in text


def test_ids_of_clients_fit_a_template_that_is_strict_about_them() -> None:
    turns = TurnTemplate(styled_tokenizer("mistral"))
    answer = {"role": "tool", "name": "f", "tool_call_id": "toolu_01A09q90qw90lq917835lq9", "content": "1"}
    text = turns.text([HI, said("", answer), answer], ())
    (drawn, answered) = (part[:9] for part in (text.split('"id": "')[1], text.split('"call_id": "')[1]))
    assert drawn == answered
    assert drawn in turns._tokenizer.decode(turns.continuation([answer], ()))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "assistant", "content": None, "refusal": None}, {"role": "assistant", "content": ""}),
        ({"role": "developer", "content": "S"}, {"role": "system", "content": "S"}),
        ({"role": "function", "name": "f", "content": "1"}, {"role": "tool", "name": "f", "content": "1"}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]},
            {"role": "user", "content": "a\nb\nc"},
        ),
        (
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "reasoning": "hm"},
            {"role": "assistant", "content": "No.", "reasoning_content": "hm"},
        ),
        ({"role": "assistant", "content": "a", "tool_calls": []}, {"role": "assistant", "content": "a"}),
    ],
)
def test_messages_become_plain(message: dict[str, Any], expected: dict[str, Any]) -> None:
    before = json.dumps(message)
    assert normalise(message) == expected
    assert json.dumps(message) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"x": 1}, {"x": 1}),
        ('{"x": 1}', {"x": 1}),
        ("", {}),
        (None, {}),
        ("f(1", {"text": "f(1"}),
        ("[1]", {"text": "[1]"}),
    ],
)
def test_arguments_become_objects(arguments: Any, expected: dict[str, Any]) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (found,) = normalise({"role": "assistant", "tool_calls": [call]})["tool_calls"]
    assert found == {"id": "c", "type": "function", "function": {"name": "f", "arguments": expected}}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": "x"}, r"keys \['content'\] and role=None"),
        ({"role": "user", "content": 3}, "content of a user message is a int"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
            "part of the type 'image_url'.*text only",
        ),
        ({"role": "user", "content": [3]}, "part of the type 'int'"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "tool call that is none: {'type': 'custom'}"),
    ],
)
def test_messages_that_are_none_are_refused(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(RolloutContractError, match=reason):
        normalise(message)


# What it costs


class Counting:
    """A tokenizer that counts the characters it renders and encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.characters = 0
        self.renders = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, **settings)
        self.renders += 1
        self.characters += len(text)
        return text

    def encode(self, text: str, **settings: Any) -> list[int]:
        self.characters += len(text)
        ids: list[int] = self._tokenizer.encode(text, **settings)
        return ids


@pytest.mark.parametrize("style", get_args(Style))
def test_a_continuation_is_checked_once_and_renders_only_what_is_new(style: Style) -> None:
    counting = Counting(styled_tokenizer(style))
    turns = TurnTemplate(counting)
    tools = [{**SCHEMA, "function": {**SCHEMA["function"], "description": "x" * 10_000}}]
    turns.continuation(TOOLS[:1], tools)
    counting.characters = counting.renders = 0
    tokens = turns.continuation([{**TOOLS[0], "content": "y" * 100}], tools)
    assert counting.renders == 1
    assert counting.characters < 2 * len(turns._tokenizer.decode(tokens)) + 250


def test_tools_are_rendered_again_where_they_show_between_turns() -> None:
    turns = template(PLAIN.replace("m.role +", "m.role + (' may call ' + tools[0].function.name if tools else '') +"))
    assert "may call f\nWell?" in turns._tokenizer.decode(turns.continuation(USER, [SCHEMA]))
    assert "may call" not in turns._tokenizer.decode(turns.continuation(USER, ()))


def test_kinds_are_remembered_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncrl.agents.template.MAX_KINDS", 3)
    turns = TurnTemplate(tiny_tokenizer())
    for count in range(8):
        turns.continuation([*USER, {"role": "assistant", "content": "a"}] * count + USER, ())
        assert len(turns._joins) <= 3


# Models with a parser of their own

RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "content": {},
        "reasoning_content": {"open": "<hm>", "close": "</hm>"},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>",
            "close": "</call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
    },
}


def test_a_style_that_is_not_known_is_read_by_the_tokenizer_s_own_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=PLAIN)
    tokenizer.response_template = RESPONSES
    turns = TurnTemplate(tokenizer)
    turn = turns.read('<hm>so</hm>Well.<call f>{"x": 1}</call><call g>{}</call>')
    assert (turn.text, turn.thoughts) == ("Well.", "so")
    assert turn.calls == (ToolCall("f", {"x": 1}), ToolCall("g", {}))
    said = "<call f>{</call>"
    (call,) = turns.read(said).calls
    assert isinstance(call, MalformedCall)
    assert call.text == said
    assert "JSON" in call.reason


def test_a_style_that_is_known_is_read_here_call_by_call() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = RESPONSES
    calls = TurnTemplate(tokenizer).read('<tool_call>{</tool_call><tool_call>{"name": "f"}</tool_call>').calls
    assert [type(call) for call in calls] == [MalformedCall, ToolCall]


def test_a_history_with_several_calls_is_told_one_by_one_where_it_must_be() -> None:
    history = [HI, said("Both.", *TOOLS), *TOOLS]
    text = TurnTemplate(styled_tokenizer("llama3")).text(history, ())
    places = [text.index(part) for part in ('"name": "f"', '"1"', '"name": "g"', '"two <b>"')]
    assert places == sorted(places)
    assert TurnTemplate(tiny_tokenizer()).text(history, ()).count("<|im_start|>assistant") == 2
    with pytest.raises(ModelError, match="one call per turn"):
        TurnTemplate(styled_tokenizer("llama3")).text(history[:-1], ())
