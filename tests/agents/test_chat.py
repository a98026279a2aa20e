from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

import asyncrl
from asyncrl.errors import RolloutContractError
from asyncrl.types import Completion

END = "<|im_end|>"


def call(name: str, /, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@asyncrl.tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@asyncrl.tool
async def slow_then_fast(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return seconds


def drawn_tokens(sample: asyncrl.RolloutSample, values: Any) -> list[Any]:
    return [value for value, mask in zip(values, sample.loss_mask, strict=True) if mask]


async def test_a_single_turn_is_prompt_and_completion(speak, tokenizer) -> None:
    policy, sampler = speak(f"<think>\nhm\n</think>\n\n4{END}")
    chat = policy.chat("2+2?")
    assert await chat.run() == "4"
    sample = chat.sample(reward=1.0, why="right")
    completion = sampler.completions[0]
    prompt = tokenizer.encode(f"<|im_start|>user\n2+2?{END}\n<|im_start|>assistant\n")
    assert sample.tokens == [*prompt, *completion.tokens]
    assert sample.loss_mask == [0] * len(prompt) + [1] * len(completion.tokens)
    assert sample.logprobs == [0.0] * len(prompt) + completion.logprobs
    assert sample.reward == 1.0
    assert len(sample.info["turn_seconds"]) == 1
    assert {name: value for name, value in sample.info.items() if name != "turn_seconds"} == {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "hm"},
        ],
        "finish_reason": "stop",
        "turns": 1,
        "tool_calls": 0,
        "tool_errors": 0,
        "why": "right",
    }


async def test_turns_and_results_are_the_full_render_token_for_token(speak, tokenizer) -> None:
    policy, _ = speak(call("add", a=1, b=2) + END, f"So far.\n{call('add', a=3, b=4)}" + END, f"It is 7.{END}")
    chat = policy.chat([{"role": "system", "content": "Be short."}, {"role": "user", "content": "go"}], tools=[add])
    assert await chat.run() == "It is 7."
    assert [message["role"] for message in chat.messages] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    full = tokenizer.apply_chat_template(chat.messages, tools=[add.schema], tokenize=False)
    sample = chat.sample(reward=0.0)
    assert tokenizer.decode(sample.tokens) + "\n" == full
    assert [*sample.tokens, *tokenizer.encode("\n")] == tokenizer.encode(full)
    assert (chat.turns, chat.tool_calls, chat.tool_errors, chat.finish_reason) == (3, 2, 0, "stop")


async def test_only_the_samplers_tokens_are_trained_with_their_logprobs_and_versions(speak) -> None:
    policy, sampler = speak(call("add", a=1, b=2) + END, call("add", a=3, b=4) + END, f"7{END}")
    chat = policy.chat("go", tools=[add])
    await chat.run()
    sample = chat.sample(reward=0.0)
    for name in ("tokens", "logprobs", "versions"):
        drawn = [value for completion in sampler.completions for value in getattr(completion, name)]
        assert drawn_tokens(sample, getattr(sample, name)) == drawn
    assert set(drawn_tokens(sample, sample.versions)) == {0, 1, 2}


async def test_each_request_is_a_prefix_of_the_sample(speak) -> None:
    policy, sampler = speak(call("add", a=1, b=2) + END, f"3{END}", f"bye{END}")
    chat = policy.chat("go", tools=[add])
    await chat.run()
    await chat.step("thanks")
    sample = chat.sample(reward=0.0)
    for request, completion in zip(sampler.requests, sampler.completions, strict=True):
        seen = [*request.token_ids, *completion.tokens]
        assert sample.tokens[: len(seen)] == seen
    assert len(sample.tokens) == len(seen)


async def test_tokens_that_text_would_not_bring_back_are_kept(speak, tokenizer) -> None:
    """Half of a UTF-8 letter, and markup spelled letter by letter: the tokenizer would make other tokens of both."""
    spelled = [tokenizer.convert_tokens_to_ids(letter) for letter in "<|im_end|>"]
    half = tokenizer.encode("é")[:1]
    tokens = [*half, *spelled, tokenizer.eos_token_id]
    assert tokenizer.encode(tokenizer.decode(tokens)) != tokens
    policy, _ = speak(Completion(tokens, [-0.5] * len(tokens), [4] * len(tokens), "stop"), f"ok{END}")
    chat = policy.chat("go")
    await chat.run()
    await chat.step("again")
    sample = chat.sample(reward=0.0)
    assert drawn_tokens(sample, sample.tokens) == [*tokens, *tokenizer.encode(f"ok{END}")]


async def test_calls_of_one_turn_run_at_once_and_answer_in_order(speak) -> None:
    started = []
    together = asyncio.Event()

    async def meet(name: str) -> str:
        started.append(name)
        if len(started) == 3:
            together.set()
        await asyncio.wait_for(together.wait(), 30)  # one after the other they would never meet
        return name

    policy, _ = speak("".join(call("meet", name=name) for name in "abc") + END, f"done{END}")
    chat = policy.chat("go", tools=[meet])
    assert await chat.run() == "done"
    assert [message["content"] for message in chat.messages if message["role"] == "tool"] == ["a", "b", "c"]
    assert chat.tool_calls == 3


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<tool_call>add(1, 2)</tool_call>", "Error: this tool call cannot be read: not valid JSON"),
        (call("subtract", a=1), "Error: there is no tool 'subtract'. There is: add."),
        (call("add", a=1), "Error: bad arguments for add: b: Field required"),
    ],
)
async def test_a_call_that_fails_is_answered_and_counted(speak, said: str, answer: str) -> None:
    policy, _ = speak(said + END, f"sorry{END}")
    chat = policy.chat("go", tools=[add])
    assert await chat.run() == "sorry"
    assert chat.messages[2]["content"].startswith(answer)
    assert (chat.tool_calls, chat.tool_errors) == (1, 1)


async def test_a_turn_cut_at_its_limit_ends_the_chat(speak) -> None:
    policy, _ = speak("one two three" + END)
    chat = policy.chat("count", max_tokens=7)
    assert await chat.run() == "one two"
    assert chat.finish_reason == "length"
    assert sum(chat.sample(reward=0.0).loss_mask) == 7
    with pytest.raises(RolloutContractError, match="ended with finish_reason='length'"):
        await chat.step("go on")


async def test_turns_are_counted_and_the_last_calls_are_not_run(speak) -> None:
    runs = []

    def note() -> None:
        runs.append(1)

    policy, sampler = speak(*[call("note") + END] * 5)
    chat = policy.chat("go", tools=[note], max_turns=3)
    assert await chat.run() == ""
    assert (chat.finish_reason, chat.turns, chat.tool_calls, len(runs)) == ("max_turns", 3, 3, 2)
    assert len(sampler.requests) == 3
    with pytest.raises(RolloutContractError, match="max_turns"):
        await chat.step("more")


async def test_a_full_context_ends_the_chat_without_the_result_that_did_not_fit(speak) -> None:
    def read() -> str:
        return "x" * 300

    policy, sampler = speak(call("read") + END, f"done{END}", max_seq_len=700)
    chat = policy.chat("go", tools=[read])
    assert await chat.run() == "done"

    policy, sampler = speak(call("read") + END, f"done{END}", max_seq_len=500)
    chat = policy.chat("go", tools=[read])
    assert await chat.run() == ""
    assert chat.finish_reason == "context"
    sample = chat.sample(reward=0.0)
    assert sample.tokens == [*sampler.requests[0].token_ids, *sampler.completions[0].tokens]


async def test_a_turn_that_fills_the_context_says_so(speak, tokenizer) -> None:
    opening = len(tokenizer.encode(f"<|im_start|>user\ngo{END}\n<|im_start|>assistant\n"))
    policy, _ = speak("abcdefgh" + END, max_seq_len=opening + 5)
    chat = policy.chat("go")
    assert await chat.run() == "abcde"
    assert chat.finish_reason == "context"


async def test_an_opening_that_does_not_fit_is_an_error_in_the_data(speak) -> None:
    policy, _ = speak(f"x{END}", max_seq_len=10)
    with pytest.raises(RolloutContractError, match="max_seq_len is 10"):
        await policy.chat("much too long for that").run()


@pytest.mark.parametrize("messages", [None, {"role": "user", "content": "x"}, ["x"], 3], ids=repr)
async def test_what_are_no_messages_is_named(speak, messages: Any) -> None:
    policy, _ = speak()
    with pytest.raises(RolloutContractError, match=r"policy\.chat was given .* Expected a text, or a list"):
        policy.chat(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there are no messages yet to answer"),
        ([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}], "would answer itself"),
    ],
    ids=["none", "answered"],
)
async def test_messages_that_ask_for_nothing_are_refused(speak, messages: Any, message: str) -> None:
    policy, sampler = speak(f"x{END}")
    with pytest.raises(RolloutContractError, match=message):
        await policy.chat(messages).run()
    assert sampler.requests == []
    assert await policy.chat(messages).step("go on") == "x"


async def test_steps_by_hand_and_users_between_them(speak, tokenizer) -> None:
    policy, _ = speak(f"Hi.{END}", call("add", a=1, b=1) + END, f"2{END}")
    chat = policy.chat([{"role": "user", "content": "hello"}], tools=[add])
    assert (await chat.step(), chat.finish_reason) == ("Hi.", "stop")
    with pytest.raises(RolloutContractError, match="nothing new to answer"):
        await chat.step()
    assert (await chat.step("1+1?"), chat.finish_reason) == ("", None)
    assert (await chat.step(), chat.finish_reason) == ("2", "stop")
    full = tokenizer.apply_chat_template(chat.messages, tools=[add.schema], tokenize=False)
    assert tokenizer.decode(chat.sample(reward=0.0).tokens) + "\n" == full


async def test_two_turns_at_once_are_for_forks(speak) -> None:
    policy, sampler = speak(call("pause") + END, f"a{END}", f"b{END}")
    ready, go_on = asyncio.Event(), asyncio.Event()

    async def pause() -> None:
        """Wait."""
        ready.set()
        await go_on.wait()

    chat = policy.chat("x", tools=[pause])
    first = asyncio.create_task(chat.run())
    await ready.wait()
    with pytest.raises(RolloutContractError, match=r"middle of a turn.*chat\.fork\(\)"):
        await chat.run()
    go_on.set()
    assert await first == "a"
    assert len(sampler.requests) == 2
    assert await chat.step("and?") == "b"


async def test_a_user_may_speak_after_tool_results(speak, tokenizer) -> None:
    policy, _ = speak(call("add", a=1, b=1) + END, f"2{END}")
    chat = policy.chat("1+1?", tools=[add])
    await chat.step()
    await chat.step("hurry")
    full = tokenizer.apply_chat_template(chat.messages, tools=[add.schema], tokenize=False)
    assert tokenizer.decode(chat.sample(reward=0.0).tokens) + "\n" == full


async def test_a_sample_before_the_first_turn_is_refused(speak) -> None:
    policy, _ = speak()
    with pytest.raises(RolloutContractError, match=r"Await chat\.run\(\)"):
        policy.chat("x").sample(reward=0.0)


async def test_a_sample_is_not_changed_by_what_comes_after_it(speak) -> None:
    policy, _ = speak(f"a{END}", f"b{END}")
    chat = policy.chat("x")
    await chat.run()
    sample = chat.sample(reward=0.0)
    before = list(sample.tokens), list(sample.info["messages"])
    await chat.step("y")
    assert (sample.tokens, sample.info["messages"]) == before


async def test_the_messages_of_the_caller_are_not_touched(speak) -> None:
    mine = [{"role": "user", "content": "x"}]
    policy, _ = speak(f"a{END}")
    await policy.chat(mine).run()
    assert mine == [{"role": "user", "content": "x"}]


async def test_half_a_surrogate_pair_in_a_message_is_a_question_mark(speak, tokenizer) -> None:
    policy, sampler = speak(f"a{END}", f"b{END}")
    chat = policy.chat("\ud83d x")
    await chat.run()
    await chat.step("y \ud83d")
    assert "user\n? x" in tokenizer.decode(sampler.requests[0].token_ids)
    assert "user\ny ?" in tokenizer.decode(sampler.requests[1].token_ids)


async def test_a_tool_that_has_the_rollout_drawn_again_does_so_beside_other_calls_too(speak) -> None:
    async def broken() -> str:
        raise asyncrl.RecoverableRolloutError("the database is down")

    policy, _ = speak(call("broken") + call("add", a=1, b=2) + END)
    with pytest.raises(asyncrl.RecoverableRolloutError, match="the database is down"):
        await policy.chat("go", tools=[broken, add]).run()
