"""Real servers, over pipes and over HTTP."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import structlog

from asyncrl import RecoverableRolloutError, Tool, mcp_tools
from asyncrl.agents import mcp
from asyncrl.agents.tools import ToolError, collect_tools

pytest.importorskip("mcp")

SERVER = str(Path(__file__).with_name("mcp_server.py"))


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@asynccontextmanager
async def shop(**settings: Any) -> AsyncIterator[dict[str, Tool[..., Any]]]:
    async with mcp_tools(sys.executable, SERVER, **settings) as tools:
        yield collect_tools(tools)


async def test_the_tools_of_a_server_are_called_as_any_other() -> None:
    """The block is entered and left in other tasks, as when a fixture opens it: the client does not notice."""
    block = shop(max_output_chars=30)
    tools = await asyncio.create_task(block.__aenter__())
    assert tools["buy"].schema == {
        "type": "function",
        "function": {
            "name": "buy",
            "description": "Buy one item.",
            "parameters": {
                "type": "object",
                "properties": {"item": {"type": "string"}, "price": {"type": "integer", "default": 1}},
                "required": ["item"],
            },
        },
    }
    assert await tools["buy"].call('{"item": "tea", "price": 3}') == "tea for 3: 1 sold"
    assert await tools["shout"].call({}) == "x" * 30 + "\n[cut: 30 of 1000000 characters]"
    server = int(await tools["pid"].call({}))
    await asyncio.create_task(block.__aexit__(None, None, None))
    assert not is_alive(server), "it lives as long as the block"


async def test_what_goes_wrong_is_an_answer_to_the_model_and_a_server_that_died_is_started_anew() -> None:
    async with shop() as tools:
        tools["hang"].timeout_s = 0.2
        results = await asyncio.gather(
            tools["fail"].invoke({}),
            tools["buy"].invoke({"item": ["tea"]}),
            tools["buy"].invoke("[1]"),
            tools["hang"].invoke({}),
        )
        assert all(result.error for result in results)
        said = [result.text for result in results]
        assert said[0] == "Error: McpFailure: Error executing tool fail: no luck"
        assert "Input should be a valid string" in said[1]
        assert said[2:] == [
            "Error: bad arguments for buy: expected a JSON object, found a list",
            "Error: hang took longer than 0.2 s.",
        ]
        assert await tools["buy"].call({"item": "tea"}) == "tea for 1: 1 sold", "one that hangs harms only its call"
        died = await tools["die"].invoke({})
        assert (died.text, died.error) == ("Error: McpFailure: the MCP server: Connection closed", True)
        with structlog.testing.capture_logs() as logs:
            both = await asyncio.gather(*(tools["buy"].call({"item": "tea"}) for _ in range(2)))
        assert sorted(both) == ["tea for 1: 1 sold", "tea for 1: 2 sold"], "one server, started once, without its past"
        assert [entry["event"] for entry in logs] == ["an MCP server was lost and is started anew"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["no-such-program"], r"no-such-program cannot be used: FileNotFoundError"),
        ([sys.executable, "no_such_server.py"], r"(?s)Connection closed.*It wrote:.*can't open file"),
        ([sys.executable, "-c", "import sys; sys.stdin.read()"], r"did not answer within start_timeout_s=0\.5 s"),
    ],
)
async def test_a_server_that_does_not_start_is_named_with_what_it_wrote(command: list[str], message: str) -> None:
    limit_s = 0.5 if "-c" in command else 30.0
    with pytest.raises(RecoverableRolloutError, match=message):
        async with mcp_tools(*command, start_timeout_s=limit_s):
            raise AssertionError


async def test_a_server_that_does_not_list_its_tools_is_given_up() -> None:
    class Silent:
        async def list_tools(self, *, cursor: str | None = None) -> None:
            await asyncio.Event().wait()

    with pytest.raises(
        RecoverableRolloutError, match=r"shop does not say what tools it has: no answer within.*=0\.05 s"
    ):
        await mcp._list_tools(Silent(), "shop", 0.05)  # type: ignore[arg-type]


async def test_a_tool_that_outlives_its_block_starts_no_server_that_nobody_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with shop() as tools:
        pass
    monkeypatch.setattr(mcp, "_Connection", None)
    with pytest.raises(ToolError, match="inside of that block"):
        await tools["buy"].call({"item": "tea"})


async def test_either_a_command_or_a_url() -> None:
    for arguments in ((), ("python", "server.py")):
        with pytest.raises(ToolError, match="takes either a command"):
            async with mcp_tools(*arguments, url="http://localhost/mcp" if arguments else None):
                raise AssertionError


async def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ToolError, match=r"pip install 'asyncrl\[mcp\]'"):
        async with mcp_tools("python"):
            raise AssertionError


async def test_a_rollout_that_is_cancelled_takes_its_server_along() -> None:
    server: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def rollout() -> None:
        async with shop() as tools:
            server.set_result(int(await tools["pid"].call({})))
            await tools["hang"].call({})

    task = asyncio.create_task(rollout())
    pid = await asyncio.wait_for(server, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_alive(pid)


async def test_a_server_over_http_with_headers_that_goes_and_comes_back() -> None:
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/mcp"

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    server = start()
    try:
        await listening(port)
        async with mcp_tools(url=url, headers={"Authorization": "Bearer sesame"}) as listed:
            tools = collect_tools(listed)
            assert await tools["who"].call({}) == "Bearer sesame"
            assert (await tools["die"].invoke({})).text == "Error: McpFailure: the MCP server: Connection closed"
            server.wait(30)
            with pytest.raises(RecoverableRolloutError, match=f"MCP server {url} cannot be used: ConnectError"):
                await tools["buy"].call({"item": "tea"})
            server = start()
            await listening(port)
            assert await tools["buy"].call({"item": "tea"}) == "tea for 1: 1 sold"
    finally:
        server.kill()
        server.wait(30)


async def listening(port: int) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
