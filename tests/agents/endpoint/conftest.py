"""An endpoint in front of a sampler that says what a script tells it, and the clients that strangers use."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Literal

import pytest

from asyncrl.agents.endpoint import Endpoint
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.config import EndpointConfig
from asyncrl.testing.models import tiny_tokenizer
from asyncrl.types import Completion, Load, Rollout, RolloutRun, RolloutSample, SampleRequest, SamplingParams, Weights

END = "<|im_end|>"
Script = Callable[[str], str]
"""The text so far -> what the policy says next."""


class Teller:
    """Says what the script makes of the text so far. No two tokens have the same log-prob, so none can be mistaken."""

    wants: Literal["tensors", "files"] = "tensors"
    version = 5

    def __init__(self, script: Script, tokenizer: Any) -> None:
        self.script = script
        self.tokenizer = tokenizer
        self.said: list[tuple[list[int], Completion]] = []
        """(context, completion), as asked and drawn."""
        self.busy = 0
        self.most_busy = 0
        self.gate = asyncio.Event()
        """Nothing is said while it is not set."""
        self.gate.set()
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Teller:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, request: SampleRequest) -> Completion:
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            await asyncio.sleep(0)
            await self.gate.wait()
        finally:
            self.busy -= 1
        said = self.script(self.tokenizer.decode(request.token_ids))
        tokens = self.tokenizer.encode(said)[: request.params.max_tokens]
        logprobs = [-next(self._numbers) / 1e6 for _ in tokens]
        stopped = tokens[-1] in request.params.stop_token_ids
        completion = Completion(tokens, logprobs, [self.version] * len(tokens), "stop" if stopped else "length")
        self.said.append((list(request.token_ids), completion))
        return completion

    async def score(
        self, token_ids: Any, version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:  # pragma: no cover - nobody scores here
        return [0.0] * (len(token_ids) - start)

    async def publish(self, weights: Weights) -> None: ...

    async def load(self) -> Load:
        return Load(self.busy, 0)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def turns(*said: str) -> Script:
    """Says these turns, whatever it is told."""
    waiting: Iterator[str] = iter(said)
    return lambda text: next(waiting) + END


def segments(run: Rollout) -> list[RolloutSample]:
    return list(run.segments) if isinstance(run, RolloutRun) else [run]


def assert_true_to_the_token(run: Rollout, teller: Teller) -> None:
    """Every token that was drawn is trained once, with its log-prob, after exactly the tokens it was drawn after."""
    trained = [
        (token, logprob, version)
        for segment in segments(run)
        for token, logprob, mask, version in zip(
            segment.tokens, segment.logprobs, segment.loss_mask, segment.versions or (), strict=True
        )
        if mask
    ]
    drawn = [entry for _, one in teller.said for entry in zip(one.tokens, one.logprobs, one.versions, strict=True)]
    assert sorted(trained) == sorted(drawn)
    for context, completion in teller.said:
        read = [*context, *completion.tokens]
        assert any(list(segment.tokens[: len(read)]) == read for segment in segments(run))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    """When it has closed, nothing of it runs on."""
    async with Endpoint(EndpointConfig(max_calls=100)) as endpoint:
        yield endpoint
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens on the other side of a socket."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
def begin(endpoint: Endpoint, tokenizer: Any) -> Callable[..., tuple[Policy, Teller]]:
    """Begin a rollout: its policy, and the sampler behind it."""

    def begin(
        script: Script, *, max_seq_len: int = 4096, params: SamplingParams | None = None, where: Endpoint = endpoint
    ) -> tuple[Policy, Teller]:
        teller = Teller(script, tokenizer)
        params = params or SamplingParams(max_tokens=512, stop_token_ids=(tokenizer.eos_token_id,))
        context = PolicyContext(
            teller, params=params, max_seq_len=max_seq_len, load_tokenizer=lambda: tokenizer, endpoint=where
        )
        return Policy(context, session=7), teller

    return begin
