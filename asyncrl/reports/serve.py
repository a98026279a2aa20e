"""`asyncrl report --live`: the page of a report, served to this machine while the run goes on.

    consumes    the files of the run folders
    produces    the page, and its model as JSON for whoever has the page open
    waits for   requests; the files are read in a thread, when they have changed and somebody asks
    woken by    the page, which asks every two seconds

Rollouts are nobody else's business: it listens on the loopback interface alone, its address holds a secret, and a
request whose Host is another name is refused, so that no web page can be made to read it (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler

from asyncrl.errors import ConfigError, UserError
from asyncrl.reports.page import Model, page, to_json
from asyncrl.reports.report import SCRIPTS

HOST = "127.0.0.1"
REST = 4.0
"""After it was made, a report is left for so many times the time that it took: a long run costs the machine little."""
LEAVE_S = 1.0
"""For answers under way when the server ends."""
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}

Signature = tuple[tuple[str, int, int], ...]


class LiveReport:
    """Owns the newest model of the report; makes it again when the files have changed and it was asked for.

    Args:
        roots: The run folders.
        make: Reads them. It runs in a thread, never twice at once.
    """

    def __init__(self, roots: Sequence[Path], make: Callable[[], Model]) -> None:
        self._roots = tuple(roots)
        self._make = make
        self._lock = asyncio.Lock()
        self._signature: Signature | None = None
        self._rest_until = 0.0
        self._model: Model | None = None
        self._json = b""
        self.tag = ""
        """Tells one model from the next."""

    async def model(self) -> Model:
        """Raises: as `make`."""
        await self._refresh()
        assert self._model is not None
        return self._model

    async def json(self) -> bytes:
        """Raises: as `make`."""
        await self._refresh()
        return self._json

    async def _refresh(self) -> None:
        async with self._lock:
            if self._model is not None and time.monotonic() < self._rest_until:
                return
            signature = await asyncio.to_thread(_signature, self._roots)
            if signature == self._signature:
                return
            began = time.monotonic()
            self._model, self._json = await asyncio.to_thread(self._made)
            self._signature = signature
            self.tag = f'"{hashlib.sha256(self._json).hexdigest()[:16]}"'
            now = time.monotonic()
            self._rest_until = now + REST * (now - began)

    def _made(self) -> tuple[Model, bytes]:
        made = self._make()
        return made, to_json(made).encode("utf-8", errors="backslashreplace")


def live_app(report: LiveReport, token: str) -> web.Application:
    """The server's application. Its page is at `/<token>/`."""

    async def show(request: web.Request) -> web.Response:
        html = page(await report.model(), scripts=SCRIPTS)
        return web.Response(
            body=html.encode("utf-8", errors="backslashreplace"), content_type="text/html", charset="utf-8"
        )

    async def data(request: web.Request) -> web.Response:
        body = await report.json()
        if request.headers.get("If-None-Match") == report.tag:
            return web.Response(status=304)
        return web.Response(body=body, content_type="application/json", charset="utf-8", headers={"ETag": report.tag})

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host, _, port = (request.headers.get("Host") or "").rpartition(":")
        sent = request.match_info.get("token", "")
        if host not in (HOST, "localhost") or not port.isdecimal():
            answer: web.StreamResponse = web.Response(
                status=403, text="This report is served to its own machine alone."
            )
        elif not hmac.compare_digest(sent.encode(), token.encode()):
            answer = web.Response(
                status=404, text="There is nothing here. Use the address that `asyncrl report` printed."
            )
        else:
            try:
                answer = await handler(request)
            except UserError as error:  # a file of the run that cannot be read, perhaps at this moment alone
                answer = web.Response(status=503, text=str(error))
        answer.headers.update(HEADERS)
        return answer

    app = web.Application(middlewares=[guard])
    app.add_routes([web.get("/{token}/", show), web.get("/{token}/data", data)])
    return app


async def serve(
    roots: Sequence[Path], make: Callable[[], Model], on_ready: Callable[[str], None], *, port: int = 0
) -> None:
    """Serve the report until it is cancelled.

    Args:
        roots: The run folders.
        make: Reads them and makes the model, a live one.
        on_ready: Gets the address of the page when it can be opened.
        port: 0: a free one.

    Raises:
        DataError: the runs cannot be read at the start.
        ConfigError: there are none, or the port cannot be used.
    """
    report = LiveReport(roots, make)
    await report.model()
    token = secrets.token_urlsafe(16)
    runner = web.AppRunner(live_app(report, token), access_log=None, shutdown_timeout=LEAVE_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, HOST, port).start()
        except OSError as error:
            raise ConfigError(
                f"--port: {port} cannot be used: {error.strerror or error}. Leave --port out for a free one."
            ) from None
        _, bound = runner.addresses[0][:2]
        on_ready(f"http://{HOST}:{bound}/{token}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def _signature(roots: Sequence[Path]) -> Signature:
    """Changes with what a report is made of. The ledger's newest events are in a file beside it."""
    found = []
    for root in roots:
        timeline = sorted((root / "timeline").glob("life-*/*"))
        for path in [*sorted(root.glob("*.jsonl")), *sorted(root.glob("*.json")), *root.glob("ledger.db*"), *timeline]:
            try:
                stat = path.stat()
            except FileNotFoundError:  # renamed or removed meanwhile
                continue
            found.append((str(path), stat.st_mtime_ns, stat.st_size))
    return tuple(found)
