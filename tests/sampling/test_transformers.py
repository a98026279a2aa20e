"""The embedded sampler: the contract of all samplers, and what is its own: threads, policies, failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from asyncrl.config import Config, LoraConfig
from asyncrl.errors import ModelError, SamplerError, SamplerRequestError
from asyncrl.sampling.embedded.batch import DecodeBatch
from asyncrl.sampling.embedded.versions import LiveModel
from asyncrl.sampling.transformers import TransformersSampler
from asyncrl.types import Completion, SampleRequest, SamplingParams, Weights
from tests.sampling.contract import (
    CHECKS,
    LIMIT_S,
    TOLERANCE,
    Check,
    Subject,
    draw,
    error,
    older_version_can_be_pinned,
    publish_next,
    until_running,
)
from tests.sampling.truth import CONTEXT, PROMPT, Truth

pytestmark = pytest.mark.asyncio(loop_scope="module")

LORA = LoraConfig(rank=4, alpha=8)  # as the adapters of `truth`


class TensorTruth(Truth):
    """The same versions, handed over as tensors."""

    def weights(self, version: int) -> Weights:
        weights = super().weights(version)
        assert weights.folder is not None
        name = "adapter_model.safetensors" if self.lora else "model.safetensors"
        return replace(weights, folder=None, tensors=load_file(weights.folder / name))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> TensorTruth:
    return TensorTruth(tmp_path_factory.mktemp("full"), kind="qwen3", tied=True, lora=False)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> TensorTruth:
    return TensorTruth(tmp_path_factory.mktemp("lora"), kind="llama", tied=False, lora=True)


@asynccontextmanager
async def running(truth: Truth, **options: Any) -> AsyncIterator[Subject]:
    options = {"context_tokens": CONTEXT, "torch_threads": 1, "device": "cpu", **options}
    if truth.lora:
        options = {"lora": LORA, "keep_versions": 2, **options}
    async with TransformersSampler(str(truth.base), **options) as sampler:
        yield truth.subject(sampler)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["full", "lora"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with running(request.getfixturevalue(request.param)) as subject:
        yield subject


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_contract(subject: Subject, check: Check) -> None:
    await check(subject)


async def until_drawn(subject: Subject, tokens: int) -> None:
    """Wait until the engine has drawn so many more tokens."""
    start = (await subject.sampler.load()).generated_tokens
    async with asyncio.timeout(LIMIT_S):
        while (await subject.sampler.load()).generated_tokens < start + tokens:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def draw_over_two_hot_loads(subject: Subject, *, max_tokens: int = 600, **request: Any) -> list[Completion]:
    tasks = [asyncio.create_task(draw(subject, PROMPT, max_tokens=max_tokens + i, **request)) for i in range(3)]
    await until_running(subject, *tasks)
    for _ in range(2):
        await until_drawn(subject, 60)
        await publish_next(subject)
    return await asyncio.gather(*tasks)


def largest(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


class TestInFlight:
    async def test_interrupt_computes_the_past_again(self, full: Truth) -> None:
        async with running(full, in_flight="interrupt") as subject:
            for completion in await draw_over_two_hot_loads(subject):
                assert set(completion.versions) == {0, 1, 2}
                tokens = [*PROMPT, *completion.tokens]
                every = [full.logprobs(tokens, version)[len(PROMPT) - 1 :] for version in (0, 1, 2)]
                expected = [every[version][i] for i, version in enumerate(completion.versions)]
                assert largest(completion.logprobs, expected) < TOLERANCE

    async def test_keep_goes_on_over_the_old_cache(self, full: Truth) -> None:
        async with running(full, in_flight="keep") as subject:
            for completion in await draw_over_two_hot_loads(subject):
                tokens, versions = [*PROMPT, *completion.tokens], list(completion.versions)
                assert set(versions) == {0, 1, 2}
                ends = [len(PROMPT) - 1 + versions.index(later) for later in (1, 2)]
                kept = full.kept(tokens, [(0, ends[0]), (1, ends[1]), (2, len(tokens))])
                assert largest(completion.logprobs, kept[len(PROMPT) - 1 :]) < TOLERANCE
            assert error(subject, PROMPT, await draw(subject, PROMPT), 2) < TOLERANCE

    async def test_drain_ends_them_under_their_weights(self, full: Truth) -> None:
        async with running(full, in_flight="drain") as subject:
            tasks = [asyncio.create_task(draw(subject, PROMPT, max_tokens=300)) for _ in range(3)]
            await until_running(subject, *tasks)
            await until_drawn(subject, 3)
            publication = asyncio.create_task(publish_next(subject))
            for completion in await asyncio.gather(*tasks):
                assert set(completion.versions) == {0}
                assert error(subject, PROMPT, completion, 0) < TOLERANCE
            await publication
            late = await draw(subject, PROMPT)
            assert set(late.versions) == {1}
            assert error(subject, PROMPT, late, 1) < TOLERANCE

    @pytest.mark.parametrize("kind", ["lora", "per_rollout", "pinned"])
    async def test_a_request_ends_on_the_version_it_was_sent_with(self, kind: str, full: Truth, lora: Truth) -> None:
        """Adapters, full models side by side, and one pinned request among others that follow the newest."""
        options: dict[str, Any] = {"version_policy": "per_rollout"} if kind == "per_rollout" else {}
        request = {"version": 0} if kind == "pinned" else {}
        truth = lora if kind == "lora" else full
        async with running(truth, **options) as subject:
            for completion in await draw_over_two_hot_loads(subject, **request):
                assert set(completion.versions) == {0}
                assert error(subject, PROMPT, completion, 0) < TOLERANCE

    async def test_full_models_side_by_side(self, full: Truth) -> None:
        async with running(full, version_policy="per_rollout", keep_versions=2) as subject:
            await older_version_can_be_pinned(replace(subject, keeps_versions=True))

    async def test_only_so_many_versions_are_kept(self, lora: Truth) -> None:
        async with running(lora, keep_versions=2) as subject:
            for _ in range(3):
                await publish_next(subject)
            assert set((await draw(subject, PROMPT, version=2)).versions) == {2}
            with pytest.raises(SamplerRequestError, match=r"version 1 is not in the sampler \(there are: 2, 3\)"):
                await draw(subject, PROMPT, version=1)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(events=st.lists(st.sampled_from(["ask", "ask", "ask", "cancel", "publish", "pause"]), min_size=5, max_size=25))
async def test_any_schedule_ends_with_every_token_accounted_for(lora: TensorTruth, events: list[str]) -> None:
    """Requests, cancellations and hot-loads in any order: who was not cancelled is answered, on one version."""
    async with running(lora, max_running=3, keep_versions=30) as subject:
        tasks: list[tuple[list[int], asyncio.Task[Completion]]] = []
        for index, event in enumerate(events):
            if event == "ask":
                prompt = PROMPT[: 1 + 7 * index % 50]
                tasks.append((prompt, asyncio.create_task(draw(subject, prompt, max_tokens=1 + 5 * index % 30))))
            elif event == "cancel" and tasks:
                tasks[index % len(tasks)][1].cancel()
            elif event == "publish":
                await publish_next(subject)
            else:
                await asyncio.sleep(0.002)
        for prompt, task in tasks:
            await asyncio.wait([task], timeout=LIMIT_S)
            if not task.cancelled():
                (version,) = set(task.result().versions)
                assert error(subject, prompt, task.result(), version) < TOLERANCE
        await until_running(subject)


class TestTurns:
    async def test_torch_never_runs_on_the_event_loop(self, full: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: set[int] = set()
        forward = LiveModel.last_logits

        def spy(self: LiveModel, *args: Any, **kwargs: Any) -> torch.Tensor:
            seen.add(threading.get_ident())
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(LiveModel, "last_logits", spy)
        async with running(full) as subject:
            await draw(subject, PROMPT)
        assert len(seen) == 1
        assert threading.get_ident() not in seen

    async def test_requests_of_one_turn_of_the_loop_share_a_prefill(
        self, full: Truth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        joined: list[int] = []
        join = DecodeBatch.join

        def spy(self: DecodeBatch, tickets: Any) -> Any:
            joined.append(len(tickets))
            return join(self, tickets)

        monkeypatch.setattr(DecodeBatch, "join", spy)
        async with running(full) as subject:
            await asyncio.gather(*(draw(subject, PROMPT[:index]) for index in range(1, 20)))
        assert joined == [19]

    async def test_a_session_computes_only_what_is_new(self, full: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
        """In turns and in scores, until new weights come."""
        computed: list[int] = []
        forward = torch.nn.Embedding.forward

        def spy(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
            computed.append(ids.shape[-1])
            return forward(self, ids)

        monkeypatch.setattr(torch.nn.Embedding, "forward", spy)

        async def first_forward(text: Sequence[int], session: str, score: bool = False) -> int:
            del computed[:]
            if score:
                await subject.sampler.score(text, subject.sampler.version, start=len(text) - 2, session=session)
            else:
                text += (await draw(subject, text, session=session)).tokens
            return computed[0]

        async with running(full) as subject:
            text = [*PROMPT]
            assert await first_forward(text, "a") == len(PROMPT)
            assert await first_forward(text, "a") == 1  # the token drawn last, which nobody has seen
            text += PROMPT[:9]
            assert await first_forward(text, "a", score=True) == 10
            assert await first_forward(text, "a") == 10
            assert await first_forward([*text], "b") == len(text)
            await publish_next(subject)
            assert await first_forward(text, "a", score=True) == len(text)
            assert await first_forward([*text], "a") == len(text)

    async def test_a_finished_row_makes_room(self, full: Truth) -> None:
        async with running(full, max_running=2) as subject:
            completions = await asyncio.gather(
                *(draw(subject, PROMPT[: 5 + index], max_tokens=1 + 3 * index) for index in range(9))
            )
        assert [len(completion.tokens) for completion in completions] == [1 + 3 * index for index in range(9)]


class TestFailure:
    async def test_what_waits_when_it_closes_gets_an_error(self, full: Truth) -> None:
        async with running(full, max_running=1) as subject:
            tasks = [asyncio.create_task(draw(subject, PROMPT, max_tokens=900)) for _ in range(3)]
            await until_running(subject, *tasks)
        for task in tasks:
            with pytest.raises(SamplerError, match="closed"):
                await task

    async def test_out_of_memory_names_the_setting_and_hangs_nobody(
        self, full: Truth, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: DecodeBatch) -> Any:
            raise torch.OutOfMemoryError("tried to allocate 3 GiB")

        monkeypatch.setattr(DecodeBatch, "step", fail)
        async with running(full, max_running=2) as subject:
            drawn = await asyncio.gather(*(draw(subject, PROMPT) for _ in range(5)), return_exceptions=True)
            drawn.append((await asyncio.gather(draw(subject, PROMPT), return_exceptions=True))[0])
            with pytest.raises(SamplerError, match="3 GiB"):
                await publish_next(subject)
        for outcome in drawn:
            assert isinstance(outcome, SamplerError)
            assert "sampler.max_running (now 2)" in str(outcome)

    @pytest.mark.parametrize(
        ("prompt", "params", "message"),
        [([1, 99_999], {}, "99999"), ([-1], {}, "-1"), ([1], {"max_tokens": 0}, "max_tokens is 0")],
    )
    async def test_a_bad_request_is_refused_alone(
        self, subject: Subject, prompt: list[int], params: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(SamplerRequestError, match=message) as caught:
            await draw(subject, prompt, **params)
        assert not caught.value.recoverable

    async def test_a_request_that_takes_too_long_is_given_up(self, full: Truth) -> None:
        async with running(full, request_timeout_s=0.05) as subject:
            request = SampleRequest(PROMPT, SamplingParams(max_tokens=900))
            with pytest.raises(SamplerRequestError, match=r"request_timeout_s=0\.05"):
                await subject.sampler.generate(request)

    @pytest.mark.parametrize("kind", ["missing", "empty", "not a language model"])
    async def test_a_model_that_cannot_be_loaded(self, kind: str, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        if kind != "missing":
            folder.mkdir()
        if kind == "not a language model":
            folder.joinpath("config.json").write_text('{"model_type": "clip"}')
        with pytest.raises(ModelError, match=r"cannot load the model.*Check `model`"):
            await TransformersSampler(str(folder), device="cpu").__aenter__()

    async def test_weights_of_another_model_are_refused(self, full: Truth, lora: Truth) -> None:
        async with running(full) as subject:
            tensors = dict(full.weights(1).tensors or {})
            tensors["model.layers.7.wrong"] = tensors.pop("model.norm.weight")
            with pytest.raises(SamplerError, match=r"1 are missing \['model.norm.weight'\], 1 are unknown"):
                await subject.sampler.publish(Weights(1, adapter=False, tensors=tensors))
            with pytest.raises(SamplerError, match=r"lora\.rank is 0"):
                await subject.sampler.publish(lora.weights(1))
            assert subject.sampler.version == 0
            assert set((await draw(subject, PROMPT)).versions) == {0}


async def test_adapters_stay_apart_from_bfloat16_weights(lora: TensorTruth) -> None:
    """A bfloat16 model must not round the adapter away: a delta of a thousandth of the weights still shows."""
    weights = lora.weights(1)
    assert weights.tensors is not None
    small = {name: tensor * (1e-3 if "lora_B" in name else 1) for name, tensor in weights.tensors.items()}
    large = {name: tensor * (1e3 if "lora_A" in name else 1) for name, tensor in small.items()}
    async with running(lora, dtype="bfloat16", keep_versions=4) as subject:
        await subject.sampler.publish(replace(weights, tensors=small))
        await subject.sampler.publish(replace(weights, version=2, tensors=large))
        base, tiny, whole = [await subject.sampler.score(PROMPT, version) for version in (0, 1, 2)]
    assert base != tiny
    truth = lora.logprobs(PROMPT, 1)
    far, near = [sum(map(abs, map(float.__sub__, found, truth))) / len(truth) for found in (base, whole)]
    assert near < 0.1 < 1 < far


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
async def test_a_gpu_that_only_emulates_bfloat16_is_not_asked_for_it(
    native: bool, dtype: torch.dtype, full: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer takes float32 there too."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert TransformersSampler(str(full.base), device="cuda")._dtype == dtype


async def test_from_config_takes_the_settings_of_the_run(full: Truth) -> None:
    config = Config(model=str(full.base), max_seq_len=64, sampler={"max_running": 2}, trainer={"device": "cpu"})
    async with TransformersSampler.from_config(config, torch_threads=1) as sampler:
        completion = await sampler.generate(SampleRequest(PROMPT[:60], SamplingParams(max_tokens=9)))
        assert (len(completion.tokens), completion.finish_reason) == (4, "length")
        assert (await sampler.load()).running == 0
