"""Agent programs send the whole history with each call: which turns does it go on from?"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncrl.agents.conversation import Conversation, Drawn
from asyncrl.errors import RolloutContractError
from asyncrl.rollout.contract import Contract
from asyncrl.types import Completion, RolloutRun, RolloutSample

END = "<|im_end|>"
THINK = "<think>\nhm\n</think>\n\n"
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def segments(conversation: Conversation) -> list[RolloutSample]:
    rollout = conversation.transcript.rollout(1.0, {})
    Contract().check(rollout, oldest=0, newest=99)
    return list(rollout.segments) if isinstance(rollout, RolloutRun) else [rollout]


def holds_the_truth(conversation: Conversation, sampler: Any) -> None:
    """Each drawn token is trained once, after exactly the tokens that the sampler was given."""
    drawn = [[*r.token_ids, *c.tokens] for r, c in zip(sampler.requests, sampler.completions, strict=True)]
    found = segments(conversation)
    assert sum(sum(sample.loss_mask) for sample in found) == sum(len(c.tokens) for c in sampler.completions)
    for seen in drawn:
        assert any(list(sample.tokens[: len(seen)]) == seen for sample in found)


async def ask(conversation: Conversation, messages: list[Any], **more: Any) -> Drawn:
    return await conversation.draw(messages, **more)


async def test_a_history_that_comes_back_is_extended(speak) -> None:
    policy, sampler = speak(f"{THINK}one{END}", f"two{END}", f"three{END}")
    conversation = Conversation(policy)
    messages: list[Any] = [user("a")]
    for text in "bcd":
        drawn = await ask(conversation, messages)
        messages += [{"role": "assistant", "content": drawn.message["content"]}, user(text)]  # the thoughts are lost
    (sample,) = segments(conversation)
    assert "hm" in policy.tokenizer.decode(sample.tokens)
    assert not conversation.transcript.counts
    holds_the_truth(conversation, sampler)


async def test_ids_and_the_form_of_arguments_do_not_matter(speak) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1.0, "b": [{"c": 2.0}, 0.5, true]}}\n</tool_call>'
    policy, sampler = speak(call + END, f"3{END}")
    conversation = Conversation(policy)
    drawn = await ask(conversation, [user("1+2")], tools=TOOLS)
    assert drawn.message["tool_calls"][0]["function"]["name"] == "add"
    function = {"name": "add", "arguments": '{"b": [{"c": 2}, 0.5, true], "a":1}'}
    call_back = {"id": "other", "type": "function", "function": function}
    back = {"role": "assistant", "content": None, "tool_calls": [call_back]}
    await ask(conversation, [user("1+2"), back, {"role": "tool", "tool_call_id": "other", "content": "3"}], tools=TOOLS)
    assert len(segments(conversation)) == 1
    holds_the_truth(conversation, sampler)


async def test_a_rewritten_history_forks_and_is_counted(speak) -> None:
    policy, sampler = speak(f"one{END}", f"two{END}")
    conversation = Conversation(policy)
    await ask(conversation, [user("a")])
    await ask(conversation, [user("a"), {"role": "assistant", "content": "summary"}, user("b")])
    assert len(segments(conversation)) == 2
    assert conversation.transcript.counts == {"fork: history rewritten": 1}
    holds_the_truth(conversation, sampler)


async def test_branches_share_what_was_said_before_them(speak) -> None:
    policy, sampler = speak(f"one{END}", f"two{END}", f"three{END}")
    conversation = Conversation(policy)
    first = await ask(conversation, [user("a")])
    for text in "bc":
        await ask(conversation, [user("a"), first.message, user(text)])
    one, two = segments(conversation)
    assert (sum(one.loss_mask), sum(two.loss_mask)) == (4 + 4, 6)
    assert conversation.transcript.counts == {"fork: branch": 1}
    holds_the_truth(conversation, sampler)


async def test_conversations_at_the_same_time(speak) -> None:
    policy, sampler = speak(f"one{END}", f"two{END}", f"three{END}")
    conversation = Conversation(policy)
    await asyncio.gather(*[ask(conversation, [user("a")]) for _ in range(3)])
    assert len(segments(conversation)) == 3
    assert conversation.transcript.counts == {"fork: new conversation": 2}
    holds_the_truth(conversation, sampler)


async def test_a_turn_that_was_cut_is_closed_before_the_next(speak, tokenizer) -> None:
    policy, sampler = speak("one two", f"three{END}")
    conversation = Conversation(policy)
    drawn = await ask(conversation, [user("a")], max_tokens=5)
    await ask(conversation, [user("a"), drawn.message, user("b")])
    (sample,) = segments(conversation)
    text = tokenizer.decode(sample.tokens)
    assert f"assistant\none t{END}\n<|im_start|>user\nb{END}" in text
    holds_the_truth(conversation, sampler)


async def test_a_call_that_cannot_be_read_is_text_for_programs(speak) -> None:
    policy, sampler = speak(f"Hm.<tool_call>add(1, 2)</tool_call>{END}", f"two{END}")
    conversation = Conversation(policy)
    drawn = await ask(conversation, [user("a")], tools=TOOLS)
    assert drawn.message == {"role": "assistant", "content": "Hm.\nadd(1, 2)"}
    await ask(conversation, [user("a"), drawn.message, user("b")], tools=TOOLS)
    assert len(segments(conversation)) == 1
    holds_the_truth(conversation, sampler)


async def test_rendered_histories_lose_their_thoughts_and_fork(speak, tokenizer) -> None:
    policy, sampler = speak(f"{THINK}one{END}", f"two{END}", f"three{END}")
    conversation = Conversation(policy, history="render")
    first = await ask(conversation, [user("a")])
    second = await ask(conversation, [user("a"), first.message, user("b")])
    await ask(conversation, [user("a"), first.message, user("b"), second.message, user("c")])
    one, two = segments(conversation)
    assert conversation.transcript.counts == {"fork: history rendered differently": 1}
    assert "hm" in tokenizer.decode(one.tokens)
    assert "hm" not in tokenizer.decode(two.tokens)
    assert sum(two.loss_mask) == len("two") + len("three") + 2  # the third turn extends the second
    holds_the_truth(conversation, sampler)


@pytest.mark.parametrize(("realign", "forks", "given_up"), [(0, 1, 0), (2, 1, 0), (3, 0, 3)])
async def test_a_trailing_difference_is_realigned_within_its_bound(
    speak, realign: int, forks: int, given_up: int
) -> None:
    policy, sampler = speak(f"one\n\n{END}", f"two{END}")  # the render has no blank lines before the end of the turn
    conversation = Conversation(policy, history="render", realign_tokens=realign)
    drawn = await ask(conversation, [user("a")])
    await ask(conversation, [user("a"), drawn.message, user("b")])
    found = segments(conversation)
    assert len(found) == 1 + forks
    assert conversation.transcript.counts["realigned tokens"] == given_up
    assert sum(sum(sample.loss_mask) for sample in found) == 6 + 4 - given_up
    last = [*sampler.requests[1].token_ids, *sampler.completions[1].tokens]
    assert any(list(sample.tokens) == last for sample in found)


async def test_raw_tokens_extend_realign_or_fork(speak) -> None:
    turns = [Completion([tag, tag], [-1.0, -1.0], [0, 0], "length") for tag in (50, 51, 52, 53)]
    policy, _ = speak(*turns)
    conversation = Conversation(policy, realign_tokens=1)
    await conversation.draw_tokens([1, 2])
    await conversation.draw_tokens([1, 2, 50, 50, 3])
    await conversation.draw_tokens([1, 2, 50, 50, 3, 51, 4])  # one token of the second turn is another
    await conversation.draw_tokens([1, 9])
    one, two = segments(conversation)
    assert one.tokens == [1, 2, 50, 50, 3, 51, 4, 52, 52]
    assert one.loss_mask == [0, 0, 1, 1, 0, 1, 0, 1, 1]
    assert (two.tokens, two.loss_mask) == ([1, 9, 53, 53], [0, 0, 1, 1])
    assert conversation.transcript.counts == {"realigned tokens": 1, "fork: other tokens": 1}


async def test_a_turn_that_is_being_gone_on_from_is_not_realigned(speak) -> None:
    """The first call is under way with all tokens of the turn when the second wants to give some of them up."""
    turns = [Completion([tag, tag], [-1.0, -1.0], [0, 0], "length") for tag in (50, 51, 52)]
    policy, sampler = speak(*turns)
    conversation = Conversation(policy, realign_tokens=1)
    await conversation.draw_tokens([1])
    gate, plain = asyncio.Event(), sampler.generate

    async def held(request: Any) -> Completion:
        if len(request.token_ids) == 4:
            await gate.wait()
        completion: Completion = await plain(request)
        return completion

    sampler.generate = held
    slow = asyncio.create_task(conversation.draw_tokens([1, 50, 50, 3]))
    await asyncio.sleep(0)
    await conversation.draw_tokens([1, 50, 4])
    gate.set()
    await slow
    assert sorted(list(sample.tokens) for sample in segments(conversation)) == [
        [1, 50, 4, 51, 51],
        [1, 50, 50, 3, 52, 52],
    ]


@pytest.mark.parametrize("messages", [[], [user("a"), {"role": "assistant", "content": "b"}]])
async def test_nothing_to_answer_is_refused(speak, messages: list[Any]) -> None:
    policy, _ = speak()
    with pytest.raises(RolloutContractError, match="nothing to answer"):
        await Conversation(policy).draw(messages)


async def test_a_lost_request_leaves_no_trace(speak) -> None:
    policy, sampler = speak(Completion([1], [0.0], [0], "abort"), f"ok{END}")
    conversation = Conversation(policy)
    with pytest.raises(Exception, match="broke a completion off"):
        await ask(conversation, [user("a")])
    await ask(conversation, [user("a")])
    assert len(segments(conversation)) == 1
    assert sum(segments(conversation)[0].loss_mask) == len(sampler.completions[1].tokens)
