"""What the endpoint costs: a turn through it against a turn of the native chat, with a sampler that takes no time.

    python benchmarks/endpoint.py [--turns 100] [--rollouts 20]

Client, server and sampler share one core here, and the client is the larger part: `bare` posts the same requests
without a client library, so it shows what is the endpoint's. Then one conversation of many turns: milliseconds and new
tokens by turn. What is tokenised is what is new; the JSON of the history is the client's to send.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import anthropic
import openai

from asyncrl.agents.endpoint import Endpoint
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.testing.fakes import ScriptedSampler
from asyncrl.testing.models import tiny_tokenizer
from asyncrl.types import SampleRequest, SamplingParams

ANSWER = "That is a good question, and this is a short answer."
QUESTION = "And what would you say to this? " * 4

Say = Callable[[list[Any]], Awaitable[Any]]
"""The history -> the assistant's message, in the client's form."""


class Rendered:
    """A tokenizer that counts what it encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = 0
        self._encode = tokenizer.encode
        tokenizer.encode = self.encode

    def encode(self, *args: Any, **kwargs: Any) -> list[int]:
        ids: list[int] = self._encode(*args, **kwargs)
        self.tokens += len(ids)
        return ids


def make_context(endpoint: Endpoint, tokenizer: Any) -> PolicyContext:
    answer = tokenizer.encode(f"{ANSWER}<|im_end|>")

    def script(request: SampleRequest) -> list[int]:
        return answer

    params = SamplingParams(max_tokens=1000, stop_token_ids=(tokenizer.eos_token_id,))
    return PolicyContext(
        ScriptedSampler(script), params=params, max_seq_len=1 << 20, load_tokenizer=lambda: tokenizer, endpoint=endpoint
    )


async def converse(say: Say, turns: int, rendered: Rendered) -> tuple[list[float], list[int]]:
    """Seconds and newly rendered tokens of each turn."""
    history: list[Any] = []
    seconds, tokens = [], []
    for _ in range(turns):
        history.append({"role": "user", "content": QUESTION})
        before, began = rendered.tokens, time.perf_counter()
        history.append(await say(history))
        seconds.append(time.perf_counter() - began)
        tokens.append(rendered.tokens - before)
    return seconds, tokens


def ways(policy: Policy, http: aiohttp.ClientSession, client: openai.AsyncOpenAI, other: Any) -> dict[str, Say]:
    chat = policy.chat([], max_turns=1 << 30)
    url, key = policy.openai_base_url, policy.openai_api_key
    openais = client.with_options(base_url=url, api_key=key)
    anthropics = other.with_options(base_url=policy.anthropic_base_url, api_key=key)

    async def native(history: list[Any]) -> Any:
        return {"role": "assistant", "content": await chat.step(history[-1]["content"])}

    async def bare(history: list[Any]) -> Any:
        body = {"model": "m", "messages": history}
        headers = {"Authorization": f"Bearer {key}"}
        async with http.post(f"{url}/chat/completions", json=body, headers=headers) as answer:
            return (await answer.json())["choices"][0]["message"]

    async def completions(history: list[Any]) -> Any:
        return (await openais.chat.completions.create(model="m", messages=history)).choices[0].message

    async def responses(history: list[Any]) -> Any:
        response: Any = await openais.responses.create(model="m", input=history)
        return response.output[0].model_dump()

    async def messages(history: list[Any]) -> Any:
        message = await anthropics.messages.create(model="m", max_tokens=100, messages=history)
        return {"role": "assistant", "content": message.content}

    return {
        "native chat": native,
        "endpoint, bare": bare,
        "endpoint, openai chat": completions,
        "endpoint, openai responses": responses,
        "endpoint, anthropic": messages,
    }


async def measure(turns: int, rollouts: int) -> None:
    tokenizer = tiny_tokenizer()
    rendered = Rendered(tokenizer)
    async with (
        Endpoint() as endpoint,
        aiohttp.ClientSession() as http,
        openai.AsyncOpenAI(api_key="given per rollout") as client,
        anthropic.AsyncAnthropic(api_key="given per rollout") as other,
    ):
        context = make_context(endpoint, tokenizer)

        def begin(name: str, number: int) -> Say:
            return ways(Policy(context, f"{name}-{number}"), http, client, other)[name]

        names = list(ways(Policy(context, "names"), http, client, other))
        print("| path | first turns, ms a turn | over the native chat |\n|---|---|---|")
        base = 0.0
        for name in names:
            await converse(begin(name, -1), 4, rendered)
            spent = [second for n in range(rollouts) for second in (await converse(begin(name, n), 4, rendered))[0]]
            typical = 1000 * statistics.median(spent)
            base = base or typical
            print(f"| {name} | {typical:.2f} | {typical - base:+.2f} |", flush=True)

        columns = sorted({1, max(turns // 10, 1), turns // 2, turns})
        head = f"one conversation of {turns} turns: ms (new tokens) at turn"
        print(f"\n| {head} | {' | '.join(map(str, columns))} | all, s |")
        print("|---|" + "---|" * (len(columns) + 1))
        for name in names:
            seconds, tokens = await converse(begin(name, rollouts), turns, rendered)
            near = [statistics.median(seconds[max(turn - 5, 0) : turn]) for turn in columns]
            cells = [f"{1000 * ms:.2f} ({tokens[turn - 1]})" for turn, ms in zip(columns, near, strict=True)]
            print(f"| {name} | {' | '.join(cells)} | {sum(seconds):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--rollouts", type=int, default=20)
    options = parser.parse_args()
    asyncio.run(measure(options.turns, options.rollouts))


if __name__ == "__main__":
    main()
