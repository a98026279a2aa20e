"""Connections that last, drop, or end with the server."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from yarl import URL

from asyncrl.agents.endpoint import Endpoint, server
from asyncrl.agents.policy import Policy
from asyncrl.config import EndpointConfig
from asyncrl.errors import ConfigError, SamplerRequestError
from tests.agents.endpoint.clients import anthropic_client, openai_client
from tests.agents.endpoint.conftest import END, Teller, assert_true_to_the_token, turns, until

ASKED: Any = [{"role": "user", "content": "?"}]


async def connect(policy: Policy, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request for a chat completion on a bare socket."""
    url = URL(policy.openai_base_url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nx-api-key: {policy.openai_api_key}\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("pinged", [False, True], ids=["before", "after the first ping"])
async def test_a_dropped_connection_frees_the_sampler_and_leaves_no_turn(
    begin, monkeypatch: pytest.MonkeyPatch, stream: bool, pinged: bool
) -> None:
    if pinged:
        monkeypatch.setattr(server, "PING_S", 0.01)
    policy, teller = begin(turns("read", "never read"))
    teller.gate.clear()
    reader, writer = await connect(policy, {"model": "m", "messages": ASKED, "stream": stream})
    await until(lambda: teller.busy == 1)
    if pinged and stream:
        assert (await reader.readuntil(b": waiting\n")).startswith(b"HTTP/1.1 200 OK")
    writer.close()
    await writer.wait_closed()
    await until(lambda: teller.busy == 0)
    teller.gate.set()
    async with openai_client(policy) as client:
        await client.chat.completions.create(model="m", messages=ASKED)
    run = policy.captured_run(reward=0.0)
    assert_true_to_the_token(run, teller)
    assert len(teller.said) == 1
    assert run.info["transcript"] == {"drop: the client closed the connection": 1}


async def test_clients_do_not_see_pings(begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PING_S", 0.01)
    policy, teller = begin(turns(*["Yes."] * 4))

    async def slowly(call: Any) -> Any:
        teller.gate.clear()
        asyncio.get_running_loop().call_later(0.2, teller.gate.set)
        return await call

    async with openai_client(policy) as client:
        pieces = await slowly(client.chat.completions.create(model="m", messages=ASKED, stream=True))
        assert "".join([piece.choices[0].delta.content or "" async for piece in pieces]) == "Yes."
        pieces = await slowly(client.completions.create(model="m", prompt="?", stream=True))
        assert "".join([piece.choices[0].text async for piece in pieces]) == "Yes."
        events = await slowly(client.responses.create(model="m", input="?", stream=True))
        assert [event.delta async for event in events if event.type == "response.output_text.delta"] == ["Yes."]
    async with anthropic_client(policy) as client:
        teller.gate.clear()
        asyncio.get_running_loop().call_later(0.2, teller.gate.set)
        async with client.messages.stream(model="m", max_tokens=9, messages=ASKED) as stream:
            assert await stream.get_final_text() == "Yes."


async def test_an_error_in_a_stream_that_has_begun_is_an_event(begin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PING_S", 0.01)

    def fail(text: str) -> str:
        raise SamplerRequestError("the replica is gone")

    policy, teller = begin(fail)

    async def read(client: Any, create: Any, **asked: Any) -> None:
        teller.gate.clear()
        asyncio.get_running_loop().call_later(0.2, teller.gate.set)
        async for _ in await create(model="m", stream=True, **asked):
            pytest.fail("nothing was drawn")

    async with openai_client(policy) as client:
        for create, asked in (
            (client.chat.completions.create, {"messages": ASKED}),
            (client.completions.create, {"prompt": "?"}),
            (client.responses.create, {"input": "?"}),
        ):
            with pytest.raises(openai.APIError, match="the replica is gone"):
                await read(client, create, **asked)
    async with anthropic_client(policy) as anthropics:
        with pytest.raises(anthropic.APIStatusError, match="the replica is gone"):
            await read(anthropics, anthropics.messages.create, messages=ASKED, max_tokens=9)


async def test_closing_ends_calls_and_connections_at_once(begin, tokenizer) -> None:
    """The fixture asserts that no task is left; warnings about what is not closed are errors."""
    async with Endpoint() as endpoint, aiohttp.ClientSession() as idle:
        policy, teller = begin(lambda text: "x" + END, where=endpoint)
        url = policy.openai_base_url
        async with idle.get(f"{url}/models"):
            pass
        teller.gate.clear()
        async with openai_client(policy) as client:
            call = asyncio.create_task(client.chat.completions.create(model="m", messages=ASKED))
            await until(lambda: teller.busy == 1)
            await endpoint.__aexit__()
            with pytest.raises(openai.AuthenticationError):
                await call
        with pytest.raises(aiohttp.ClientConnectionError):
            await idle.get(url)
    gc.collect()


async def test_an_endpoint_that_nobody_uses_opens_nothing() -> None:
    async with Endpoint() as endpoint:
        await asyncio.sleep(0)
        assert endpoint._listening is None
        assert len(asyncio.all_tasks()) == 1


async def test_a_program_in_a_thread_may_be_the_first_to_ask(begin) -> None:
    policy, teller = begin(lambda text: "from a thread" + END)

    def agent() -> str:
        with openai.OpenAI(base_url=policy.openai_base_url, api_key=policy.openai_api_key) as client:
            return str(client.chat.completions.create(model="m", messages=ASKED).choices[0].message.content)

    assert await asyncio.to_thread(agent) == "from a thread"
    assert_true_to_the_token(policy.captured_run(reward=0.0), teller)


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
async def test_other_addresses(begin, host: str, shown: str) -> None:
    async with Endpoint(EndpointConfig(host=host)) as endpoint:
        policy, _ = begin(lambda text: "x" + END, where=endpoint)
        try:
            assert policy.openai_base_url.startswith(shown)
        except ConfigError:
            pytest.skip(f"this machine has no {host}")
        async with openai_client(policy) as client:
            await client.chat.completions.create(model="m", messages=ASKED)


async def test_an_address_of_another_machine_is_named(begin) -> None:
    async with Endpoint(EndpointConfig(host="192.0.2.1")) as endpoint:
        policy, _ = begin(turns(), where=endpoint)
        with pytest.raises(ConfigError, match=r"endpoint\.host is '192\.0\.2\.1'"):
            _ = policy.openai_base_url


def test_keys_cannot_be_guessed(tokenizer) -> None:
    endpoint = Endpoint()
    keys = {endpoint.register(Teller(lambda text: "", tokenizer)) for _ in range(100)}  # type: ignore[arg-type]
    assert len(keys) == 100
    assert all(key.startswith("sk-asyncrl-") and len(key) > 40 for key in keys)
