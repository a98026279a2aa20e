"""The fake sampler keeps the contract of the real ones, as far as a script can: it has no probabilities of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

import pytest

from asyncrl.errors import SamplerRequestError
from asyncrl.testing.fakes import ScriptedSampler
from asyncrl.types import SampleRequest, SamplingParams, Weights
from tests.sampling import contract
from tests.sampling.contract import Check, Subject, draw, publish_next

CONTEXT, VOCABULARY = 400, 997
PROMPT = [(7 * index) % VOCABULARY for index in range(100)]

NEEDS_PROBABILITIES = {
    contract.greedy_takes_the_likeliest,
    contract.logprobs_are_those_of_the_truncated_policy,
    contract.published_weights_are_used,
}
"""Every token of the fake has log-prob ln(1/2), whatever the weights."""
CHECKS = [check for check in contract.CHECKS if check not in NEEDS_PROBABILITIES]


def script(request: SampleRequest) -> list[int]:
    """A long answer that depends on the prompt and the seed."""
    start = sum(request.token_ids) + 31 * (request.params.seed or 0)
    return [(start + 7 * place) % VOCABULARY for place in range(request.params.max_tokens)]


def sampler(capacity: int | None = None) -> ScriptedSampler:
    """A millisecond for each token, so that a long answer can be caught under way."""
    return ScriptedSampler(
        script,
        latency_s=lambda request: request.params.max_tokens / 1000,
        capacity=capacity,
        context_tokens=CONTEXT,
    )


def coin(tokens: Sequence[int], version: int, temperature: float) -> list[float]:
    return [-math.log(2.0)] * (len(tokens) - 1)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(check: Check, capacity: int | None) -> None:
    async with sampler(capacity) as fake:
        await check(
            Subject(
                sampler=fake,
                prompt=PROMPT,
                vocab_size=VOCABULARY,
                context_tokens=CONTEXT,
                weights=lambda version: Weights(version, adapter=False, tensors={}),
                truth=coin,
                next_token=lambda tokens, version: [-math.log(2.0)] * VOCABULARY,
                keeps_versions=True,
            )
        )


async def test_published_versions_are_used_and_kept_in_order() -> None:
    async with sampler() as fake:
        subject = Subject(fake, PROMPT, VOCABULARY, CONTEXT, lambda v: Weights(v, False), coin, lambda t, v: [], True)
        assert set((await draw(subject, PROMPT)).versions) == {0}
        for _ in range(3):
            await publish_next(subject)
        assert set((await draw(subject, PROMPT)).versions) == {3}
        assert fake.published == [1, 2, 3]


async def test_cancelling_a_request_that_waits_frees_its_place_in_the_queue() -> None:
    async with sampler(capacity=1) as fake:
        request = SampleRequest([1], SamplingParams(max_tokens=50))
        running, waiting = (asyncio.create_task(fake.generate(request)) for _ in range(2))
        await asyncio.sleep(0)
        load = await fake.load()
        assert (load.running, load.waiting) == (1, 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert len((await running).tokens) == 50
        load = await fake.load()
        assert (load.running, load.waiting) == (0, 0)


async def test_a_refused_request_takes_no_place() -> None:
    async with sampler(capacity=1) as fake:
        with pytest.raises(SamplerRequestError, match="version 5 is not live yet; the newest is 0"):
            await fake.generate(SampleRequest([1], SamplingParams(max_tokens=1), version=5))
        assert (await fake.load()).waiting == 0
