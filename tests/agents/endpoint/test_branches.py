"""Choices, branches, sub-agents and rewritten histories become segments of one run, and nothing is trained twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asyncrl.agents.endpoint import session
from asyncrl.errors import RolloutContractError
from asyncrl.types import RolloutRun
from tests.agents.endpoint.clients import anthropic_client, openai_client
from tests.agents.endpoint.conftest import END, assert_true_to_the_token, segments, turns


def user(text: str) -> Any:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_choices_are_branches_after_one_prompt(begin, stream: bool) -> None:
    policy, teller = begin(turns("one", "two", "three"))
    asked: Any = {"model": "m", "messages": [user("Count.")], "n": 3}
    async with openai_client(policy) as client:
        if stream:
            async with client.chat.completions.stream(**asked) as events:
                completion: Any = await events.get_final_completion()
        else:
            completion = await client.chat.completions.create(**asked)
    assert sorted(choice.message.content for choice in completion.choices) == ["one", "three", "two"]
    assert completion.choices[2].index == 2
    run = policy.captured_run(reward=0.5)
    assert isinstance(run, RolloutRun)
    assert len(run.segments) == 3
    assert_true_to_the_token(run, teller)
    prompts = {tuple(segment.tokens[: segment.loss_mask.index(1)]) for segment in run.segments}
    assert prompts == {tuple(teller.said[0][0])}


async def test_usage_counts_the_prompt_of_choices_once(begin) -> None:
    policy, teller = begin(turns("a", "b"))
    async with openai_client(policy) as client:
        usage = (await client.chat.completions.create(model="m", messages=[user("?")], n=2)).usage
    assert usage.prompt_tokens == len(teller.said[0][0])
    assert usage.completion_tokens == 4


async def test_each_choice_can_be_gone_on_from_and_what_they_share_is_trained_once(begin) -> None:
    policy, teller = begin(turns("Shared.", "left", "right", "more left", "more right"))
    opening = [user("Start.")]
    async with openai_client(policy) as client:

        async def say(history: list[Any], n: int = 1) -> list[str]:
            completion = await client.chat.completions.create(model="m", messages=history, n=n)
            return [str(choice.message.content) for choice in completion.choices]

        (shared,) = await say(opening)
        stem = [*opening, {"role": "assistant", "content": shared}, user("Split.")]
        for branch in await say(stem, n=2):
            await say([*stem, {"role": "assistant", "content": branch}, user("Go on.")])
    run = policy.captured_run(reward=1.0)
    assert len(segments(run)) == 2
    assert_true_to_the_token(run, teller)
    assert policy.captured.transcript.counts == {"fork: branch": 1}


async def test_sub_agents_at_the_same_time_become_segments(begin) -> None:
    policy, teller = begin(lambda text: ("B" if "be B" in text else "A") + END)

    async def work(client: Any, name: str) -> list[str]:
        history: list[Any] = [{"role": "system", "content": f"be {name}"}]
        said = []
        for turn in range(3):
            history.append(user(f"turn {turn}"))
            message = (await client.chat.completions.create(model="m", messages=history)).choices[0].message
            history.append(message)
            said.append(message.content)
        return said

    async with openai_client(policy) as client:
        assert await asyncio.gather(*(work(client, name) for name in "ABAB")) == [["A"] * 3, ["B"] * 3] * 2
    run = policy.captured_run(reward=1.0)
    assert_true_to_the_token(run, teller)
    assert len(teller.said) == 12


async def test_a_rewritten_history_forks_and_is_counted(begin) -> None:
    policy, teller = begin(turns("A long answer.", "Another."))
    async with anthropic_client(policy) as client:
        await client.messages.create(model="m", max_tokens=99, messages=[user("First.")])
        rewritten: Any = [user("First."), {"role": "assistant", "content": "(summary)"}, user("Second.")]
        await client.messages.create(model="m", max_tokens=99, messages=rewritten)
    run = policy.captured_run(reward=1.0)
    assert len(segments(run)) == 2
    assert_true_to_the_token(run, teller)
    assert policy.captured.transcript.counts == {"fork: history rewritten": 1}
    assert segments(run)[0].info["transcript"] == {"fork: history rewritten": 1}


async def test_two_rollouts_at_once_do_not_mix(begin) -> None:
    """The same messages under two keys, turn by turn."""
    left, left_teller = begin(lambda text: "left" + END)
    right, right_teller = begin(lambda text: "right" + END)
    async with openai_client(left) as one, openai_client(right) as other:
        histories: dict[Any, list[Any]] = {one: [], other: []}
        for turn in range(3):
            for client, history in histories.items():
                history.append(user(str(turn)))
                history.append((await client.chat.completions.create(model="m", messages=history)).choices[0].message)
    assert [message.content for message in histories[one][1::2]] == ["left"] * 3
    for policy, teller in ((left, left_teller), (right, right_teller)):
        run = policy.captured_run(reward=0.0)
        assert len(segments(run)) == 1
        assert_true_to_the_token(run, teller)
        assert policy.captured.transcript.counts == {}


async def test_responses_go_on_from_any_earlier_one_of_their_rollout_alone(begin) -> None:
    policy, teller = begin(turns("stem", "left", "right"))
    async with openai_client(policy) as client:
        stem = await client.responses.create(model="m", input="?", instructions="Be brief.")
        for side in ("left", "right"):
            response = await client.responses.create(
                model="m", input=side, instructions="Be brief.", previous_response_id=stem.id
            )
            assert response.output_text == side
    run = policy.captured_run(reward=1.0)
    assert len(segments(run)) == 2
    assert_true_to_the_token(run, teller)
    assert policy.captured.transcript.counts == {"fork: branch": 1}


async def test_a_history_that_is_sent_whole_with_every_call_is_kept_once(begin, endpoint) -> None:
    policy, _ = begin(lambda text: "said" + END)
    history: list[Any] = []
    async with openai_client(policy) as client:
        for turn in range(4):
            history.append(user(f"turn {turn}"))
            history += (await client.responses.create(model="m", input=history)).output
    past = endpoint._sessions[policy.openai_api_key].past
    assert [len(messages) for messages in past.values()] == [2, 4, 6, 8]
    assert len({id(message) for messages in past.values() for message in messages}) == 5  # it always said the same


async def test_a_turn_that_nobody_read_leaves_the_words_before_it_in_the_log(begin) -> None:
    policy, _ = begin(turns("one", "two"))
    asked = [user("a"), {"role": "assistant", "content": "one"}, user("b")]
    await policy.captured.draw(asked[:1])
    unread = await policy.captured.draw(asked)
    policy.captured.transcript.drop(unread.node, "the client closed the connection")
    assert policy.captured_run(reward=0.0).info["messages"] == asked[:2]


async def test_branches_without_end_take_their_turn_and_end_at_the_limit(begin) -> None:
    """Some of 200 calls draw, the others wait in line, and those over the limit are told so at once."""
    policy, teller = begin(lambda text: "x" + END)
    teller.gate.clear()
    async with openai_client(policy, timeout=60) as client:
        bomb = asyncio.gather(
            *(client.completions.create(model="m", prompt=[[n % 90, n // 90 + 1]]) for n in range(200)),
            client.completions.create(model="m", prompt="x", n=101),
            return_exceptions=True,
        )
        await asyncio.sleep(0.5)
        teller.gate.set()
        results = await bomb
    refused = [result for result in results if isinstance(result, BaseException)]
    assert len(refused) == 101
    assert {getattr(error, "status_code", None) for error in refused} == {429}
    assert "endpoint.max_calls=100" in str(refused[0])
    assert len(teller.said) == 100
    assert teller.most_busy <= session.CONCURRENT_DRAWS
    assert_true_to_the_token(policy.captured_run(reward=0.0), teller)


async def test_a_run_without_a_call_says_what_to_do(begin) -> None:
    policy, _ = begin(turns())
    with pytest.raises(RolloutContractError, match=r"base_url=policy\.openai_base_url"):
        policy.captured_run(reward=1.0)
