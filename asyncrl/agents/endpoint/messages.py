"""`POST /v1/messages`, as Anthropic's API has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from asyncrl.agents.endpoint.refusal import Refusal
from asyncrl.agents.endpoint.request import (
    Ask,
    Event,
    Json,
    Reply,
    Request,
    as_tuple,
    function_schema,
    new_id,
    readable,
)
from asyncrl.agents.messages import Message

NO_CALLS = {"type": "none"}


class Messages(Request):
    """One turn after a list of messages, whose contents are blocks."""

    refused: ClassVar[Mapping[str, str]] = {
        "mcp_servers": "connect the agent to the MCP servers and give their tools as tools.",
        "container": "there is none here.",
    }
    ignored: ClassVar[Mapping[str, Any]] = {"output_config": {}, "output_format": None}
    ping: ClassVar[bytes] = Event("ping", {"type": "ping"}).encode()

    messages: Annotated[list[Json], Field(min_length=1)]
    max_tokens: PositiveInt | None = None
    system: str | list[Json] | None = None
    tools: list[Json] | None = None
    tool_choice: Json | None = None
    stop_sequences: list[str] | None = None
    thinking: Json | None = None

    def ask(self, past: Mapping[str, Sequence[Message]]) -> Ask:
        messages: list[Json] = [{"role": "system", "content": self.system}] if self.system else []
        for place, message in enumerate(self.messages):
            messages += _read_message(message, f"messages.{place}")
        tools = [] if self.tool_choice == NO_CALLS else self.tools or []
        return Ask(
            messages=readable(messages),
            tools=[_read_tool(tool, f"tools.{place}") for place, tool in enumerate(tools)],
            max_tokens=self.max_tokens,
            stop=as_tuple(self.stop_sequences),
        )

    def answer(self, ask: Ask, replies: Sequence[Reply]) -> Json:
        (reply,) = replies
        return {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": _blocks(reply, thoughts=(self.thinking or {}).get("type") in ("enabled", "adaptive")),
            "stop_reason": _stop_reason(reply),
            "stop_sequence": reply.stop,
            "usage": {
                "input_tokens": reply.prompt_tokens,
                "output_tokens": reply.completion_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
            },
        }

    def events(self, answer: Json) -> Iterator[Event]:
        opening = {**answer, "content": [], "stop_reason": None, "stop_sequence": None}
        opening["usage"] = {**answer["usage"], "output_tokens": 0}
        yield _event("message_start", message=opening)
        for index, block in enumerate(answer["content"]):
            empty, deltas = _pieces(block)
            yield _event("content_block_start", index=index, content_block=empty)
            for delta in deltas:
                yield _event("content_block_delta", index=index, delta=delta)
            yield _event("content_block_stop", index=index)
        end = {"stop_reason": answer["stop_reason"], "stop_sequence": answer["stop_sequence"]}
        yield _event("message_delta", delta=end, usage=answer["usage"])
        yield _event("message_stop")

    def failure(self, refusal: Refusal) -> Event:
        return Event("error", refusal.anthropic())


def _event(kind: str, **data: Any) -> Event:
    return Event(kind, {"type": kind, **data})


def _read_message(message: Json, where: str) -> list[Json]:
    """One message as some: results come in the user's message there, and are messages of their own here."""
    role, content = message.get("role"), message.get("content")
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if role == "assistant":
        return [_assistant(blocks)]
    if role not in ("user", "system"):
        raise Refusal(400, f"{where}: expected the role user or assistant, found {role!r}.", param=where)
    results = [
        {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": block.get("content")}
        for block in blocks
        if _kind(block) == "tool_result"
    ]
    said = [block for block in blocks if _kind(block) != "tool_result"]
    return [*results, {"role": role, "content": said}] if said else results


def _kind(block: Any) -> Any:
    return block.get("type") if isinstance(block, dict) else None


def _assistant(blocks: Sequence[Any]) -> Json:
    silent = ("thinking", "redacted_thinking", "tool_use")
    message: Json = {"role": "assistant", "content": [block for block in blocks if _kind(block) not in silent]}
    if thoughts := [str(block.get("thinking")) for block in blocks if _kind(block) == "thinking"]:
        message["reasoning_content"] = "".join(thoughts)
    if calls := [block for block in blocks if _kind(block) == "tool_use"]:
        message["tool_calls"] = [
            {
                "id": call.get("id"),
                "type": "function",
                "function": {"name": call.get("name"), "arguments": call.get("input")},
            }
            for call in calls
        ]
    return message


def _read_tool(tool: Json, where: str) -> Json:
    kind = tool.get("type", "custom")
    if kind != "custom":
        raise Refusal(
            400, f"{where} is of type {kind!r}: the policy calls tools with an input_schema only.", param=where
        )
    return function_schema(tool.get("name"), tool.get("description"), tool.get("input_schema"), where)


def _blocks(reply: Reply, *, thoughts: bool) -> list[Json]:
    """Thoughts only for those who asked for them, as there: others take the first block to be text."""
    blocks: list[Json] = []
    if thoughts and reply.thoughts:
        blocks.append({"type": "thinking", "thinking": reply.thoughts, "signature": "policy"})
    if reply.text or not reply.calls:
        blocks.append({"type": "text", "text": reply.text})
    blocks += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in reply.calls
    ]
    return blocks


def _pieces(block: Json) -> tuple[Json, list[Json]]:
    """A block as it begins, and what is then added to it."""
    match block["type"]:
        case "thinking":
            signature = {"type": "signature_delta", "signature": block["signature"]}
            said = {"type": "thinking_delta", "thinking": block["thinking"]}
            return {**block, "thinking": "", "signature": ""}, [said, signature]
        case "tool_use":
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
    return {**block, "text": ""}, [{"type": "text_delta", "text": block["text"]}]


def _stop_reason(reply: Reply) -> str:
    if reply.stop is not None:
        return "stop_sequence"
    if reply.finish == "length":
        return "max_tokens"
    return "tool_use" if reply.calls else "end_turn"
