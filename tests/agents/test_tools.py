from __future__ import annotations

import asyncio
import itertools
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import structlog
from pydantic import BaseModel, Field

from asyncrl import RecoverableRolloutError, tool
from asyncrl.agents import tools
from asyncrl.agents.tool_schema import Signature, signature_of, without_titles
from asyncrl.agents.tools import Tool, ToolError, collect_tools
from asyncrl.data import Prompt


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


async def stream() -> AsyncIterator[str]:
    yield "part"


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


def test_a_schema_of_a_server_may_be_just_true() -> None:
    """Servers written in Go say so of an argument of any type."""
    schema = {"title": "T", "properties": {"x": True, "y": {"title": "Y", "type": "string"}}, "$defs": None}
    assert without_titles(schema) == {"properties": {"x": True, "y": {"type": "string"}}, "$defs": None}


def test_a_tool_is_still_the_function() -> None:
    assert search("a", kind="news") == "a/5/news/None"
    assert search.__name__ == "search"
    assert search.__doc__ is not None


class Shop:
    """A stateful object, as one is made for each rollout."""

    def __init__(self) -> None:
        self.sold: list[str] = []

    @tool
    def buy(self, item: str) -> str:
        """Buy one item."""
        self.sold.append(item)
        return f"{item}: {len(self.sold)} sold"

    @tool(timeout_s=5)
    async def ask(self, question: str = "when") -> str:
        return f"{question}? {len(self.sold)} sold"

    @tool
    @staticmethod
    def hours() -> str:
        return "nine to five"

    def close(self, reason: str) -> str:
        """Not marked, so not for the model, unless it is given by itself."""
        return reason


async def test_an_object_gives_its_marked_methods_bound_to_it() -> None:
    one, other = Shop(), Shop()
    found = collect_tools([one])
    assert list(found) == ["buy", "ask", "hours"]
    assert found["ask"].timeout_s == 5
    assert list(found["buy"].schema["function"]["parameters"]["properties"]) == ["item"]
    assert found["buy"].schema["function"]["description"] == "Buy one item."
    assert await found["buy"].call({"item": "tea"}) == "tea: 1 sold"
    assert await other.buy.call({"item": "tea"}) == "tea: 1 sold", "each object has its own state"
    assert await found["ask"].call({}) == "when? 1 sold"
    assert await found["hours"].call({}) == "nine to five"
    assert one.buy("milk") == "milk: 2 sold", "for Python it is still a method"
    assert list(collect_tools([one.buy, one.close])) == ["buy", "close"]


async def test_a_method_without_its_object_is_refused() -> None:
    with pytest.raises(ToolError, match=r"tool buy is a method. Give it with its object, as `shop\.buy`"):
        collect_tools([Shop.buy])
    with pytest.raises(ToolError, match="method without its object"):
        await Shop.buy.call({"item": "tea"})
    with pytest.raises(ToolError, match=r"Shop is a class with tools. Give an object of it: `Shop\(\.\.\.\)`"):
        collect_tools([Shop])


@pytest.mark.parametrize(
    "given", [tool(Shop().buy), None, "buy", {"name": "buy"}], ids=["tool", "None", "text", "dict"]
)
def test_what_is_no_list_of_tools_is_refused(given: Any) -> None:
    with pytest.raises(ToolError, match=r"tools is .*Expected a list of tools"):
        collect_tools(given)


@pytest.mark.parametrize("limit", [{"timeout_s": None}, {"timeout_s": 0}, {"max_output_chars": -1}], ids=str)
def test_a_limit_that_is_none_is_refused_when_the_tool_is_made(limit: Any) -> None:
    with pytest.raises(ToolError, match=f"{next(iter(limit))} of a tool is .*Expected a number above 0"):
        tool(**limit)(Shop().close)


def test_two_tools_of_one_name_are_refused() -> None:
    assert list(collect_tools([search, search])) == ["search"]
    with pytest.raises(ToolError, match="two tools are called 'buy'"):
        collect_tools([Shop(), Shop().buy])


def test_a_signature_is_built_once_for_all_functions_of_its_code() -> None:
    def closure(step: int, start: Any = 1) -> Tool[..., Any]:
        @tool
        def move(steps: int = step, first: int = start) -> str:
            return str(steps)

        return move

    assert closure(1).signature is closure(1).signature
    assert Tool(Shop().close).signature is Tool(Shop().close).signature
    assert Shop().buy.signature is Shop().buy.signature
    assert closure(2).schema["function"]["parameters"]["properties"]["steps"]["default"] == 2, "a new default is seen"
    assert closure(2, True).schema["function"]["parameters"]["properties"]["first"]["default"] is True
    move = closure(2)
    move.function.__doc__ = "Another text."
    assert signature_of(move.function).description == "Another text."


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"needs a name.*'<lambda>'"),
        (untyped, "tool untyped: parameter 'x' has no type"),
        (star, r"tool star: found the parameter \*args"),
        (opaque, "tool opaque: its parameters cannot be checked"),
        (stream, "tool stream: it yields"),
        (classmethod(untyped), "a tool is a function, found <classmethod"),
        (object(), "a tool is a function, found <object.*or an object with methods marked"),
        ({"type": "function"}, r"a tool is a function, found \{'type'"),
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


async def test_synchronous_tools_that_hang_starve_themselves_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "TOOL_THREADS", 2)
    release = threading.Event()

    @tool(timeout_s=0.05)
    def hang() -> str:
        release.wait(60)
        return "late"

    late = "Error: hang took longer than 0.05 s."
    assert await asyncio.gather(hang.call({}), hang.call({})) == [late, late]
    assert await hang.call({}) == (
        "Error: all 2 threads for hang are held by calls that took too long and have not ended."
    )
    assert await search.call({"query": "a"}) == "a/5/web/None"
    release.set()
    async with asyncio.timeout(30):
        while await hang.call({}) != "late":  # noqa: ASYNC110 - a thread sets no event of the loop
            await asyncio.sleep(0.01)


def test_a_thread_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    code = """
import asyncio, threading, asyncrl

@asyncrl.tool(timeout_s=0.05)
def hang() -> None:
    threading.Event().wait()

print(asyncio.run(hang.call({})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "Error: hang took longer than 0.05 s.\n"


async def test_an_async_tool_that_ignores_its_cancellation_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "CANCEL_GRACE_S", 0.05)
    release = asyncio.Event()

    @tool(timeout_s=0.05)
    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    with structlog.testing.capture_logs() as logs:
        assert await stubborn.call({}) == "Error: stubborn took longer than 0.05 s."
    assert logs[0]["event"] == "a call ignores its cancellation and is left behind"
    release.set()


async def test_the_cancellation_of_a_rollout_reaches_its_tool_and_goes_on() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    @tool
    async def wait() -> None:
        begun.set()
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.set()

    call = asyncio.create_task(wait.call({}))
    await begun.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


FAULTS = {
    "SystemExit": SystemExit(2),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit("gone"),
    "CancelledError": asyncio.CancelledError(),
    "StopIteration": StopIteration("done"),
    "ValueError": BaseExceptionGroup("several", [ExceptionGroup("inner", [ValueError("first")]), SystemExit(1)]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_whatever_a_tool_raises_ends_there(fault: str, kind: str) -> None:
    @tool
    def explode() -> str:
        raise FAULTS[fault]

    @tool
    async def implode() -> str:
        raise FAULTS[fault]

    result = await (explode if kind == "sync" else implode).invoke({})
    assert result.error
    # PEP 479: no coroutine raises StopIteration.
    assert result.text.startswith(
        "Error: RuntimeError" if (fault, kind) == ("StopIteration", "async") else f"Error: {fault}"
    )


async def test_a_tool_that_cancels_its_own_task_harms_its_call_alone() -> None:
    @tool
    async def suicidal() -> str:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return "alive"

    assert await suicidal.call({}) == "Error: CancelledError"


async def test_an_error_whose_message_cannot_be_read_is_named() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise SystemExit("no comment")

    @tool
    def fail() -> str:
        raise Mute

    assert await fail.call({}) == "Error: Mute: (its message cannot be read: SystemExit)"


async def test_the_log_tells_once_of_what_a_tool_raises_and_where() -> None:
    @tool
    def divide(a: int) -> float:
        return 1 / a

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            await divide.call({"a": 0})
    assert [(entry["tool"], entry["error"]) for entry in logs] == [
        ("divide", "Error: ZeroDivisionError: division by zero")
    ]
    assert "test_tools.py:" in logs[0]["where"]


async def test_it_tells_once_of_a_tool_that_is_made_for_each_rollout() -> None:
    async def fail() -> None:
        raise OSError("gone")

    with structlog.testing.capture_logs() as logs:
        for _ in range(3):  # as those of an MCP server are
            await Tool(fail, signature=Signature("fail", "", {}, dict)).call({})
    assert len(logs) == 1


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


class Colour(str, Enum):  # noqa: UP042 - not a StrEnum, whose `str` is its value
    RED = "red"


class Report(BaseModel):
    title: str
    lines: int = 2


def endless() -> Iterator[int]:
    yield from itertools.count()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (b"caf\xc3\xa9 \xff", "café \ufffd"),
        (Colour.RED, "red"),
        ("half a \ud83d pair", "half a ? pair"),
        (["half a \ud83d pair"], '["half a ? pair"]'),
        (Point(1), '{"x":1,"y":0}'),
        ({"report": Report(title="a")}, '{"report":{"title":"a","lines":2}}'),
        ((step for step in (1, 2)), "[1,2]"),
        ({Point: {1}}, "{\"<class 'tests.agents.test_tools.Point'>\":[1]}"),
        (object, "\"<class 'object'>\""),
        (float("nan"), "NaN"),
        ([np.float32(2.5), np.int64(3)], "[2.5,3]"),
    ],
)
async def test_results_of_every_kind(value: Any, text: str) -> None:
    @tool
    async def give() -> Any:
        return value

    assert await give.call({}) == text


HUGE = 100_000_000


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: "x" * HUGE, "xxxxxxxxxx\n[cut: 10 of 100000000 characters]"),
        (lambda: b"x" * HUGE, "xxxxxxxxxx\n[cut: 10 of more characters]"),
        (lambda: {"a": "x" * HUGE}, '{"a":"xxxx\n[cut: 10 of more characters]'),
        (lambda: [["é" * HUGE]], '[["ééééééé\n[cut: 10 of more characters]'),
        (lambda: [0] * HUGE, "[0,0,0,0,0\n[cut: 10 of more characters]"),
        (endless, "[0,1,2,3,4\n[cut: 10 of more characters]"),
    ],
)
async def test_of_a_huge_result_only_the_beginning_is_looked_at(make: Any, text: str) -> None:
    value = make()

    @tool(max_output_chars=10, timeout_s=30)
    async def give() -> Any:
        return value

    assert await give.call({}) == text


async def test_what_contains_itself_is_an_error_to_the_model() -> None:
    knot: list[Any] = []
    knot.append(knot)

    @tool
    def give() -> Any:
        return knot

    assert (await give.call({})).startswith("Error: RecursionError")


async def test_the_code_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speak: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "documented.py").write_text("\n".join(blocks), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    docs = import_module("documented")
    assert float(await docs.convert.call({"amount": 2})) == 2.2
    assert await docs.factor.call({"number": 60}) == "[2,2,3,5]"
    sell = '<tool_call>\n{"name": "sell", "arguments": {"item": "tea"}}\n</tool_call>'
    policy, _ = speak(f"{sell}{sell}<|im_end|>", "Done.<|im_end|>")
    sample = await docs.sell_two(Prompt({}, policy=policy, index=0))
    assert sample.reward == 1.0
