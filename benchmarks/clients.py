"""Do agents learn through other people's clients what they learn natively? The demo's calculator agent, five times.

    python benchmarks/clients.py [--steps 80] [--only openai anthropic]

One start model; then each client, unmodified, trains it: asyncrl's own chat, the `openai` package (chat completions),
the `anthropic` package, and `openai-agents` (the Responses API). Prints the held-out accuracy before and after, and
the forks that the client's histories have caused (0: every turn was joined to the one before, token for token).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import agents
import anthropic
import openai

import asyncrl
from asyncrl.agents.policy import Policy
from asyncrl.demo.command import demo_config, demo_rows
from asyncrl.demo.model import WARM_STEPS, make_model
from asyncrl.demo.task import calculator
from asyncrl.demo.task import rollout as native

MAX_TURNS = 4
FUNCTION = calculator.schema["function"]

Answer = Callable[[Any, Policy, str], Awaitable[str]]
"""(the client, whose key it is given, the question) -> what the agent says in the end."""


async def with_openai(client: openai.AsyncOpenAI, policy: Policy, question: str) -> str:
    client = client.with_options(base_url=policy.openai_base_url, api_key=policy.openai_api_key)
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        completion = await client.chat.completions.create(model="policy", messages=messages, tools=[calculator.schema])
        said = completion.choices[0].message
        messages.append(said)
        if not said.tool_calls:
            return said.content or ""
        for call in said.tool_calls:
            result = await calculator.call(call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return ""


async def with_anthropic(client: anthropic.AsyncAnthropic, policy: Policy, question: str) -> str:
    client = client.with_options(base_url=policy.anthropic_base_url, api_key=policy.openai_api_key)
    tool: Any = {
        "name": FUNCTION["name"],
        "description": FUNCTION["description"],
        "input_schema": FUNCTION["parameters"],
    }
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        message = await client.messages.create(model="policy", max_tokens=32, messages=messages, tools=[tool])
        messages.append({"role": "assistant", "content": message.content})
        if message.stop_reason != "tool_use":
            return "".join(block.text for block in message.content if block.type == "text")
        results: list[Any] = [
            {"type": "tool_result", "tool_use_id": block.id, "content": await calculator.call(block.input)}
            for block in message.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    return ""


@agents.function_tool(name_override=calculator.name)
async def agents_calculator(expression: str) -> str:
    """Work out one operation on two whole numbers."""
    return await calculator.call({"expression": expression})


AGENT = agents.Agent(name="calculator agent", tools=[agents_calculator])


async def with_openai_agents(client: openai.AsyncOpenAI, policy: Policy, question: str) -> str:
    client = client.with_options(base_url=policy.openai_base_url, api_key=policy.openai_api_key)
    model = agents.OpenAIResponsesModel(model="policy", openai_client=client)
    config = agents.RunConfig(model=model, tracing_disabled=True)
    try:
        return str((await agents.Runner.run(AGENT, question, run_config=config, max_turns=MAX_TURNS)).final_output)
    except agents.AgentsException:  # too many turns, or a call of a tool that there is not
        return ""


def captured(answer: Answer, make_client: Callable[[], Any]) -> Callable[..., Any]:
    """A rollout factory: one client for all rollouts, so that they share its connections."""

    @asynccontextmanager
    async def make_rollout(setup: Any) -> AsyncIterator[Any]:
        async with make_client() as client:

            async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
                try:
                    said = await answer(client, prompt.policy, prompt["messages"][0]["content"])
                except (openai.BadRequestError, anthropic.BadRequestError):  # the context is full
                    said = ""
                return prompt.policy.captured_run(reward=float(said.strip() == prompt["answer"]))

            yield rollout

    return make_rollout


ROLLOUTS: dict[str, Callable[..., Any]] = {
    "native": native,
    "openai": captured(with_openai, lambda: openai.AsyncOpenAI(api_key="given per rollout")),
    "anthropic": captured(with_anthropic, lambda: anthropic.AsyncAnthropic(api_key="given per rollout")),
    "openai-agents": captured(with_openai_agents, lambda: openai.AsyncOpenAI(api_key="given per rollout")),
}


def train(name: str, model: Path, folder: Path, *, steps: int, seed: int, rows: int, held_out: int) -> Any:
    return asyncrl.train(
        ROLLOUTS[name],
        dataset=demo_rows(seed, rows, held_out=False),
        config=demo_config(model, folder / name, seed=seed, steps=steps, sampler="transformers"),
        evaluation=demo_rows(seed, held_out, held_out=True),
        view="quiet",
    )


def forks(run_dir: Path) -> float:
    """Of all steps together, as the run's records tell them."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line).get("forks", 0) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warm-steps", type=int, default=WARM_STEPS)
    parser.add_argument("--held-out-rows", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ROLLOUTS, default=list(ROLLOUTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder, seed=options.seed, steps=options.warm_steps)
        print(
            "| client | accuracy before | after | rollouts | forks | training s |\n|---|---|---|---|---|---|",
            flush=True,
        )
        for client in options.only:
            result = train(
                client,
                model,
                folder,
                steps=options.steps,
                seed=options.seed,
                rows=20_000,
                held_out=options.held_out_rows,
            )
            print(
                f"| {client} | {result.before.mean:.3f} | {result.after.mean:.3f} | {result.rollouts} "
                f"| {forks(result.run_dir):g} | {result.wall_s:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
