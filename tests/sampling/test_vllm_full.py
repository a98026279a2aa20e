"""Full weights on real vLLM: a model with a tied head, and what a hot-load does to requests in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from asyncrl.config import Config
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.vllm import VllmSampler
from asyncrl.types import Completion, Weights
from tests.sampling.contract import CHECKS, TOLERANCE, Check, Subject, draw, error, publish_next, until, until_running
from tests.sampling.truth import CONTEXT, NEEDS_VLLM, PROMPT, Truth

pytestmark = [*NEEDS_VLLM, pytest.mark.asyncio(loop_scope="module")]

InFlight = Literal["interrupt", "keep", "drain"]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(tmp_path_factory.mktemp("full"), kind="qwen3", tied=True, lora=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Subject]:
    config = Config(model=str(truth.base), max_seq_len=CONTEXT, sampler={"kind": "vllm"})
    run_dir: Path = tmp_path_factory.mktemp("run")
    async with VllmSampler(config, run_dir=run_dir, keep_versions=1) as sampler:
        yield truth.subject(sampler)


@asynccontextmanager
async def attached(subject: Subject, truth: Truth, in_flight: InFlight) -> AsyncIterator[Subject]:
    """A second sampler on the same server, as for a server that somebody else runs."""
    assert isinstance(subject.sampler, VllmSampler)
    url = subject.sampler.urls[0]
    sampling = {"kind": "vllm", "urls": [url], "in_flight": in_flight}
    config = Config(model=str(truth.base), max_seq_len=CONTEXT, sampler=sampling)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", subject.sampler.servers[0].launch.env["VLLM_API_KEY"])
        async with VllmSampler(config, run_dir=Path("unused"), keep_versions=1) as sampler:
            yield truth.subject(sampler)


async def until_drawn(subject: Subject, tokens: int) -> None:
    """Wait until the engine has drawn so many more tokens."""
    start = (await subject.sampler.load()).generated_tokens
    await until(subject, lambda load: load.generated_tokens >= start + tokens)


async def draw_over_two_hot_loads(subject: Subject) -> list[Completion]:
    tasks = [
        asyncio.create_task(draw(subject, PROMPT, session=str(index), max_tokens=1500 + index)) for index in range(3)
    ]
    await until_running(subject, *tasks)
    for _ in range(2):
        await until_drawn(subject, 100)
        await publish_next(subject)
    return await asyncio.gather(*tasks)


def largest(differences: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(differences, others, strict=True))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(subject: Subject, check: Check) -> None:
    await check(subject)


async def test_seeded_prompts_that_fill_more_than_one_engine_step(subject: Subject) -> None:
    """vLLM's CPU engine dies when such a prompt is split."""
    prompts = [[index, *range(250), *range(250), *range(250), *range(150)] for index in range(12)]
    together = await asyncio.gather(*(draw(subject, prompt, seed=5) for prompt in prompts))
    alone = await draw(subject, prompts[3], seed=5)
    assert list(alone.tokens) == list(together[3].tokens)


async def test_interrupt_computes_the_past_again(subject: Subject, truth: Truth) -> None:
    """Every token is drawn by its version, from a prefix that the same version computed."""
    async with attached(subject, truth, "interrupt") as mine:
        for completion in await draw_over_two_hot_loads(mine):
            assert set(completion.versions) == {0, 1, 2}
            tokens = [*PROMPT, *completion.tokens]
            every = [truth.logprobs(tokens, version)[len(PROMPT) - 1 :] for version in (0, 1, 2)]
            assert largest(completion.logprobs, [every[v][i] for i, v in enumerate(completion.versions)]) < TOLERANCE


async def test_keep_goes_on_over_the_old_cache(subject: Subject, truth: Truth) -> None:
    """Every token is drawn by its version, from what earlier versions left in the KV cache."""
    async with attached(subject, truth, "keep") as mine:
        for completion in await draw_over_two_hot_loads(mine):
            assert set(completion.versions) == {0, 1, 2}
            tokens, versions = [*PROMPT, *completion.tokens], list(completion.versions)
            ends = [len(PROMPT) - 1 + versions.index(later) for later in (1, 2)]
            kept = truth.kept(tokens, [(0, ends[0]), (1, ends[1]), (2, len(tokens))])
            assert largest(completion.logprobs, kept[len(PROMPT) - 1 :]) < TOLERANCE
        fresh = await draw(mine, PROMPT)
        assert error(mine, PROMPT, fresh, 2) < TOLERANCE


async def test_drain_ends_them_under_their_weights(subject: Subject, truth: Truth) -> None:
    async with attached(subject, truth, "drain") as mine:
        tasks = [asyncio.create_task(draw(mine, PROMPT, max_tokens=1200)) for _ in range(3)]
        await until_running(mine, *tasks)
        publication = asyncio.create_task(publish_next(mine))
        await asyncio.sleep(0)  # the gate is closed from here on
        late = asyncio.create_task(draw(mine, PROMPT))
        for completion in await asyncio.gather(*tasks):
            assert set(completion.versions) == {0}
            assert error(mine, PROMPT, completion, 0) < TOLERANCE
        await publication
        assert set((await late).versions) == {1}
        assert error(mine, PROMPT, await late, 1) < TOLERANCE


async def test_attached_server_starts_from_the_base_model(subject: Subject, truth: Truth) -> None:
    """An earlier run left its weights in the server; a new one must not begin with them."""
    await publish_next(subject)
    async with attached(subject, truth, "keep") as mine:
        assert mine.sampler.version == 0
        assert error(mine, PROMPT, await draw(mine, PROMPT), 0) < TOLERANCE


async def test_hot_load_that_fails_ends_the_sampler_and_leaves_the_server_running(
    subject: Subject, truth: Truth, tmp_path: Path
) -> None:
    async with attached(subject, truth, "keep") as mine:
        task = asyncio.create_task(draw(mine, PROMPT, max_tokens=1800))
        await until_running(mine, task)
        tmp_path.joinpath("model.safetensors").write_bytes(b"not weights")
        with pytest.raises(SamplerError, match=r"version 1 of the weights.*http://127.*HTTP 500"):
            await mine.sampler.publish(Weights(1, adapter=False, folder=tmp_path))
        with pytest.raises(SamplerError, match="did not finish"):
            await draw(mine, PROMPT)
        with pytest.raises(SamplerRequestError, match="ended the request early"):
            await task
    async with attached(subject, truth, "keep") as again:
        assert error(again, PROMPT, await draw(again, PROMPT), 0) < TOLERANCE
