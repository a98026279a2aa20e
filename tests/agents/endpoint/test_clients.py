"""Unmodified clients and an agent framework against the endpoint, token for token."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from asyncrl.types import RolloutSample
from tests.agents.endpoint.clients import AGENTS, FUNCTION, QUESTION, SYSTEM, add, anthropic_client, openai_client
from tests.agents.endpoint.conftest import assert_true_to_the_token, call, turns

ASKED: Any = [{"role": "user", "content": "?"}]
RESPONSES_TOOL = {"type": "function", "strict": False, **FUNCTION}
FRAMEWORK = "openai-agents"
SAID = (
    f"<think>\nI had better use it.\n</think>\n\nLet me see.\n{call('add', a=2, b=3)}",
    f"{call('add', a=2, b=2)}\n{call('add', a=1, b=1)}",
    "<think>\nDone.\n</think>\n\nIt is 5.",
)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("agent", AGENTS)
async def test_an_agent_becomes_the_run_that_the_native_chat_would_be(begin, agent: str, stream: bool) -> None:
    policy, teller = begin(turns(*SAID))
    assert await AGENTS[agent](policy, stream) == "It is 5."
    run = policy.captured_run(reward=1.0, who=agent)
    assert isinstance(run, RolloutSample)
    assert_true_to_the_token(run, teller)
    assert policy.captured.transcript.counts == {}
    assert run.info["who"] == agent
    assert [message["role"] for message in run.info["messages"]] == [
        "system", "user", "assistant", "tool", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip

    native, _ = begin(turns(*SAID))
    chat = native.chat([{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}], tools=[add])
    assert await chat.run() == "It is 5."
    expected = chat.sample(reward=1.0)
    if agent.startswith(FRAMEWORK):  # it writes the schema of a tool in its own way, and that alone
        start = expected.loss_mask.index(1)
        assert run.tokens[run.loss_mask.index(1) :] == expected.tokens[start:]
    else:
        assert run.tokens == expected.tokens
        assert run.loss_mask == expected.loss_mask


async def test_thoughts_come_in_the_words_of_each_api(begin) -> None:
    policy, _ = begin(turns(*["<think>\nhm\n</think>\n\nYes."] * 6))
    asked: Any = [{"role": "user", "content": "?"}]
    async with openai_client(policy) as client:
        said = (await client.chat.completions.create(model="m", messages=asked)).choices[0].message
        assert (said.content, said.reasoning_content) == ("Yes.", "hm")
        response = await client.responses.create(model="m", input="?")
        assert [item.type for item in response.output] == ["reasoning", "message"]
        assert response.output[0].content[0].text == "hm"
        assert response.output_text == "Yes."
    async with anthropic_client(policy) as client:
        asked_for_none = await client.messages.create(model="m", max_tokens=99, messages=asked)
        assert [block.type for block in asked_for_none.content] == ["text"]
        thinking: Any = {"type": "enabled", "budget_tokens": 1024}
        message = await client.messages.create(model="m", max_tokens=99, messages=asked, thinking=thinking)
        assert [(block.type, getattr(block, "thinking", None)) for block in message.content] == [
            ("thinking", "hm"),
            ("text", None),
        ]


async def test_usage_logprobs_and_limits_are_real(begin, tokenizer) -> None:
    policy, teller = begin(turns("abcdef", "abcdef", "abcdef", "abcdef"))
    asked: Any = [{"role": "user", "content": "?"}]
    async with openai_client(policy) as client:
        whole = await client.chat.completions.create(model="m", messages=asked, logprobs=True)
        context, drawn = teller.said[0]
        usage = whole.usage
        assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
            len(context), len(drawn.tokens), len(context) + len(drawn.tokens),
        )  # fmt: skip
        assert [entry.logprob for entry in whole.choices[0].logprobs.content] == list(drawn.logprobs)
        assert [entry.token for entry in whole.choices[0].logprobs.content] == [*"abcdef", "<|im_end|>"]
        assert whole.system_fingerprint == "policy-v5"

        cut = await client.chat.completions.create(model="m", messages=asked, max_completion_tokens=3)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("abc", "length")
        response = await client.responses.create(model="m", input="?", max_output_tokens=4)
        assert (response.output_text, response.status) == ("abcd", "incomplete")
        assert response.incomplete_details.reason == "max_output_tokens"
    async with anthropic_client(policy) as client:
        message = await client.messages.create(model="m", max_tokens=5, messages=asked)
        assert (message.content[0].text, message.stop_reason) == ("abcde", "max_tokens")
        assert message.usage.output_tokens == 5


async def test_max_tokens_of_a_client_cannot_exceed_that_of_the_run(begin) -> None:
    policy, teller = begin(turns("a" * 1000))
    async with anthropic_client(policy) as client:
        await client.messages.create(model="m", max_tokens=20_000, messages=[{"role": "user", "content": "?"}])
    assert len(teller.said[0][1].tokens) == 512


async def test_a_call_that_cannot_be_read_stays_text(begin) -> None:
    policy, teller = begin(turns("Well.\n<tool_call>add(1, 2)</tool_call>", "Sorry."))
    asked: Any = [{"role": "user", "content": "?"}]
    async with openai_client(policy) as client:
        said = (await client.chat.completions.create(model="m", messages=asked, tools=[add.schema])).choices[0]
        assert said.finish_reason == "stop"
        assert said.message.tool_calls is None
        assert "add(1, 2)" in said.message.content
        asked += [said.message, {"role": "user", "content": "I do not understand."}]
        await client.chat.completions.create(model="m", messages=asked, tools=[add.schema])
    run = policy.captured_run(reward=0.0)
    assert isinstance(run, RolloutSample)
    assert_true_to_the_token(run, teller)


async def test_tools_are_not_shown_to_a_client_that_wants_no_calls(begin) -> None:
    policy, teller = begin(turns("1", "2", "3"))
    asked: Any = [{"role": "user", "content": "?"}]
    async with openai_client(policy) as client:
        await client.chat.completions.create(model="m", messages=asked, tools=[add.schema], tool_choice="none")
        tool: Any = {"type": "function", **add.schema["function"]}
        await client.responses.create(model="m", input="?", tools=[tool], tool_choice="none")
    async with anthropic_client(policy) as client:
        schema: Any = {"name": "add", "input_schema": {"type": "object"}}
        none: Any = {"type": "none"}
        await client.messages.create(model="m", max_tokens=9, messages=asked, tools=[schema], tool_choice=none)
    assert {teller.tokenizer.decode(context) for context, _ in teller.said} == {
        "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    }


async def test_models_and_token_counts(begin, tokenizer) -> None:
    policy, teller = begin(turns("x"))
    asked: Any = [{"role": "user", "content": "How many?"}]
    async with openai_client(policy) as client:
        assert [model.id async for model in client.models.list()] == ["policy"]
        assert (await client.models.retrieve("Qwen/Qwen3-0.6B")).id == "Qwen/Qwen3-0.6B"
    async with anthropic_client(policy) as client:
        assert [model.id async for model in client.models.list()] == ["policy"]
        counted = await client.messages.count_tokens(model="m", messages=asked, system="Count.")
        message = await client.messages.create(model="m", max_tokens=9, messages=asked, system="Count.")
    assert counted.input_tokens == message.usage.input_tokens == len(teller.said[0][0])


async def test_what_is_not_honoured_is_said_once_for_a_run(begin, capsys) -> None:
    policy, _ = begin(lambda text: "x<|im_end|>")
    asked: Any = [{"role": "user", "content": "?"}]
    json_object: Any = {"type": "json_object"}
    async with openai_client(policy) as client:
        for _ in range(3):
            await client.chat.completions.create(model="m", messages=asked, temperature=1.0, top_p=1, seed=1)
        assert capsys.readouterr().out == ""
        for _ in range(3):
            await client.chat.completions.create(
                model="m", messages=asked, temperature=0, response_format=json_object, tool_choice="required"
            )
    told = [line for line in capsys.readouterr().out.splitlines() if "not honoured" in line]
    assert sorted(line.split("ask the endpoint for ")[1].split(",")[0] for line in told) == [
        "response_format", "temperature", "tool_choice",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "asked", "kind", "piece"),
    [
        ("/chat/completions", {"messages": ASKED, "logprobs": True}, ChatCompletion, ChatCompletionChunk),
        ("/completions", {"prompt": "?", "logprobs": 1}, Completion, Completion),
        ("/responses", {"input": "?", "tools": [RESPONSES_TOOL]}, Response, ResponseStreamEvent),
        ("/messages", {"messages": ASKED, "thinking": {"type": "adaptive"}}, Message, RawMessageStreamEvent),
    ],
)
async def test_answers_are_what_the_types_of_the_libraries_say(
    begin, path: str, asked: dict[str, Any], kind: Any, piece: Any
) -> None:
    """The clients themselves take nearly anything; frameworks on top of them check (pydantic-ai does)."""
    policy, _ = begin(turns(*[SAID[0]] * 2))
    headers = {"Authorization": f"Bearer {policy.openai_api_key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        url = policy.openai_base_url + path
        async with session.post(url, json={"model": "m", **asked}) as answer:
            TypeAdapter(kind).validate_json(await answer.read())
        async with session.post(url, json={"model": "m", "stream": True, **asked}) as answer:
            lines = (await answer.text()).splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    assert len(data) > 1 or path == "/completions"
    for event in data:
        TypeAdapter(piece).validate_json(event)


async def test_the_log_of_a_rollout_can_be_written(begin) -> None:
    policy, _ = begin(turns(*SAID))
    await AGENTS["anthropic"](policy, False)
    run = policy.captured_run(reward=1.0)
    assert json.loads(json.dumps(run.info))["messages"][-1]["content"] == "It is 5."
