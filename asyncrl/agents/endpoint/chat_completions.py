"""`POST /v1/chat/completions`, as the OpenAI API has it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt

from asyncrl.agents.endpoint.refusal import Refusal
from asyncrl.agents.endpoint.request import (
    MAX_CHOICES,
    Ask,
    Event,
    Json,
    Reply,
    Request,
    as_tuple,
    function_schema,
    new_id,
    readable,
    smaller,
)
from asyncrl.agents.messages import Message

DONE = Event(None, "[DONE]")


class ChatCompletions(Request):
    """One turn, or `n` of them, after a list of messages."""

    refused: ClassVar[Mapping[str, str]] = {
        "functions": "give the functions as tools.",
        "audio": "the policy writes text only.",
        "top_logprobs": "the sampler keeps the log-probs of drawn tokens alone; logprobs=true gives those.",
        "web_search_options": "give the agent a search tool of its own.",
    }
    ignored: ClassVar[Mapping[str, Any]] = {
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "chat_template_kwargs": {},
        "tool_choice": "auto",
    }

    messages: Annotated[list[Json], Field(min_length=1)]
    tools: list[Json] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    stop: str | list[str] | None = None
    logprobs: bool | None = False
    stream_options: Json | None = None

    def ask(self, past: Mapping[str, Sequence[Message]]) -> Ask:
        tools = [] if self.wants_no_calls() else self.tools or []
        return Ask(
            messages=readable(self.messages),
            tools=[_read_tool(tool, f"tools.{place}") for place, tool in enumerate(tools)],
            n=self.n or 1,
            max_tokens=smaller(self.max_tokens, self.max_completion_tokens),
            stop=as_tuple(self.stop),
            logprobs=bool(self.logprobs),
        )

    def wants_no_calls(self) -> bool:
        return (self.model_extra or {}).get("tool_choice") == "none"

    def answer(self, ask: Ask, replies: Sequence[Reply]) -> Json:
        prompt = sum(reply.prompt_tokens for reply in replies[:1])
        drawn = sum(reply.completion_tokens for reply in replies)
        return {
            "id": new_id("chatcmpl-"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"policy-v{replies[0].version}",
            "choices": [_choice(place, reply, ask.logprobs) for place, reply in enumerate(replies)],
            "usage": {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn},
        }

    def events(self, answer: Json) -> Iterator[Event]:
        def chunk(choices: list[Json], usage: Json | None = None) -> Event:
            head = {**answer, "object": "chat.completion.chunk", "choices": choices}
            return Event(None, {**head, "usage": usage})

        for choice in answer["choices"]:
            for delta in _deltas(choice["message"]):
                yield chunk([{"index": choice["index"], "delta": delta, "logprobs": None, "finish_reason": None}])
            end = {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
            yield chunk([{**end, "logprobs": choice["logprobs"]}])
        if (self.stream_options or {}).get("include_usage"):
            yield chunk([], answer["usage"])
        yield DONE


def _read_tool(tool: Json, where: str) -> Json:
    if tool.get("type", "function") != "function" or not isinstance(function := tool.get("function"), dict):
        raise Refusal(400, f"{where} is of type {tool.get('type')!r}: the policy calls functions only.", param=where)
    return function_schema(function.get("name"), function.get("description"), function.get("parameters"), where)


def _choice(place: int, reply: Reply, logprobs: bool) -> Json:
    message: Json = {"role": "assistant", "content": reply.text or (None if reply.calls else ""), "refusal": None}
    if reply.thoughts:
        message["reasoning_content"] = reply.thoughts
    if reply.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in reply.calls
        ]
    finish = "tool_calls" if reply.calls and reply.finish == "stop" else reply.finish
    return {
        "index": place,
        "message": message,
        "logprobs": {"content": [_token(*token) for token in reply.logprobs], "refusal": None} if logprobs else None,
        "finish_reason": finish,
    }


def _token(text: str, logprob: float) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}


def _deltas(message: Json) -> Iterator[Json]:
    yield {"role": "assistant", "content": ""}
    if thoughts := message.get("reasoning_content"):
        yield {"reasoning_content": thoughts}
    if message["content"]:
        yield {"content": message["content"]}
    for index, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        yield {"tool_calls": [{**call, "index": index, "function": {"name": function["name"], "arguments": ""}}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": function["arguments"]}}]}
