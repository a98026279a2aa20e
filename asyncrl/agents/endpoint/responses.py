"""`POST /v1/responses`, as the OpenAI API has it.

A response is remembered as long as its rollout lasts, so that `previous_response_id` can go on from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import PositiveInt

from asyncrl.agents.endpoint.refusal import Refusal
from asyncrl.agents.endpoint.request import (
    Ask,
    Event,
    Json,
    Reply,
    Request,
    function_schema,
    new_id,
    readable,
)
from asyncrl.agents.messages import Message

BEGUN = ("response.created", "response.in_progress")


class Responses(Request):
    """One turn after a list of items: messages, calls, results and thoughts side by side."""

    refused: ClassVar[Mapping[str, str]] = {
        "background": "ask without it and wait.",
        "conversation": "use previous_response_id, or send the whole input.",
        "prompt": "write the prompt into instructions and input.",
        "top_logprobs": "the sampler keeps the log-probs of drawn tokens alone.",
    }
    ignored: ClassVar[Mapping[str, Any]] = {"tool_choice": "auto", "truncation": "disabled", "context_management": None}

    input: str | list[Json] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Json] | None = None
    max_output_tokens: PositiveInt | None = None
    include: list[str] | None = None
    text: Json | None = None
    parallel_tool_calls: bool | None = True
    metadata: Json | None = None

    def ask(self, past: Mapping[str, Sequence[Message]]) -> Ask:
        history = self._history(past)
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        opening = [{"role": "system", "content": self.instructions}] if self.instructions else []
        tools = [] if self._tool_choice == "none" else self.tools or []
        return Ask(
            messages=readable([*opening, *_read_items(items, history)]),
            tools=[_read_tool(tool, f"tools.{place}") for place, tool in enumerate(tools)],
            max_tokens=self.max_output_tokens,
            logprobs="message.output_text.logprobs" in (self.include or ()),
        )

    def _history(self, past: Mapping[str, Sequence[Message]]) -> Sequence[Message]:
        if self.previous_response_id is None:
            return ()
        if self.previous_response_id not in past:
            raise Refusal(
                404,
                f"there is no response {self.previous_response_id!r} in this rollout.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        # Instructions hold for one response alone, as there.
        return [message for message in past[self.previous_response_id] if message["role"] != "system"]

    @property
    def _tool_choice(self) -> Any:
        return (self.model_extra or {}).get("tool_choice") or "auto"

    def unheard(self, params: Any) -> Iterator[tuple[str, Any]]:
        yield from super().unheard(params)
        style = (self.text or {}).get("format") or {}
        if (style.get("type", "text") if isinstance(style, Mapping) else style) != "text":
            yield "text.format", style

    def answer(self, ask: Ask, replies: Sequence[Reply]) -> Json:
        (reply,) = replies
        cut = reply.finish == "length"
        return {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "error": None,
            "model": self.model,
            "instructions": self.instructions,
            "output": _items(reply, "incomplete" if cut else "completed"),
            "previous_response_id": self.previous_response_id,
            "tools": self.tools or [],
            "tool_choice": self._tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "max_output_tokens": self.max_output_tokens,
            "text": self.text or {"format": {"type": "text"}},
            "metadata": self.metadata or {},
            "usage": {
                "input_tokens": reply.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": reply.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": reply.prompt_tokens + reply.completion_tokens,
            },
        }

    def events(self, answer: Json) -> Iterator[Event]:
        begun = {**answer, "status": "in_progress", "output": [], "incomplete_details": None, "usage": None}
        steps = [(name, {"response": begun}) for name in BEGUN]
        for index, item in enumerate(answer["output"]):
            steps += _item_steps(index, item)
        # Also for a turn that was cut, whose status says so: clients wait for this event, and a policy is often cut.
        steps.append(("response.completed", {"response": answer}))
        for number, (name, data) in enumerate(steps):
            yield Event(name, {"type": name, "sequence_number": number, **data})

    def failure(self, refusal: Refusal) -> Event:
        error = refusal.openai()["error"]
        return Event("error", {"type": "error", "sequence_number": 0, "error": error, **error})


def _read_items(items: Sequence[Any], history: Sequence[Message]) -> list[Json]:
    """Items as messages. What the policy said in one turn (thoughts, a message, calls) becomes one message again."""
    messages = [dict(message) for message in history]
    for place, item in enumerate(items):
        _read_item(item, f"input.{place}", messages)
    return messages


def _read_item(item: Any, where: str, messages: list[Json]) -> None:
    kind = item.get("type", "message") if isinstance(item, dict) else type(item).__name__
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    match kind:
        case "message" if item.get("role") == "assistant":
            silent = last is not None and not last["content"] and "tool_calls" not in last
            turn = last if last is not None and silent else _new_turn(messages)
            turn["content"] = item.get("content")
        case "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        case "reasoning":
            parts = [*(item.get("summary") or ()), *(item.get("content") or ())]
            _new_turn(messages)["reasoning_content"] = "".join(
                str(part.get("text", "")) for part in parts if isinstance(part, Mapping)
            )
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            turn = last if last is not None else _new_turn(messages)
            turn["tool_calls"] = [*turn.get("tool_calls", ()), call]
        case "function_call_output":
            result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            messages.append(result)
        case _:
            raise Refusal(
                400, f"{where} is of type {kind!r}: the policy reads messages, calls and results.", param=where
            )


def _new_turn(messages: list[Json]) -> Json:
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _read_tool(tool: Json, where: str) -> Json:
    if tool.get("type") != "function":
        raise Refusal(400, f"{where} is of type {tool.get('type')!r}: the policy calls functions only.", param=where)
    return function_schema(tool.get("name"), tool.get("description"), tool.get("parameters"), where)


def _items(reply: Reply, status: str) -> list[Json]:
    items: list[Json] = []
    if reply.thoughts:
        thoughts = {"type": "reasoning_text", "text": reply.thoughts}
        items.append({"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": [thoughts], "status": status})
    if reply.text or not reply.calls:
        logprobs = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in reply.logprobs
        ]
        part = {"type": "output_text", "text": reply.text, "annotations": [], "logprobs": logprobs}
        message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": status, "content": [part]}
        items.append(message)
    items += [
        {
            "id": new_id("fc_"),
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": call.arguments,
            "status": status,
        }
        for call in reply.calls
    ]
    return items


def _item_steps(index: int, item: Json) -> list[tuple[str, Json]]:
    """The events that build one item up."""
    place = {"item_id": item["id"], "output_index": index}
    part_place = {**place, "content_index": 0}
    begun = {**item, "status": "in_progress"}
    done = ("response.output_item.done", {"output_index": index, "item": item})
    if item["type"] == "function_call":
        name, arguments = item["name"], item["arguments"]
        return [
            ("response.output_item.added", {"output_index": index, "item": {**begun, "arguments": ""}}),
            ("response.function_call_arguments.delta", {**place, "delta": arguments}),
            ("response.function_call_arguments.done", {**place, "name": name, "arguments": arguments}),
            done,
        ]
    (part,) = item["content"]
    text = part["text"]
    added = ("response.output_item.added", {"output_index": index, "item": {**begun, "content": []}})
    if item["type"] == "reasoning":
        return [
            added,
            ("response.reasoning_text.delta", {**part_place, "delta": text}),
            ("response.reasoning_text.done", {**part_place, "text": text}),
            done,
        ]
    return [
        added,
        ("response.content_part.added", {**part_place, "part": {**part, "text": "", "logprobs": []}}),
        ("response.output_text.delta", {**part_place, "delta": text, "logprobs": part["logprobs"]}),
        ("response.output_text.done", {**part_place, "text": text, "logprobs": part["logprobs"]}),
        ("response.content_part.done", {**part_place, "part": part}),
        done,
    ]
