from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from asyncrl import RecoverableRolloutError, tool
from asyncrl.agents.tools import Tool, ToolError


@dataclass
class Point:
    x: int
    y: int = 0


@tool
def search(query: str, limit: int = 5, *, kind: Literal["web", "news"] = "web", tags: list[str] | None = None) -> str:
    """Search the web.

    Newest first.

    Args:
        query: What to look for,
            in a few words.
        limit (int): How many hits.

    Returns:
        The hits.
    """
    return f"{query}/{limit}/{kind}/{tags}"


def untyped(x): ...  # type: ignore[no-untyped-def]


def star(*args: int) -> None: ...


def opaque(loop: asyncio.AbstractEventLoop) -> None: ...


@tool(timeout_s=0.05)
async def sleepy(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "rested"


def test_the_schema_is_made_from_signature_and_docstring() -> None:
    assert search.schema == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Search the web.\n\nNewest first.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "What to look for, in a few words."},
                    "limit": {"type": "integer", "default": 5, "description": "How many hits."},
                    "kind": {"type": "string", "enum": ["web", "news"], "default": "web"},
                    "tags": {
                        "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}],
                        "default": None,
                    },
                },
                "required": ["query"],
            },
        },
    }


def test_a_tool_without_parameters_has_an_empty_object() -> None:
    @tool
    def now() -> str:
        return "noon"

    assert now.schema["function"]["parameters"] == {"type": "object", "properties": {}}
    assert now.schema["function"]["description"] == ""


def test_limits_of_a_field_reach_the_schema_and_the_check() -> None:
    @tool
    def roll(sides: Annotated[int, Field(ge=2, description="Of the die.")]) -> str:
        return str(sides)

    assert roll.schema["function"]["parameters"]["properties"]["sides"] == {
        "type": "integer",
        "minimum": 2,
        "description": "Of the die.",
    }


def test_a_tool_is_still_the_function() -> None:
    assert search("a", kind="news") == "a/5/news/None"
    assert search.__name__ == "search"
    assert search.__doc__ is not None


def test_methods_are_tools_without_their_self() -> None:
    class Shop:
        def buy(self, item: str) -> str:
            return item

    assert list(Tool(Shop().buy).schema["function"]["parameters"]["properties"]) == ["item"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"needs a name.*'<lambda>'"),
        (untyped, "tool untyped: parameter 'x' has no type"),
        (star, r"tool star: found the parameter \*args"),
        (opaque, "tool opaque: its parameters cannot be checked"),
    ],
)
def test_a_function_that_cannot_be_a_tool_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ToolError, match=message):
        tool(function)


async def test_arguments_come_as_a_mapping_or_as_json() -> None:
    assert await search.call({"query": "a", "limit": "3"}) == "a/3/web/None"
    assert await search.call('{"query": "a", "tags": ["t"]}') == "a/5/web/['t']"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Error: bad arguments for search: query: Field required"),
        ({"query": "a", "limit": "many"}, "limit: Input should be a valid integer"),
        ({"query": "a", "colour": 1}, "colour: Extra inputs are not permitted"),
        ({"query": "a", "kind": "tv"}, "kind: Input should be 'web' or 'news'"),
        ("not json", "Error: bad arguments for search: arguments: Invalid JSON"),
        ("[1]", "Error: bad arguments for search: arguments: Input should be"),
        ("[" * 100_000, "Error: bad arguments for search: arguments: Invalid JSON"),
    ],
)
async def test_bad_arguments_are_an_answer_to_the_model(arguments: Any, message: str) -> None:
    result = await search.invoke(arguments)
    assert result.error
    assert message in result.text


async def test_what_a_tool_raises_is_an_answer_to_the_model() -> None:
    @tool
    def divide(a: int, b: int) -> float:
        return a / b

    assert await divide.call({"a": 1, "b": 2}) == "0.5"
    result = await divide.invoke({"a": 1, "b": 0})
    assert (result.text, result.error) == ("Error: ZeroDivisionError: division by zero", True)


async def test_errors_of_the_engine_are_raised() -> None:
    @tool
    def broken() -> str:
        raise RecoverableRolloutError("the sandbox is gone")

    with pytest.raises(RecoverableRolloutError):
        await broken.call({})


async def test_a_tool_that_takes_too_long_is_an_error_and_a_quick_one_is_not() -> None:
    assert await sleepy.call({"seconds": 0}) == "rested"
    result = await sleepy.invoke({"seconds": 60})
    assert (result.text, result.error) == ("Error: sleepy took longer than 0.05 s.", True)


async def test_a_synchronous_tool_that_hangs_is_given_up() -> None:
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hang() -> str:
        release.wait(60)
        return "late"

    assert await hang.call({}) == "Error: hang took longer than 0.05 s."
    release.set()


async def test_a_time_limit_of_its_own_is_the_tools_error_not_ours() -> None:
    @tool
    async def impatient() -> str:
        raise TimeoutError("upstream")

    assert await impatient.call({}) == "Error: TimeoutError: upstream"


async def test_synchronous_tools_leave_the_event_loop_free() -> None:
    meeting = threading.Barrier(2, timeout=30)

    @tool
    def meet() -> int:
        return meeting.wait()

    both = await asyncio.gather(meet.call({}), meet.call({}))  # one after the other they would never meet
    assert sorted(both) == ["0", "1"]


async def test_long_results_are_cut_and_say_so() -> None:
    @tool(max_output_chars=10)
    def shout(loud: bool) -> str:
        if loud:
            raise ValueError("x" * 100)
        return "y" * 100

    assert await shout.call({"loud": False}) == "y" * 10 + "\n[cut: 10 of 100 characters]"
    assert (await shout.call({"loud": True})).startswith("Error: Val\n[cut: 10 of ")


async def test_results_that_are_no_text_become_json() -> None:
    @tool
    def where(point: Point) -> dict[str, Any]:
        return {"point": point, "far": None}

    assert await where.call({"point": {"x": 1}}) == '{"point":{"x":1,"y":0},"far":null}'
