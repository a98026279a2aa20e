"""Information gain: where the answer is asked for, what is subtracted from what, and by which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from asyncrl.agents.gain import ROUNDS, information_gain, with_information_gain
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.errors import RolloutContractError, SamplerRequestError
from asyncrl.testing.fakes import ScriptedSampler
from asyncrl.types import RolloutRun, RolloutSample, SamplingParams, Weights

Asked = tuple[list[int], list[int], int, str | None]
"""Context, what was scored, version, session."""


class Oracle(ScriptedSampler):
    """Every token of an answer has the log-prob that `belief` says for its context and the version that is asked."""

    def __init__(self, belief: Callable[[Sequence[int], int], float], turns: Iterable[Sequence[int]] = ()) -> None:
        left = iter(turns)
        super().__init__(lambda request: next(left))
        self.belief = belief
        self.asked: list[Asked] = []

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        if version < self.version:
            raise SamplerRequestError(f"version {version} is not live")
        context, answer = list(token_ids[:start]), list(token_ids[start:])
        self.asked.append((context, answer, version, session))
        return [self.belief(context, version)] * len(answer)


def policy_of(sampler: Oracle, tokenizer: Any, *, max_seq_len: int = 64, version: int | None = None) -> Policy:
    context = PolicyContext(
        sampler, params=SamplingParams(4), max_seq_len=max_seq_len, load_tokenizer=lambda: tokenizer
    )
    return Policy(context, "s", version)


def sample(mask: Sequence[int]) -> RolloutSample:
    return RolloutSample(list(range(len(mask))), [0.0] * len(mask), mask, 1.0)


MASK = [0, 0, 1, 1, 0, 1, 0, 0, 1]
"""Three turns, which begin at 2, 5 and 8."""


async def test_each_turn_gains_what_the_answer_is_likelier_before_the_next(tokenizer: Any) -> None:
    beliefs = {2: -4.0, 5: -1.5, 8: -2.0}
    oracle = Oracle(lambda context, version: beliefs[len(context)])
    gains = await information_gain(policy_of(oracle, tokenizer), sample(MASK), "42")
    assert gains == [2.5, -0.5, None]
    answer = tokenizer.encode("42")
    assert oracle.asked == [(list(range(place)), answer, 0, "s") for place in (2, 5, 8)]


async def test_the_mean_is_over_the_tokens_of_the_answer(tokenizer: Any) -> None:
    class Uneven(Oracle):
        async def score(self, token_ids: Sequence[int], version: int, **more: Any) -> list[float]:
            found = await super().score(token_ids, version, **more)
            return [logprob * place for place, logprob in enumerate(found)]

    oracle = Uneven(lambda context, version: -float(len(context)))
    assert await information_gain(policy_of(oracle, tokenizer), sample(MASK), "abc") == [-3.0, -3.0, None]


async def test_the_prefix_is_said_and_not_scored(tokenizer: Any) -> None:
    oracle = Oracle(lambda context, version: 0.0)
    await information_gain(policy_of(oracle, tokenizer), sample(MASK), "42", "</think>")
    context, answer, _, _ = oracle.asked[0]
    assert context == [0, 1, *tokenizer.encode("</think>")]
    assert answer == tokenizer.encode("42")


async def test_a_prefix_that_merges_with_the_answer_is_scored_where_it_merges() -> None:
    class Merging:
        """Letters, but `is4` is one token."""

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(letter) for letter in text.replace("is4", "#")]

    oracle = Oracle(lambda context, version: 0.0)
    await information_gain(policy_of(oracle, Merging()), sample(MASK), "42", "It is")
    context, answer, _, _ = oracle.asked[0]
    assert context == [0, 1, *map(ord, "It ")]
    assert answer == [ord("#"), ord("2")]


async def test_one_turn_has_nothing_to_gain_and_asks_nothing(tokenizer: Any) -> None:
    oracle = Oracle(lambda context, version: 0.0)
    assert await information_gain(policy_of(oracle, tokenizer), sample([0, 1, 1]), "42") == [None]
    assert oracle.asked == []


async def test_where_the_answer_does_not_fit_there_is_no_gain(tokenizer: Any) -> None:
    oracle = Oracle(lambda context, version: float(len(context)))
    gains = await information_gain(policy_of(oracle, tokenizer, max_seq_len=8), sample(MASK), "42")
    assert gains == [3.0, None, None], "the third place has 8 tokens before it"
    assert await information_gain(policy_of(oracle, tokenizer, max_seq_len=7), sample(MASK), "42") == [None] * 3


class Hurried(Oracle):
    """A hot-load comes right behind each answer, as long as there are some: the next answer is of newer weights."""

    hot_loads = 1

    async def score(self, token_ids: Sequence[int], version: int, **more: Any) -> list[float]:
        found = await super().score(token_ids, version, **more)
        self.version = min(self.version + 1, self.hot_loads)
        return found


async def test_all_places_are_scored_by_the_same_weights(tokenizer: Any) -> None:
    oracle = Hurried(lambda context, version: -100.0 * version - len(context))
    assert await information_gain(policy_of(oracle, tokenizer), sample(MASK), "42") == [-3.0, -3.0, None]
    asked = [(len(context), version) for context, _, version, _ in oracle.asked]
    assert asked == [(2, 0), (5, 1), (8, 1), (2, 1)]


async def test_hot_loads_without_end_do_not_hold_a_rollout_up(tokenizer: Any) -> None:
    oracle = Hurried(lambda context, version: -1.0)
    oracle.hot_loads = 1000
    assert await information_gain(policy_of(oracle, tokenizer), sample(MASK), "42") == [0.0, 0.0, None]
    assert len(oracle.asked) == 3 + 2 * (ROUNDS - 1)


async def test_the_first_failure_comes_out_by_itself(tokenizer: Any) -> None:
    class Lost(Oracle):
        async def score(self, token_ids: Sequence[int], version: int, **more: Any) -> list[float]:
            raise SamplerRequestError("lost on the way")

    with pytest.raises(SamplerRequestError, match="lost on the way"):
        await information_gain(policy_of(Lost(lambda c, v: 0.0), tokenizer), sample(MASK), "42")


async def test_a_score_that_newer_weights_overtake_is_asked_again(tokenizer: Any) -> None:
    """As vLLM with full weights does it: the old version is refused once the new one is live."""

    class Overtaken(Oracle):
        async def score(self, token_ids: Sequence[int], version: int, **more: Any) -> list[float]:
            if self.version == 0:
                await self.publish(Weights(1, adapter=False))
            return await super().score(token_ids, version, **more)

    oracle = Overtaken(lambda context, version: -float(version))
    scored = await policy_of(oracle, tokenizer).score([1, 2, 3], 2)
    assert (scored.logprobs, scored.version) == ([-1.0], 1)
    with pytest.raises(SamplerRequestError, match="version 0 is not live"):
        await policy_of(oracle, tokenizer, version=0).score([1, 2, 3], 2)


async def test_in_a_chat_the_answer_is_asked_for_where_the_model_begins_to_speak(tokenizer: Any) -> None:
    """Behind the opened turn of the assistant, and behind what the tool has said to the turn before."""

    def capital() -> str:
        """The capital of France."""
        return "It is Paris."

    spoken = ['<tool_call>{"name": "capital", "arguments": {}}</tool_call><|im_end|>', "Paris<|im_end|>"]
    oracle = Oracle(lambda context, version: float("Paris" in tokenizer.decode(context)), map(tokenizer.encode, spoken))
    policy = policy_of(oracle, tokenizer, max_seq_len=2048)
    chat = policy.chat("What is the capital of France?", tools=[capital], max_tokens=200)
    assert await chat.run() == "Paris"
    found = await with_information_gain(policy, chat.sample(1.0), "Paris")
    assert isinstance(found, RolloutSample)
    assert found.turn_rewards == [1.0, None]
    contexts = [tokenizer.decode(context) for context, _, _, _ in oracle.asked]
    assert all(context.endswith("<|im_start|>assistant\n") for context in contexts)
    assert [context.count("It is Paris.") for context in contexts] == [0, 1]


async def test_segments_of_a_run_have_their_own_turns(tokenizer: Any) -> None:
    oracle = Oracle(lambda context, version: float(len(context) ** 2))
    first, second = sample([0, 1, 0, 1]), sample([0, 0, 0, 1, 0, 1])
    found = await with_information_gain(policy_of(oracle, tokenizer), RolloutRun([first, second]), "42")
    assert found == RolloutRun(
        [replace(first, turn_rewards=[9.0 - 1.0, None]), replace(second, turn_rewards=[25.0 - 9.0, None])]
    )


@pytest.mark.parametrize(("tokens", "start"), [([1, 2], 0), ([1, 2], 2), ([1] * 64, 3), ([], 1)])
async def test_what_cannot_be_scored(tokenizer: Any, tokens: list[int], start: int) -> None:
    policy = policy_of(Oracle(lambda context, version: 0.0), tokenizer)
    with pytest.raises(
        RolloutContractError, match=rf"policy.score was called with {len(tokens)} tokens and start={start}"
    ):
        await policy.score(tokens, start)


async def test_an_empty_answer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RolloutContractError, match="the true answer is empty"):
        await information_gain(policy_of(Oracle(lambda c, v: 0.0), tokenizer), sample(MASK), "")
