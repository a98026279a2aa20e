"""The tools of an MCP server, as tools of a chat. Needs `pip install 'asyncrl[mcp]'`.

    async with asyncrl.mcp_tools("python", "server.py") as tools:
        chat = prompt.policy.chat(prompt["messages"], tools=tools)

A server that dies or hangs is an error that the model reads; the next call starts it anew.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import anyio
import structlog

from asyncrl.agents.tool_schema import Arguments, BadArguments, Signature, ToolError, without_titles
from asyncrl.agents.tools import Tool
from asyncrl.errors import RecoverableRolloutError, first_failure

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

Connect = Callable[[IO[bytes]], "AbstractAsyncContextManager[Client]"]
"""Makes a client; what the server writes to its stderr goes to the file."""

CLOSE_LIMIT_S = 10.0
"""The client gives a server 2 s to end by itself, then 2 s after SIGTERM."""
STDERR_TAIL_BYTES = 2000
TETHER = str(Path(__file__).with_name("tether.py"))

log = structlog.get_logger(__name__)


class McpFailure(Exception):
    """The server says that a call failed, or is gone. The model reads it."""


@asynccontextmanager
async def mcp_tools(
    *command: str,
    url: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
    max_output_chars: int = 8000,
    start_timeout_s: float = 60.0,
) -> AsyncIterator[list[Tool[..., Any]]]:
    """The tools of an MCP server, for `chat(tools=...)`. It lives as long as the block: in a rollout for that rollout
    alone, in a factory for the run.

    Args:
        command: A program that speaks MCP on stdin and stdout, and its arguments: `"python", "server.py"`.
        url: Of a server that speaks streamable HTTP, in place of a command.
        env: Variables for the program beside PATH, HOME and the like; it inherits no others.
        cwd: The program's working directory.
        headers: For `url`: such as `{"Authorization": ...}`.
        timeout_s: Longest call.
        max_output_chars: Longer results are cut, and say so.
        start_timeout_s: Longest start; a first `npx` or `uvx` downloads the program.

    Raises:
        RecoverableRolloutError: the server cannot be started or reached; with what it wrote to stderr.
        ToolError: neither a command nor a url, or both; or the package `mcp` is missing.
    """
    connect, name = _connector(command, url, env, cwd, headers)
    server = _Server(connect, name, start_timeout_s)
    try:
        listed = await _list_tools(await server.client(), name, start_timeout_s)
        yield [
            Tool(server.caller(tool.name), timeout_s=timeout_s, max_output_chars=max_output_chars, signature=signature)
            for tool, signature in listed
        ]
    finally:
        server.ended = True
        await server.close()


class _Server:
    """Owns the connection to one server. A lost one is made anew when it is next needed."""

    def __init__(self, connect: Connect, name: str, start_timeout_s: float) -> None:
        self._connect = connect
        self._name = name
        self._start_timeout_s = start_timeout_s
        self._connection: _Connection | None = None
        self._starting = anyio.Lock()
        self.ended = False
        """Nobody would close what is started now."""

    async def client(self) -> Client:
        async with self._starting:
            if self.ended:
                raise ToolError(
                    f"a tool of the MCP server {self._name} was called after the block of `async with "
                    "asyncrl.mcp_tools(...)` that it is from. Expected the chat to run inside of that block."
                )
            if self._connection is not None and self._connection.client is not None:
                return self._connection.client
            if self._connection is not None:
                log.warning("an MCP server was lost and is started anew", server=self._name)
                await self.close()
            self._connection = _Connection(self._connect, self._name)
            return await self._connection.open(self._start_timeout_s)

    def caller(self, tool: str) -> Callable[..., Any]:
        """The function that asks the server to run `tool`."""

        async def call(**arguments: Any) -> str:
            client = await self.client()
            try:
                result = await client.call_tool(tool, arguments)
            except Exception as error:  # of the protocol, or of whatever carries it
                if _is_loss(error) and self._connection is not None and self._connection.client is client:
                    self._connection.client = None
                raise McpFailure(f"the MCP server: {error or type(error).__name__}") from error
            text = _text_of(result)
            if result.is_error:
                raise McpFailure(text)
            return text

        return call

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class _Connection:
    """One connection, in a task of its own: a client's task groups must be left by the task that entered them, and what
    breaks in them cancels that task, which had better not be the rollout."""

    def __init__(self, connect: Connect, name: str) -> None:
        self.client: Client | None = None
        """None before the server has answered, and once the connection is lost."""
        self._name = name
        self._settled = asyncio.Event()
        self._closing = asyncio.Event()
        self._fault = ""
        self._stderr = ""
        self._task = asyncio.create_task(self._hold(connect), name=f"asyncrl MCP client of {name}")

    async def open(self, timeout_s: float) -> Client:
        """Wait until the server answers."""
        try:
            with anyio.move_on_after(timeout_s):
                await self._settled.wait()
            if self.client is not None:
                return self.client
        except BaseException:  # the rollout is cancelled meanwhile
            await self.close()
            raise
        await self.close()
        why = self._fault or f"it did not answer within start_timeout_s={timeout_s:g} s"
        said = f"It wrote:\n{self._stderr}" if self._stderr else "It wrote nothing to stderr."
        raise RecoverableRolloutError(
            f"the MCP server {self._name} cannot be used: {why}. Does it run by itself? {said}"
        )

    async def _hold(self, connect: Connect) -> None:
        with tempfile.TemporaryFile("w+b") as stderr:
            try:
                async with connect(stderr) as self.client:
                    self._settled.set()
                    await self._closing.wait()
            except Exception as error:  # of a transport: whoever needs the server next is told
                cause = first_failure(error) if isinstance(error, ExceptionGroup) else error
                self._fault = f"{type(cause).__name__}: {cause}"
            finally:
                self.client = None
                self._settled.set()
                self._stderr = _tail(stderr)

    async def close(self) -> None:
        self._closing.set()
        if not self._settled.is_set():
            self._task.cancel()
        with anyio.CancelScope(shield=True):
            _, stuck = await asyncio.wait({self._task}, timeout=CLOSE_LIMIT_S)
        if stuck:
            self._task.cancel()
            log.warning("an MCP server did not end and is left behind", server=self._name)


def _is_loss(error: Exception) -> bool:
    """Whether the connection is of no more use: it ended, or the server has forgotten this session."""
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED, INVALID_REQUEST

    if isinstance(error, MCPError):
        return error.code in (CONNECTION_CLOSED, INVALID_REQUEST)
    return isinstance(error, (OSError, anyio.ClosedResourceError, anyio.BrokenResourceError))


def _tail(written: IO[bytes]) -> str:
    end = written.seek(0, 2)
    written.seek(max(0, end - STDERR_TAIL_BYTES))
    return written.read().decode(errors="replace").strip()


def _connector(
    command: tuple[str, ...],
    url: str | None,
    env: Mapping[str, str] | None,
    cwd: str | Path | None,
    headers: Mapping[str, str] | None,
) -> tuple[Connect, str]:
    """How to reach the server, and what to call it."""
    try:
        import httpx2
        from mcp import Client, StdioServerParameters, stdio_client
        from mcp.client.streamable_http import streamable_http_client
    except ImportError as error:
        raise ToolError(
            f"asyncrl.mcp_tools needs the package mcp, 2.0 or later: pip install 'asyncrl[mcp]' ({error})."
        ) from None
    if bool(command) == bool(url):
        raise ToolError(
            'asyncrl.mcp_tools takes either a command, as in mcp_tools("python", "server.py"), or url=..., found '
            f"{'both' if url else 'neither'}."
        )

    @asynccontextmanager
    async def connect(stderr: IO[bytes]) -> AsyncIterator[Client]:
        async with AsyncExitStack() as stack:
            if url is not None:
                http = httpx2.AsyncClient(headers=headers, follow_redirects=True, timeout=None)  # each call has its own
                await stack.enter_async_context(http)
                transport = streamable_http_client(url, http_client=http)
            else:
                program, *arguments = tethered(command, cwd)
                settings = StdioServerParameters(command=program, args=arguments, env=dict(env or {}), cwd=cwd)
                transport = stdio_client(settings, errlog=stderr)
            yield await stack.enter_async_context(Client(transport))

    return connect, url or " ".join(command)


def tethered(command: tuple[str, ...], cwd: str | Path | None) -> tuple[str, ...]:
    """The command, run so that it does not outlive this process. Windows sees to that by itself, in a job object."""
    if os.name != "posix":
        return command
    program = command[0] if os.sep not in command[0] else str(Path(cwd or "", command[0]))
    if shutil.which(program) is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such program", command[0])
    return (sys.executable, "-I", "-S", TETHER, str(os.getpid()), *command)


async def _list_tools(client: Client, name: str, timeout_s: float) -> list[tuple[Any, Signature]]:
    from mcp import MCPError

    found: list[tuple[Any, Signature]] = []
    cursor: str | None = None
    try:
        with anyio.fail_after(timeout_s):
            while True:
                page = await client.list_tools(cursor=cursor)
                found += [(tool, _signature_of(tool)) for tool in page.tools]
                cursor = page.next_cursor
                if cursor is None:
                    return found
    except (TimeoutError, MCPError) as error:
        why = str(error) or f"no answer within start_timeout_s={timeout_s:g} s"
        raise RecoverableRolloutError(f"the MCP server {name} does not say what tools it has: {why}.") from error


def _signature_of(tool: Any) -> Signature:
    def check(arguments: Arguments) -> dict[str, Any]:
        """The server checks the types; here it is a JSON object."""
        try:
            named = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
        except (ValueError, RecursionError) as error:
            raise BadArguments(f"not valid JSON: {error}") from None
        if not isinstance(named, dict):
            raise BadArguments(f"expected a JSON object, found a {type(named).__name__}")
        return named

    parameters = {"type": "object", "properties": {}, **without_titles(tool.input_schema)}
    return Signature(tool.name, tool.description or "", parameters, check)


def _text_of(result: CallToolResult) -> str:
    """Texts as they are; of what is no text, its kind."""
    parts = [block.text if block.type == "text" else f"[{block.type}]" for block in result.content]
    if not parts and result.structured_content is not None:
        return json.dumps(result.structured_content)
    return "\n".join(parts)
