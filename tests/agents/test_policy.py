from __future__ import annotations

import numpy as np
import pytest

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.errors import RolloutContractError, SamplerRequestError
from asyncrl.types import Completion, SamplingParams


async def test_a_request_carries_the_settings_of_the_run(speak) -> None:
    policy, sampler = speak("hi<|im_end|>", max_tokens=9)
    completion = await policy.generate([1, 2])
    (request,) = sampler.requests
    assert completion is sampler.completions[0]
    assert (request.token_ids, request.session, request.version) == ([1, 2], "7", None)
    assert request.params is policy._context.params  # nothing is copied where nothing differs


@pytest.mark.parametrize(("asked", "granted"), [(None, 9), (4, 4), (20, 20), (200, 98)])
async def test_max_tokens_never_leaves_the_context(speak, asked: int | None, granted: int) -> None:
    policy, sampler = speak("hi<|im_end|>", max_tokens=9, max_seq_len=100)
    await policy.generate([1, 2], max_tokens=asked, stop_token_ids=[5])
    assert sampler.requests[0].params == SamplingParams(max_tokens=granted, stop_token_ids=(5,))


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([1] * 10, None, "the context has 10 tokens, and max_seq_len is 10"),
        ([], None, "called with no tokens"),
        ([1], 0, "max_tokens=0"),
    ],
)
async def test_a_request_without_room_is_refused(speak, prompt, max_tokens, message: str) -> None:
    policy, sampler = speak("x", max_seq_len=10)
    with pytest.raises(RolloutContractError, match=message):
        await policy.generate(prompt, max_tokens=max_tokens)
    assert sampler.requests == []


@pytest.mark.parametrize("tokens", [np.array([1, 2]), range(1, 3), (1, 2)], ids=["array", "range", "tuple"])
async def test_token_ids_may_be_any_flat_sequence(speak, tokens) -> None:
    policy, sampler = speak("hi<|im_end|>")
    await policy.generate(tokens)
    assert sampler.requests[0].token_ids == [1, 2]
    assert len((await policy.score(tokens, 1)).logprobs) == 1


@pytest.mark.parametrize(
    "tokens", ["hello", [[1, 2]], np.array([[1, 2]]), [1.0], {"input_ids": [1, 2]}, 3, None, [None]], ids=repr
)
async def test_what_is_no_sequence_of_token_ids_never_reaches_the_sampler(speak, tokens) -> None:
    policy, sampler = speak("x")
    with pytest.raises(RolloutContractError, match="Expected one flat sequence of token ids"):
        await policy.generate(tokens)
    with pytest.raises(RolloutContractError, match=r"policy\.score was called with"):
        await policy.score(tokens, 1)
    assert sampler.requests == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": 7.5}, r"max_tokens=7\.5\. Expected a whole number of at least 1"),
        ({"stop_token_ids": [5, None]}, r"the stop token None\..*A tokenizer says None of a token"),
        ({"stop_token_ids": ["</s>"]}, "the stop token '</s>'"),
        ({"stop_token_ids": [-1]}, "the stop token -1"),
    ],
)
async def test_a_request_that_would_end_the_sampler_of_all_is_refused(speak, asked, message: str) -> None:
    policy, sampler = speak("x", max_tokens=9)
    with pytest.raises(RolloutContractError, match=message):
        await policy.generate([1, 2], **asked)
    assert sampler.requests == []


async def test_the_oldest_version_is_that_of_the_oldest_token(speak) -> None:
    drawn = [Completion([1, 2], [0.0, 0.0], versions, "stop") for versions in ([6, 7], [3, 8], [9, 9])]
    policy, _ = speak(*drawn)
    seen = [policy.oldest_version]
    for _turn in drawn:
        await policy.generate([1])
        seen.append(policy.oldest_version)
    assert seen == [None, 6, 3, 3]


async def test_a_pinned_handle_stays_on_its_version(speak) -> None:
    free, sampler = speak("a<|im_end|>", "b<|im_end|>")
    pinned = Policy(free._context, "s", version=0)
    assert (free.version, pinned.version) == (0, 0)
    await pinned.generate([1])
    assert (free.version, pinned.version) == (1, 0)
    assert sampler.requests[0].version == 0


async def test_a_rollout_that_has_ended_draws_no_more(speak) -> None:
    policy, sampler = speak("hi<|im_end|>")
    chat = policy.chat("x")
    policy.close()
    for late in (policy.generate([1]), policy.score([1, 2], 1), chat.run()):
        with pytest.raises(RolloutContractError, match="this rollout has ended"):
            await late
    with pytest.raises(RolloutContractError, match="this rollout has ended"):
        _ = policy.openai_api_key
    assert sampler.requests == []


async def test_a_completion_that_was_broken_off_is_no_completion(speak) -> None:
    policy, _ = speak(Completion([1], [0.0], [0], "abort"))
    with pytest.raises(SamplerRequestError, match="after 1 tokens") as caught:
        await policy.generate([1])
    assert caught.value.recoverable


def test_the_tokenizer_is_loaded_once_and_only_when_it_is_used(speak, tokenizer) -> None:
    loads = []

    def load():
        loads.append(1)
        return tokenizer

    _, sampler = speak()
    context = PolicyContext(sampler, params=SamplingParams(max_tokens=1), max_seq_len=8, load_tokenizer=load)
    policies = [Policy(context, session) for session in range(3)]
    assert loads == []
    assert {id(policy.tokenizer) for policy in policies} == {id(tokenizer)}
    assert loads == [1]
