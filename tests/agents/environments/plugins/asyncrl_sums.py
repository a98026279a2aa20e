"""A `verifiers` environment of one seat: sums, with a tool, played by a harness that is one loop around `openai`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

__all__ = ["LoopHarness", "SumsTaskset"]

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=2.0)
    async def right(self, task: SumsData, trace: vf.Trace) -> float:
        if trace.last_reply == "raise":
            raise ValueError("this reward is broken")
        return float(trace.last_reply == task.answer)

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class SumsTaskset(vf.Taskset[SumsTask, vf.TasksetConfig]):
    def load(self) -> Iterator[SumsTask]:
        for a in range(4):
            data = SumsData(prompt=f"{a}+1?", system_prompt="Answer with a number.", answer=str(a + 1))
            yield SumsTask(data, self.config.task)


class LoopHarness(vf.Harness[vf.HarnessConfig]):
    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [{"role": message.role, "content": message.content} for message in prompt]
        async with AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0) as client:
            while True:
                reply = await client.chat.completions.create(model=ctx.model, messages=messages, tools=[TOOL])
                message = reply.choices[0].message
                messages.append(message.model_dump(exclude_none=True))
                for call in message.tool_calls or []:
                    total = str(sum(json.loads(call.function.arguments).values()))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": total})
                if not message.tool_calls:
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
