"""Raw text and raw tokens, and strings that end a turn."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from asyncrl.types import RolloutSample
from tests.agents.endpoint.clients import anthropic_client, openai_client
from tests.agents.endpoint.conftest import assert_true_to_the_token, segments, turns


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_texts_and_tokens_are_continued(begin, tokenizer, stream: bool) -> None:
    policy, teller = begin(turns("x", "y", "z", "w"))
    texts: Any = ["one", "two"]
    async with openai_client(policy) as client:
        asked: dict[str, Any] = {"model": "m", "prompt": texts, "n": 2, "max_tokens": 7}
        if stream:
            pieces = [piece async for piece in await client.completions.create(**asked, stream=True)]
            choices = [choice for piece in pieces for choice in piece.choices]
        else:
            completion = await client.completions.create(**asked)
            choices = completion.choices
            assert completion.usage.prompt_tokens == 6
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert {choice.text for choice in choices} == {"x", "y", "z", "w"}
    assert [tokenizer.decode(context) for context, _ in teller.said] == ["one", "one", "two", "two"]
    assert_true_to_the_token(policy.captured_run(reward=0.0), teller)


async def test_tokens_that_go_on_from_what_was_drawn_stay_one_sequence(begin, tokenizer) -> None:
    """Also tokens that text would not bring back: half of a letter."""
    policy, teller = begin(turns("first", "second"))
    start = tokenizer.encode("é")[:1]
    async with openai_client(policy) as client:
        first = await client.completions.create(model="m", prompt=start, logprobs=0)
        assert first.choices[0].logprobs.token_logprobs == list(teller.said[0][1].logprobs)
        assert first.choices[0].logprobs.text_offset == [0, 1, 2, 3, 4, 5]
        history = [*start, *teller.said[0][1].tokens, *tokenizer.encode("\nmore\n")]
        await client.completions.create(model="m", prompt=history)
    run = policy.captured_run(reward=0.0)
    assert isinstance(run, RolloutSample)
    assert run.tokens == [*history, *teller.said[1][1].tokens]
    assert_true_to_the_token(run, teller)


@pytest.mark.parametrize(
    "asked", [{"echo": True}, {"suffix": "."}, {"best_of": 3}, {"logprobs": 5}, {"prompt": []}, {"prompt": [[]]}]
)
async def test_what_cannot_be_done_is_refused_by_name(begin, asked: dict[str, Any]) -> None:
    policy, teller = begin(turns())
    async with openai_client(policy) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(**{"model": "m", "prompt": "x", **asked})
    assert next(iter(asked)) in caught.value.body["message"]
    assert teller.said == []


async def test_a_turn_ends_before_its_stop_string_and_trains_up_to_it(begin, tokenizer) -> None:
    policy, teller = begin(turns("Thought.\nObservation: I make it up", "Observation: too", "Answer"))
    asked: Any = [{"role": "user", "content": "?"}]
    async with openai_client(policy) as client:
        said = (await client.chat.completions.create(model="m", messages=asked, stop=["zzz", "Observation:"])).choices[
            0
        ]
        assert (said.message.content, said.finish_reason) == ("Thought.", "stop")
        text = (await client.completions.create(model="m", prompt="x", stop="tion")).choices[0]
        assert (text.text, text.finish_reason) == ("Observa", "stop")
        asked += [said.message, {"role": "user", "content": "Observation: it rains."}]
        await client.chat.completions.create(model="m", messages=asked)
    raw, first = segments(policy.captured_run(reward=0.0))
    assert tokenizer.decode([t for t, mask in zip(raw.tokens, raw.loss_mask, strict=True) if mask]) == "Observation"
    conversation = tokenizer.decode(first.tokens)
    assert "assistant\nThought.\nObservation:<|im_end|>\n<|im_start|>user\nObservation: it rains." in conversation
    trained = [t for t, mask in zip(first.tokens, first.loss_mask, strict=True) if mask]
    assert tokenizer.decode(trained) == "Thought.\nObservation:Answer<|im_end|>"
    drawn = teller.said[0][1]
    count = len("Thought.\nObservation:")
    start = first.loss_mask.index(1)
    assert first.logprobs[start : start + count] == list(drawn.logprobs)[:count]


async def test_the_stop_sequence_is_named(begin) -> None:
    policy, _ = begin(turns("one STOP two", "three"))
    asked: Any = [{"role": "user", "content": "?"}]
    async with anthropic_client(policy) as client:
        message = await client.messages.create(model="m", max_tokens=99, messages=asked, stop_sequences=["STOP"])
        assert (message.content[0].text, message.stop_reason, message.stop_sequence) == (
            "one", "stop_sequence", "STOP",
        )  # fmt: skip
        message = await client.messages.create(model="m", max_tokens=99, messages=asked, stop_sequences=["STOP"])
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)


async def test_a_stop_string_that_is_the_end_of_a_turn_changes_nothing(begin) -> None:
    policy, teller = begin(turns("one", "two"))
    asked: Any = [{"role": "user", "content": "?"}]
    async with openai_client(policy) as client:
        said = (await client.chat.completions.create(model="m", messages=asked, stop="<|im_end|>")).choices[0].message
        asked += [said, {"role": "user", "content": "And?"}]
        await client.chat.completions.create(model="m", messages=asked)
    run = policy.captured_run(reward=0.0)
    assert isinstance(run, RolloutSample)
    assert_true_to_the_token(run, teller)
