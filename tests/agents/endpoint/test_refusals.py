"""What is refused, in the words of each API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from asyncrl.agents.endpoint import server, session
from asyncrl.agents.template import TurnTemplate
from asyncrl.errors import LimitReached, ModelError, SamplerError, SamplerRequestError
from asyncrl.rollout.failures import is_recoverable
from tests.agents.endpoint.clients import anthropic_client, openai_client
from tests.agents.endpoint.conftest import END, turns, until

ASKED: Any = [{"role": "user", "content": "?"}]
Ask = Callable[[Any], Any]
EVERY_WAY: dict[str, Ask] = {
    "chat": lambda client: client.chat.completions.create(model="m", messages=ASKED),
    "chat stream": lambda client: client.chat.completions.create(model="m", messages=ASKED, stream=True),
    "completions": lambda client: client.completions.create(model="m", prompt="?"),
    "responses": lambda client: client.responses.create(model="m", input="?"),
    "messages": lambda client: client.messages.create(model="m", max_tokens=9, messages=ASKED),
    "messages stream": lambda client: client.messages.create(model="m", max_tokens=9, messages=ASKED, stream=True),
}


def client_for(way: str, policy: Any, **options: Any) -> Any:
    return (anthropic_client if way.startswith("messages") else openai_client)(policy, **options)


def library(way: str) -> Any:
    return anthropic if way.startswith("messages") else openai


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_a_foreign_key_and_a_key_whose_rollout_has_ended(begin, way: str) -> None:
    policy, teller = begin(lambda text: "x" + END)
    async with client_for(way, policy) as client:
        with pytest.raises(library(way).AuthenticationError, match="not that of a running rollout"):
            await EVERY_WAY[way](client.with_options(api_key="sk-asyncrl-guess"))
        await EVERY_WAY[way](client)
        policy.close()
        with pytest.raises(library(way).AuthenticationError):
            await EVERY_WAY[way](client)
    assert len(teller.said) == 1


async def test_no_key_is_refused_before_the_body_is_read(begin) -> None:
    policy, _ = begin(turns())
    async with aiohttp.ClientSession() as session:
        for path in (*server.ROUTES, "/v1/messages/count_tokens"):
            async with session.post(policy.anthropic_base_url + path, data=b"garbage") as answer:
                body = await answer.json()
                assert answer.status == 401
                assert "key" in body["error"]["message"]
        async with session.get(policy.openai_base_url + "/models") as answer:
            assert answer.status == 401


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_a_body_that_is_too_large(begin, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(server, "MAX_BODY_BYTES", 1 << 16)
    policy, teller = begin(turns())
    url, key = policy.openai_base_url, policy.openai_api_key
    path = {"chat": "/chat/completions", "completions": "/completions", "responses": "/responses"}
    async with aiohttp.ClientSession(headers={"x-api-key": key}) as session:
        huge = b'{"x": "' + b"x" * (1 << 17) + b'"}'
        async with session.post(url + path.get(way.split()[0], "/messages"), data=huge) as answer:
            error = (await answer.json())["error"]
            assert answer.status == 413
            assert "65536 bytes" in error["message"]
            assert error["type"] == ("request_too_large" if way.startswith("messages") else "invalid_request_error")
    assert teller.said == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"garbage",
        b"[]",
        b'{"model": 3}',
        b'{"model": "m", "messages": "x"}',
        b'"\\ud800"',
        b"\xff\xfe",
        b"[" * 9999,
    ],
)
async def test_garbage_is_a_400_on_every_route(begin, body: bytes) -> None:
    policy, teller = begin(turns())
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {policy.openai_api_key}"}) as session:
        for path in server.ROUTES:
            if path.endswith("responses") and body.startswith(b'{"model": "m"'):
                continue  # no garbage there: messages mean nothing
            async with session.post(policy.anthropic_base_url + path, data=body) as answer:
                assert answer.status == 400, await answer.text()
                assert (await answer.json())["error"]["message"]
    assert teller.said == []


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "message 0"),
        ({"messages": ["x"]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": 3}]}, "int"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "I am"}]}, "assistant"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"tools": [{"type": "function", "function": {}}]}, "name"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"n": 0}, "n:"),
        ({"n": 129}, "n:"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
    ],
)
async def test_what_a_chat_cannot_have_is_named(begin, asked: dict[str, Any], named: str) -> None:
    policy, teller = begin(turns())
    async with openai_client(policy) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{"model": "m", "messages": ASKED, **asked})
    assert named in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"
    assert teller.said == []


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"tools": [{"type": "web_search"}]}, "web_search"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
    ],
)
async def test_what_a_response_cannot_have_is_named(begin, asked: dict[str, Any], named: str) -> None:
    policy, _ = begin(turns())
    async with openai_client(policy) as client:
        with pytest.raises(openai.BadRequestError, match=named):
            await client.responses.create(**{"model": "m", "input": "?", **asked})


async def test_a_response_that_is_not_there(begin) -> None:
    policy, _ = begin(lambda text: "x" + END)
    other, _ = begin(lambda text: "x" + END)
    async with openai_client(policy) as client, openai_client(other) as stranger:
        theirs = await stranger.responses.create(model="m", input="?")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.responses.create(model="m", input="?", previous_response_id=theirs.id)
    assert caught.value.body["code"] == "previous_response_not_found"


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "document"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "{"}]}, "assistant"),
    ],
)
async def test_what_a_message_cannot_have_is_named(begin, asked: dict[str, Any], named: str) -> None:
    policy, _ = begin(turns())
    async with anthropic_client(policy) as client:
        with pytest.raises(anthropic.BadRequestError, match=named) as caught:
            await client.messages.create(**{"model": "m", "max_tokens": 9, "messages": ASKED, **asked})
    assert caught.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_a_full_context_is_told_as_such(begin, way: str) -> None:
    policy, teller = begin(turns(), max_seq_len=1)
    async with client_for(way, policy) as client:
        with pytest.raises(library(way).BadRequestError, match="max_seq_len is 1") as caught:
            await EVERY_WAY[way](client)
    if library(way) is openai:
        assert caught.value.body["code"] == "context_length_exceeded"
    assert is_recoverable(caught.value)  # an agent that does not catch it costs one rollout, and not the run
    assert teller.said == []


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_what_is_far_too_long_is_refused_before_it_is_made_into_tokens(
    begin, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(session, "MOST_CHARS_PER_TOKEN", 0)
    monkeypatch.setattr(TurnTemplate, "encode", None)
    policy, teller = begin(turns())
    async with client_for(way, policy) as client:
        with pytest.raises(library(way).BadRequestError, match="context_length_exceeded: the context has 1 characters"):
            await EVERY_WAY[way](client)
    assert teller.said == []


async def test_unknown_routes_and_methods(begin) -> None:
    policy, _ = begin(turns())
    async with aiohttp.ClientSession(headers={"x-api-key": policy.openai_api_key}) as session:
        async with session.post(policy.openai_base_url + "/embeddings", json={}) as answer:
            assert answer.status == 404
            assert "/v1/chat/completions" in (await answer.json())["error"]["message"]
        async with session.get(policy.openai_base_url + "/messages") as answer:
            assert answer.status == 405
            assert (await answer.json())["type"] == "error"


@pytest.mark.parametrize(
    ("error", "status", "tries"),
    [
        (SamplerRequestError("the replica is gone"), 503, 2),
        (SamplerRequestError("too long", status=400, recoverable=False), 400, 1),
        (SamplerError("the server died"), 503, 1),
        (LimitReached("it forks without end"), 429, 1),
        (ModelError("no chat template"), 400, 1),
    ],
)
@pytest.mark.parametrize("way", ["chat", "chat stream", "messages"])
async def test_errors_of_the_sampler_are_told_and_tried_again_where_it_helps(
    begin, way: str, error: Exception, status: int, tries: int
) -> None:
    asked = []

    def fail(text: str) -> str:
        asked.append(text)
        raise error

    policy, _ = begin(fail)
    async with client_for(way, policy, max_retries=1) as client:
        with pytest.raises(library(way).APIStatusError, match=str(error)) as caught:
            await EVERY_WAY[way](client)
    assert caught.value.status_code == status
    assert len(asked) == tries


async def test_a_fault_of_the_engine_is_a_500_and_logged(begin, capsys) -> None:
    def fail(text: str) -> str:
        raise RuntimeError("a fault in the engine")

    policy, _ = begin(fail)
    async with openai_client(policy, max_retries=1) as client:
        with pytest.raises(openai.InternalServerError, match="RuntimeError: a fault in the engine"):
            await EVERY_WAY["chat"](client)
    assert "the endpoint failed" in capsys.readouterr().out


async def test_choices_that_fail_together_leave_nothing_behind(begin) -> None:
    said = []

    def fail_at_third(text: str) -> str:
        said.append(text)
        if len(said) == 3:
            raise SamplerRequestError("lost")
        return "x" + END

    policy, _ = begin(fail_at_third)
    async with openai_client(policy) as client:
        with pytest.raises(openai.InternalServerError, match="lost"):
            await client.chat.completions.create(model="m", messages=ASKED, n=3)
        await client.chat.completions.create(model="m", messages=ASKED)
    assert len(policy.captured.transcript.turns) == 1
    assert policy.captured.transcript.counts["drop: another choice of its call failed"] == 2


async def test_a_rollout_that_ends_while_a_body_is_read(begin) -> None:
    policy, teller = begin(turns())

    async def body() -> AsyncIterator[bytes]:
        yield b'{"model": "m", "prompt": '
        await asyncio.sleep(0.05)
        policy.close()
        yield b'"x"}'

    headers = {"Authorization": f"Bearer {policy.openai_api_key}"}
    url = policy.openai_base_url + "/completions"
    async with aiohttp.ClientSession(headers=headers) as session, session.post(url, data=body()) as answer:
        assert answer.status == 401
        assert "has ended" in (await answer.json())["error"]["message"]
    assert teller.said == []


@pytest.mark.parametrize("way", EVERY_WAY)
async def test_the_end_of_a_rollout_ends_its_calls(begin, way: str) -> None:
    policy, teller = begin(turns())
    teller.gate.clear()
    async with client_for(way, policy) as client:
        calls = [asyncio.create_task(EVERY_WAY[way](client)) for _ in range(3)]
        await until(lambda: teller.busy == 3)
        policy.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {library(way).AuthenticationError}
    assert teller.busy == 0


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [*ASKED, {"role": "assistant", "tool_calls": 5}, *ASKED]}),
        ("/v1/completions", {"prompt": [10**30]}),
        ("/v1/responses", {"input": [*ASKED, 5]}),
    ],
)
async def test_values_of_a_wrong_type_are_a_400(begin, path: str, asked: dict[str, Any]) -> None:
    policy, teller = begin(turns())
    async with (
        aiohttp.ClientSession(headers={"x-api-key": policy.openai_api_key}) as session,
        session.post(policy.anthropic_base_url + path, json=asked) as answer,
    ):
        assert answer.status == 400, await answer.text()
    assert teller.said == []


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (
            "/v1/chat/completions",
            {
                "messages": [
                    *ASKED,
                    {"role": "assistant", "tool_calls": [{**CALL, "id": ["a"]}]},
                    {"role": "tool", "tool_call_id": ["a"], "content": "x"},
                ]
            },
        ),
        ("/v1/responses", {"input": [*ASKED, {"type": "reasoning", "summary": "hm"}, *ASKED]}),
        ("/v1/responses", {"input": "?", "text": {"format": "json"}}),
    ],
    ids=["ids", "thoughts", "format"],
)
async def test_odd_values_that_nobody_needs_do_no_harm(begin, path: str, asked: dict[str, Any]) -> None:
    policy, _ = begin(turns("x"))
    headers = {"Authorization": f"bearer {policy.openai_api_key}"}  # as for HTTP, the scheme is in any case
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(policy.anthropic_base_url + path, json=asked) as answer,
    ):
        assert answer.status == 200, await answer.text()


async def test_a_body_that_is_not_packed_as_it_says_is_a_400(begin) -> None:
    policy, _ = begin(turns())
    headers = {"Authorization": f"Bearer {policy.openai_api_key}", "Content-Encoding": "gzip"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{policy.openai_base_url}/chat/completions", data=b"zzz") as answer,
    ):
        assert answer.status == 400
        assert "cannot be read" in (await answer.json())["error"]["message"]
