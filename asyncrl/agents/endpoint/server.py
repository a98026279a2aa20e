"""The HTTP side of the endpoint: keys, routes, errors, streams.

    consumes    requests of agent programs, each under the key of its rollout
    produces    turns of that rollout's transcript, and answers
    waits for   the sampler
    woken by    a connection

The sampler gives whole turns, so a stream sends a turn in pieces once it is there, and pings until then.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from asyncrl.agents.endpoint.chat_completions import ChatCompletions
from asyncrl.agents.endpoint.completions import Completions
from asyncrl.agents.endpoint.messages import Messages
from asyncrl.agents.endpoint.refusal import Refusal, refusal_of
from asyncrl.agents.endpoint.request import Ask, Json, Request
from asyncrl.agents.endpoint.responses import Responses
from asyncrl.agents.endpoint.session import GONE, Session, ended
from asyncrl.config import EndpointConfig
from asyncrl.errors import ConfigError
from asyncrl.open_files import raise_open_files_limit

if TYPE_CHECKING:
    from asyncrl.agents.conversation import Drawn
    from asyncrl.agents.policy import Policy

ROUTES: dict[str, type[Request]] = {
    "/v1/chat/completions": ChatCompletions,
    "/v1/completions": Completions,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
}
ANTHROPIC = "/v1/messages"
MAX_BODY_BYTES = 32 << 20
"""Histories are sent whole with every call; this is about eight million tokens of text."""
PING_S = 10.0
"""A stream with nothing to say is pinged so often: clients and proxies give silence up after a minute or so."""
BACKLOG = 4096
CLOSE_S = 5.0
"""How long calls that were broken off may take to say so when the server closes."""

log = structlog.get_logger(__name__)


class Endpoint:
    """The server. Owns its socket and one `Session` for each key. Lives as an async context manager.

    It costs nothing until `url` is asked for.
    """

    def __init__(self, config: EndpointConfig | None = None) -> None:
        self._config = config or EndpointConfig()
        self._sessions: dict[str, Session] = {}
        self._listening: socket.socket | None = None
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._serving: asyncio.Task[web.AppRunner] | None = None

    async def __aenter__(self) -> Endpoint:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for key in tuple(self._sessions):
            self.revoke(key)
        await asyncio.sleep(0)  # a serving task that another thread asked for may be on its way
        if self._serving is not None:
            runner = await self._serving
            await runner.cleanup()

    @property
    def url(self) -> str:
        """Where the server is. The first question, from whatever thread, makes it listen."""
        assert self._loop is not None, "the endpoint has not been entered"
        with self._lock:
            if self._listening is None:
                self._listening = _listen(self._config.host)
                self._loop.call_soon_threadsafe(self._start, self._listening)
        host, port = self._listening.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def register(self, policy: Policy) -> str:
        """A key whose calls become the rollout of `policy`."""
        key = f"sk-asyncrl-{secrets.token_urlsafe(24)}"
        self._sessions[key] = Session(policy, self._config.max_calls)
        return key

    def revoke(self, key: str) -> None:
        """Make a key void. Its calls under way end with an error at once."""
        session = self._sessions.pop(key, None)
        if session is not None:
            session.close()

    def _start(self, listening: socket.socket) -> None:
        self._serving = asyncio.get_running_loop().create_task(
            _serve(self._application(), listening), name="asyncrl endpoint"
        )

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_refusals])
        for path, kind in ROUTES.items():
            application.router.add_post(path, self._handler(kind))
        application.router.add_post(f"{ANTHROPIC}/count_tokens", self._count_tokens)
        application.router.add_get("/v1/models", self._models)
        application.router.add_get("/v1/models/{name:.+}", self._model)
        return application

    def _session(self, http: web.Request) -> Session:
        """The session of a request's key, in the header of either API."""
        _, _, bearer = http.headers.get("Authorization", "").strip().rpartition(" ")  # the scheme is in any case
        session = self._sessions.get(http.headers.get("x-api-key") or bearer)
        if session is None:
            raise Refusal(
                401,
                "the API key is not that of a running rollout. Use policy.openai_api_key of the rollout that this "
                "call belongs to; a key ends with its rollout.",
                code="invalid_api_key",
            )
        return session

    # Routes

    async def _models(self, http: web.Request) -> web.Response:
        self._session(http)
        return web.json_response({"object": "list", "data": [_model("policy")], "has_more": False})

    async def _model(self, http: web.Request) -> web.Response:
        self._session(http)
        return web.json_response(_model(http.match_info["name"]))

    async def _count_tokens(self, http: web.Request) -> web.Response:
        session = self._session(http)
        ask = Messages.model_validate_json(await http.read()).ask({})
        session.check_length(ask)
        count = len(session.policy.template.opening(ask.messages, ask.tools))
        return web.json_response({"input_tokens": count})

    def _handler(self, kind: type[Request]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(http: web.Request) -> web.StreamResponse:
            session = self._session(http)
            request = kind.model_validate_json(await http.read())
            request.refuse_unknown()
            ask = request.ask(session.past)
            call = _Call(http, session, request, ask)
            return await (call.stream() if request.stream else call.answer())

        return handle


class _Call:
    """One request on its way to its answer."""

    def __init__(self, http: web.Request, session: Session, request: Request, ask: Ask) -> None:
        self._http = http
        self._session = session
        self._request = request
        self._ask = ask

    async def answer(self) -> web.Response:
        drawing = self._session.begin(self._request, self._ask)
        try:
            await asyncio.wait({drawing})
        except asyncio.CancelledError:
            self._abandon(drawing)
            raise
        return web.json_response(self._written(drawing))

    async def stream(self) -> web.StreamResponse:
        """As `answer`, in events. Errors that come early have their own status, later ones are an event."""
        drawing = self._session.begin(self._request, self._ask)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            await asyncio.wait({drawing}, timeout=PING_S)
            while not drawing.done():
                await self._send(response, self._request.ping)
                await asyncio.wait({drawing}, timeout=PING_S)
            events = self._events(drawing, begun=response.prepared)
            await self._send(response, events)
            await response.write_eof()
        except (asyncio.CancelledError, ConnectionResetError):
            self._abandon(drawing)
            raise
        return response

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        if not response.prepared:
            await response.prepare(self._http)
        await response.write(data)

    def _events(self, drawing: asyncio.Task[list[Drawn]], *, begun: bool) -> bytes:
        try:
            answer = self._written(drawing)
        except Exception as error:
            if not begun:
                raise
            return self._request.failure(_explained(error)).encode()
        return b"".join(event.encode() for event in self._request.events(answer))

    def _written(self, drawing: asyncio.Task[list[Drawn]]) -> Json:
        """The answer of a task that is done."""
        if drawing.cancelled():
            raise ended()
        replies = self._session.replies(self._ask, drawing.result())
        answer = self._request.answer(self._ask, replies)
        if isinstance(self._request, Responses):
            self._session.remember(answer["id"], self._ask, replies[0])
        return answer

    def _abandon(self, drawing: asyncio.Task[list[Drawn]]) -> None:
        """The client is gone. What it did not read is not part of the run."""
        if not drawing.done():
            drawing.cancel()
            self._session.lost(GONE)
        elif not drawing.cancelled() and drawing.exception() is None:
            self._session.unread(drawing.result(), GONE)


def _listen(host: str) -> socket.socket:
    """A socket on a free port that takes connections at once; they wait until the server is up."""
    raise_open_files_limit()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, 0), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"endpoint.host is {host!r}, where this machine cannot listen: {error}. Expected an address of its own, "
            "such as 127.0.0.1, or 0.0.0.0 for all of them."
        ) from error
    listening.setblocking(False)
    return listening


async def _serve(application: web.Application, listening: socket.socket) -> web.AppRunner:
    runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=CLOSE_S)
    try:
        await runner.setup()
        await web.SockSite(runner, listening, backlog=BACKLOG).start()
    except BaseException:
        listening.close()  # nobody shall wait in line for a server that never comes
        raise
    return runner


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Errors in the words of the API that was called."""
    try:
        return await handler(request)
    except ConnectionResetError:
        raise  # there is nobody to tell
    except Exception as error:
        refusal = _explained(error)
        body = refusal.anthropic() if request.path.startswith(ANTHROPIC) else refusal.openai()
        return web.json_response(body, status=refusal.status, headers=refusal.headers)


def _explained(error: Exception) -> Refusal:
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return Refusal(413, f"the request body is larger than {MAX_BODY_BYTES} bytes.")
    if isinstance(error, web.RequestPayloadError):
        return Refusal(400, f"the request body cannot be read: {error}")
    if isinstance(error, web.HTTPException):
        known = ", ".join(ROUTES)
        return Refusal(error.status, f"{error.reason}. The endpoint answers POST to {known}, and GET to /v1/models.")
    refusal = refusal_of(error)
    if refusal.status == 500:
        log.error("the endpoint failed", exc_info=error)
    return refusal


def _model(name: str) -> Json:
    """One model under every name, with the fields of both APIs."""
    opened = {"created": 0, "created_at": "1970-01-01T00:00:00Z"}
    return {"id": name, "object": "model", "type": "model", "display_name": name, "owned_by": "asyncrl", **opened}
