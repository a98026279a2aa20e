"""The same small agent, written against each client: it asks, runs the tool that is called, and reads the answer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import openai
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, RunConfig, Runner
from agents import function_tool as agents_tool
from openai.lib.streaming.chat import ChatCompletionStreamState

import asyncrl
from asyncrl.agents.policy import Policy

QUESTION = "What is 2+3?"
SYSTEM = "Use the tool."


@asyncrl.tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@agents_tool(name_override="add", strict_mode=False)
def agents_add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


FUNCTION = add.schema["function"]


@contextlib.asynccontextmanager
async def openai_client(policy: Policy, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=policy.openai_base_url, api_key=policy.openai_api_key, **{"max_retries": 0, **options}
    ) as client:
        yield client


@contextlib.asynccontextmanager
async def anthropic_client(policy: Policy, **options: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(
        base_url=policy.anthropic_base_url, api_key=policy.openai_api_key, **{"max_retries": 0, **options}
    ) as client:
        yield client


async def chat_completions(policy: Policy, stream: bool) -> str:
    messages: list[Any] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
    async with openai_client(policy) as client:
        while True:
            asked: dict[str, Any] = {"model": "any", "messages": messages, "tools": [add.schema]}
            if stream:
                pieces = ChatCompletionStreamState()
                async for piece in await client.chat.completions.create(**asked, stream=True):
                    pieces.handle_chunk(piece)
                said = pieces.current_completion_snapshot.choices[0].message
            else:
                said = (await client.chat.completions.create(**asked)).choices[0].message
            messages.append(said)
            if not said.tool_calls:
                return str(said.content)
            for one in said.tool_calls:
                result = str(add(**json.loads(one.function.arguments)))
                messages.append({"role": "tool", "tool_call_id": one.id, "content": result})


async def responses(policy: Policy, stream: bool) -> str:
    """Sends the whole input each time; as a stream, only what is new, and the id of the response before."""
    history: list[Any] = [{"role": "user", "content": QUESTION}]
    previous: dict[str, Any] = {}
    tool: Any = {"type": "function", **FUNCTION}
    async with openai_client(policy) as client:
        while True:
            asked: dict[str, Any] = {"model": "any", "input": history, "instructions": SYSTEM, "tools": [tool]}
            if stream:
                async with client.responses.stream(**asked, **previous) as events:
                    response: Any = await events.get_final_response()
                history, previous = [], {"previous_response_id": response.id}
            else:
                response = await client.responses.create(**asked)
                history = [*history, *response.output]
            calls = [item for item in response.output if item.type == "function_call"]
            if not calls:
                return str(response.output_text)
            for one in calls:
                result = str(add(**json.loads(one.arguments)))
                history.append({"type": "function_call_output", "call_id": one.call_id, "output": result})


async def messages(policy: Policy, stream: bool) -> str:
    history: list[Any] = [{"role": "user", "content": QUESTION}]
    tool: Any = {
        "name": "add",
        "description": FUNCTION["description"],
        "input_schema": FUNCTION["parameters"],
    }
    async with anthropic_client(policy) as client:
        while True:
            asked: dict[str, Any] = {
                "model": "any",
                "max_tokens": 4000,
                "system": SYSTEM,
                "messages": history,
                "tools": [tool],
                "thinking": {"type": "enabled", "budget_tokens": 1024},
            }
            if stream:
                async with client.messages.stream(**asked) as events:
                    message: Any = await events.get_final_message()
            else:
                message = await client.messages.create(**asked)
            history.append({"role": "assistant", "content": message.content})
            if message.stop_reason != "tool_use":
                return str(message.content[-1].text)
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": str(add(**block.input))}
                for block in message.content
                if block.type == "tool_use"
            ]
            history.append({"role": "user", "content": results})


def framework(model: type[Any]) -> Callable[[Policy, bool], Awaitable[str]]:
    async def run(policy: Policy, stream: bool) -> str:
        agent = Agent(name="adder", instructions=SYSTEM, tools=[agents_add], model_settings=ModelSettings())
        async with openai_client(policy) as client:
            config = RunConfig(model=model(model="any", openai_client=client), tracing_disabled=True)
            if not stream:
                return str((await Runner.run(agent, QUESTION, run_config=config)).final_output)
            streamed = Runner.run_streamed(agent, QUESTION, run_config=config)
            async for _ in streamed.stream_events():
                pass
            return str(streamed.final_output)

    return run


AGENTS = {
    "openai chat": chat_completions,
    "openai responses": responses,
    "anthropic": messages,
    "openai-agents chat": framework(OpenAIChatCompletionsModel),
    "openai-agents responses": framework(OpenAIResponsesModel),
}
