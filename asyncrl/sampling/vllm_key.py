"""Runs inside vLLM's HTTP server (`--middleware`): the key is asked for on every path.

vLLM's own check covers `/v1`, `/v2` and `/inference` alone (0.32): `/collective_rpc`, `/pause` and the version label,
all of them in development mode, would be open to every user of the machine, and to a web page in a browser on it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", "/metrics"})
"""Tell nothing and change nothing; whoever watches the machine may ask them."""


class RequireKey:
    """ASGI middleware: 401 for a request without the bearer token in `VLLM_API_KEY`."""

    def __init__(self, app: App) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise ValueError("RequireKey has no key to ask for. Set VLLM_API_KEY in the environment of the server.")
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in OPEN or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This vLLM server belongs to a run of asyncrl."})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _has_key(self, scope: Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)
