from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import jinja2
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.testing.models import tiny_model
from asyncrl.testing.templates import Style, styled_tokenizer

STYLES = get_args(Style)
TOOL = {"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object"}}}


def call(number: int = 0) -> dict[str, Any]:
    return {"type": "function", "id": f"call{number:05d}", "function": {"name": "f", "arguments": {"x": 1}}}


def result(number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "content": "Found."}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, "tool_calls": list(calls), **more}


def render(style: Style, *messages: dict[str, Any], tools: bool = False, **kwargs: Any) -> str:
    text: str = styled_tokenizer(style).apply_chat_template(
        list(messages), tools=[TOOL] if tools else None, add_generation_prompt=True, tokenize=False, **kwargs
    )
    return text


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_with_a_tool_shows_all_of_it_in_order(style: Style) -> None:
    text = render(style, user("Question?"), said("", call()), result(), said("Answer."), user("More?"), tools=True)
    places = [
        text.index(part) for part in ("Question?", '{"x": 1}' if style != "xml" else "<x>1</x>", "Found.", "Answer.")
    ]
    assert places == sorted(places)
    assert text.index("F.") < text.index("More?")


@pytest.mark.parametrize("style", STYLES)
def test_the_model_that_goes_with_it_stops_at_the_end_of_a_turn(style: Style, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, tokenizer=styled_tokenizer(style), hidden=32, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    text = tokenizer.apply_chat_template([user("Hi"), said("Said.")], tokenize=False)
    assert text.rstrip("\n").endswith("Said." + tokenizer.eos_token)
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.encode(tokenizer.eos_token)[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_qwen3_forgets_thoughts_once_the_user_speaks() -> None:
    working = (user("Q"), said("", call(), reasoning_content="hm"), result())
    assert "<think>\nhm\n</think>" in render("qwen3", *working)
    assert "hm" not in render("qwen3", *working, said("<think>\nhm\n</think>\n\nA"), user("More?"))


def test_qwen3_without_thinking_begins_with_an_empty_thought() -> None:
    assert render("qwen3", user("Q")).endswith("assistant\n")
    assert render("qwen3", user("Q"), enable_thinking=False).endswith("assistant\n<think>\n\n</think>\n\n")


def test_llama3_takes_one_call_per_turn_and_trims() -> None:
    with pytest.raises(jinja2.TemplateError, match="one call per turn"):
        render("llama3", user("Q"), said("", call(0), call(1)))
    assert "\n\nQ<|eot_id|>" in render("llama3", user("  Q\n"))
    assert "<|python_tag|>f.call(x=1)<|eom_id|>" in render("llama3", user("Q"), said("", call()), builtin_tools=["f"])


def test_mistral_keeps_tools_and_system_with_the_last_question() -> None:
    system = {"role": "system", "content": "Be brief."}
    text = render("mistral", system, user("Q1"), said("A1"), user("Q2"), tools=True)
    assert text.startswith("<s>[INST] Q1[/INST] A1</s>[AVAILABLE_TOOLS]")
    assert text.endswith("[INST] Be brief.\n\nQ2[/INST]")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ((user("Q"), user("Q")), "take turns"),
        ((said("A"),), "take turns"),
        ((user("Q"), said("", {**call(), "id": "call_1"})), "nine letters or digits"),
        ((user("Q"), said("", call()), {"role": "tool", "content": "Found."}), "nine letters or digits"),
        ((user("Q"), {"role": "critic", "content": "No."}), "Roles are"),
    ],
)
def test_mistral_is_strict(messages: tuple[dict[str, Any], ...], reason: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=reason):
        render("mistral", *messages)
