"""Where conversations end, and where they part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from asyncrl.agents import conversation
from asyncrl.config import ChatConfig
from asyncrl.errors import LimitReached, RecoverableRolloutError, RolloutContractError
from asyncrl.rollout.contract import Contract
from asyncrl.types import RolloutRun, RolloutSample

END = "<|im_end|>"
CALL = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>' + END


def look() -> str:
    return "x" * 200


LIMITS: dict[str, tuple[tuple[str, ...], dict[str, Any], int]] = {
    "length": ((CALL, "much too long for that"), {"max_tokens": 60}, 4096),
    "total_tokens": ((CALL, "much too long for that"), {"max_total_tokens": 60}, 4096),
    "context": ((CALL, "much too long for that" * 20), {}, 700),
    "max_turns": ((CALL, CALL), {"max_turns": 2}, 4096),
}


async def run(speak: Callable[..., Any], limit: str, choice: str) -> tuple[Any, Any]:
    turns, settings, max_seq_len = LIMITS[limit]
    turns = tuple(turn * 5 if turn.startswith("much") else turn for turn in turns)
    policy, sampler = speak(*turns, max_seq_len=max_seq_len)
    chat = policy.chat("go", tools=[look], on_limit={limit: choice}, **settings)
    await chat.run()
    return chat, sampler


@pytest.mark.parametrize("limit", LIMITS)
async def test_stop_trains_what_was_drawn(speak, limit: str) -> None:
    chat, sampler = await run(speak, limit, "stop")
    assert (chat.finish_reason, chat.turns) == (limit, 2)
    sample = chat.sample(0.0)
    assert sum(sample.loss_mask) == sum(len(completion.tokens) for completion in sampler.completions)
    assert sample.info["finish_reason"] == limit


@pytest.mark.parametrize("limit", LIMITS)
async def test_truncate_gives_a_cut_turn_up(speak, limit: str) -> None:
    chat, sampler = await run(speak, limit, "truncate")
    assert chat.finish_reason == limit
    sample = chat.sample(0.0)
    first = len(sampler.completions[0].tokens)
    if limit == "max_turns":  # its last turn is whole
        assert (sum(sample.loss_mask), chat.turns) == (2 * first, 2)
        return
    assert (sum(sample.loss_mask), chat.turns) == (first, 1)
    assert sample.tokens == [*sampler.requests[0].token_ids, *sampler.completions[0].tokens]
    assert sample.info["transcript"] == {f"drop: {limit}": 1}


@pytest.mark.parametrize("limit", LIMITS)
async def test_error_draws_the_rollout_again(speak, limit: str) -> None:
    with pytest.raises(LimitReached, match=f"its limit '{limit}' in turn 2") as caught:
        await run(speak, limit, "error")
    assert isinstance(caught.value, RecoverableRolloutError)


async def test_a_first_turn_that_is_cut_leaves_nothing(speak) -> None:
    policy, _ = speak("too long")
    with pytest.raises(LimitReached, match="nothing to train"):
        await policy.chat("go", max_tokens=3, on_limit="truncate").run()


async def test_no_turn_begins_once_all_tokens_are_drawn(speak) -> None:
    policy, sampler = speak(CALL, "never")
    chat = policy.chat("go", tools=[look], max_total_tokens=len(policy.tokenizer.encode(CALL)))
    await chat.run()
    assert (chat.finish_reason, chat.turns, len(sampler.requests)) == ("total_tokens", 1, 1)


async def test_branches_without_end_end(speak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "MOST_TURNS", 3)
    policy, sampler = speak(*[f"one{END}"] * 10)
    chat = policy.chat("go")
    await chat.run()
    await chat.fork().step("again")
    await chat.fork().step("again")
    with pytest.raises(LimitReached, match="3 turns") as caught:
        await chat.fork().step("again")
    assert isinstance(caught.value, RecoverableRolloutError)
    assert len(sampler.requests) == 3


async def test_the_settings_of_the_run_are_the_defaults(speak) -> None:
    policy, _ = speak("too long")
    policy._context.chat = ChatConfig(on_limit={"length": "error"})
    with pytest.raises(LimitReached):
        await policy.chat("go", max_tokens=3).run()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"on_limit": "halt"}, "on_limit is 'halt'. Expected one of stop, truncate, error"),
        ({"on_limit": {"lenght": "error"}}, "on_limit is {'lenght'.*length, context, max_turns, total_tokens"),
        ({"on_limit": {"length": "halt"}}, "on_limit is {'length': 'halt'}"),
        ({"history": "rendered"}, "history is 'rendered'. Expected one of keep, render"),
    ],
    ids=["choice", "limit", "choice of a limit", "history"],
)
async def test_a_choice_that_is_none_is_refused(speak, asked: Any, message: str) -> None:
    policy, _ = speak()
    with pytest.raises(RolloutContractError, match=message):
        policy.chat("go", **asked)


async def test_a_forked_chat_shares_what_was_said_before(speak) -> None:
    policy, sampler = speak(f"one{END}", f"left{END}", f"right{END}")
    left = policy.chat("go")
    await left.run()
    right = left.fork()
    assert (await left.step("l"), await right.step("r")) == ("left", "right")
    assert [message["content"] for message in right.messages] == ["go", "one", "r", "right"]
    rollout = left.sample(1.0)
    assert isinstance(rollout, RolloutRun)
    assert right.sample(1.0).segments == rollout.segments
    one, two = rollout.segments
    assert (sum(one.loss_mask), sum(two.loss_mask)) == (4 + 5, 6)
    assert [segment.info["messages"][-1]["content"] for segment in rollout.segments] == ["left", "right"]
    for segment, index in ((one, 1), (two, 2)):
        assert segment.tokens == [*sampler.requests[index].token_ids, *sampler.completions[index].tokens]
    Contract().check(rollout, oldest=0, newest=9)


async def test_a_chat_that_renders_its_history_forks_where_the_render_differs(speak) -> None:
    policy, _ = speak(f"<think>\nhm\n</think>\n\none{END}", f"two{END}")
    chat = policy.chat("a", history="render")
    await chat.run()
    await chat.step("b")
    rollout = chat.sample(1.0)
    assert isinstance(rollout, RolloutRun)
    assert ["hm" in policy.tokenizer.decode(segment.tokens) for segment in rollout.segments] == [True, False]

    kept, _ = speak(f"<think>\nhm\n</think>\n\none{END}", f"two{END}")
    chat = kept.chat("a")
    await chat.run()
    await chat.step("b")
    assert isinstance(chat.sample(1.0), RolloutSample)
