"""Adapters on real vLLM, on a model with an untied head."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from asyncrl.config import Config
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.vllm import VllmSampler
from asyncrl.types import Weights
from tests.sampling.contract import CHECKS, TOLERANCE, Check, Subject, draw, error, publish_next, until, until_running
from tests.sampling.truth import CONTEXT, NEEDS_VLLM, PROMPT, Truth

pytestmark = [*NEEDS_VLLM, pytest.mark.asyncio(loop_scope="module")]

KEEP = 2


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("lora"), kind="llama", tied=False, lora=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    config = Config(model=str(truth.base), max_seq_len=CONTEXT, sampler={"kind": "vllm"}, lora={"rank": 4})
    run_dir: Path = tmp_path_factory.mktemp("run")
    async with VllmSampler(config, run_dir=run_dir, keep_versions=KEEP) as sampler:
        yield truth.subject(sampler)


async def test_version_zero_is_the_base_model(subject: Subject) -> None:
    assert subject.sampler.version == 0
    assert error(subject, PROMPT, await draw(subject, PROMPT), 0) < TOLERANCE


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(subject: Subject, check: Check) -> None:
    await check(subject)


async def test_requests_finish_on_their_version_and_nothing_pauses(subject: Subject) -> None:
    """More versions in flight than are kept: a used one stays, a drained one goes."""
    first = await publish_next(subject)
    long = asyncio.create_task(draw(subject, PROMPT, max_tokens=CONTEXT - len(PROMPT)))
    await until_running(subject, long)
    versions = [await publish_next(subject) for _ in range(KEEP + 1)]
    assert not long.done()
    completion = await long
    assert set(completion.versions) == {first}
    assert error(subject, PROMPT, completion, first) < TOLERANCE
    await publish_next(subject)
    for gone in (first, versions[0]):
        with pytest.raises(SamplerRequestError, match=f"version {gone} is not live"):
            await draw(subject, PROMPT, version=gone)


async def test_adapter_that_is_not_there_names_server_and_status(subject: Subject, tmp_path: Path) -> None:
    version = subject.sampler.version
    with pytest.raises(SamplerError, match=r"(?s)version \d+ of the adapter.*vllm-0 at http.*HTTP [45]\d\d"):
        await subject.sampler.publish(Weights(version + 1, adapter=True, folder=tmp_path / "nothing"))
    assert subject.sampler.version == version
    assert set((await draw(subject, PROMPT)).versions) == {version}


async def test_token_outside_the_vocabulary_is_refused(subject: Subject) -> None:
    with pytest.raises(SamplerRequestError, match="vocab") as caught:
        await draw(subject, [5, 6, subject.vocab_size])
    assert (caught.value.status, caught.value.recoverable) == (400, False)


async def test_scores_are_right_while_many_requests_run(subject: Subject) -> None:
    """vLLM's own prompt log-probs would kill the engine here: the canary scores amid running rollouts."""
    version = await publish_next(subject)
    running = [asyncio.create_task(draw(subject, [5 + n, 6, 7], max_tokens=CONTEXT - 3)) for n in range(12)]
    await until(subject, lambda load: load.running >= 6, *running)
    tokens = [*PROMPT, 9, 4, 17]
    expected = subject.truth(tokens, version, 1.0)
    for _ in range(3):
        scored = await subject.sampler.score(tokens, version)
        assert max(abs(a - b) for a, b in zip(scored, expected, strict=True)) < TOLERANCE
    assert {item.versions[0] for item in await asyncio.gather(*running)} == {version}
