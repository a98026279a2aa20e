"""An MCP server as strangers write them: `mcp_server.py` on stdin and stdout, or `mcp_server.py PORT`."""

from __future__ import annotations

import asyncio
import os
import sys

from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("shop", log_level="ERROR")
sold: list[str] = []


@server.tool()
def buy(item: str, price: int = 1) -> str:
    """Buy one item."""
    sold.append(item)
    return f"{item} for {price}: {len(sold)} sold"


@server.tool()
def fail() -> str:
    raise ValueError("no luck")


@server.tool()
def die() -> str:
    os._exit(3)


@server.tool()
def pid() -> int:
    return os.getpid()


@server.tool()
async def hang() -> str:
    await asyncio.Event().wait()
    return "never"


@server.tool()
def shout() -> str:
    return "x" * 1_000_000


@server.tool()
def who(ctx: Context) -> str:
    """Who asks, by the request's headers."""
    request = ctx.request_context.request
    return str(request.headers.get("authorization"))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
