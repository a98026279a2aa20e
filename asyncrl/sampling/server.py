"""Starts vLLM servers, waits until they are ready, notices when one ends, and ends them.

    async with serve(launches, timeout_s) as servers:
        ...

Each server runs under `guard.py`, in a session of its own: no process of it outlives this one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import anyio
import structlog

from asyncrl.errors import SamplerError
from asyncrl.sampling.launch import Launch, likely_cause, root_error

logger = structlog.get_logger()

GUARD = Path(__file__).with_name("guard.py")
GRACE_S = 10.0
"""What a server gets to end by itself after SIGTERM. It took 0.1 s to 1 s on a CPU."""
POLL_S = 0.2
LOG_LINES = 25
"""Lines of the log in the message about a server that died."""
LOG_BYTES = 1 << 20
"""How far back the cause is looked for: a dead engine makes a traceback of 5 kB for each request in flight."""


class Server:
    """One running vLLM server. Owns its process group."""

    def __init__(self, launch: Launch, process: asyncio.subprocess.Process) -> None:
        self.launch = launch
        self.obituary: str | None = None
        """Why the server is gone; None while it runs."""
        self._process = process
        self._stopping = False
        self._ended = anyio.Event()
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {launch.name}")

    @classmethod
    async def start(cls, launch: Launch) -> Server:
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        with launch.log.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(GUARD), str(GRACE_S), *launch.command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **launch.env},
                start_new_session=True,
            )
        return cls(launch, process)

    @property
    def pid(self) -> int:
        """Of the guard, which is also the id of the process group."""
        return self._process.pid

    async def _watch(self) -> None:
        """Consumes the guard's last word, produces `obituary`. Woken by the end of the guard."""
        assert self._process.stdout is not None
        said = (await self._process.stdout.read()).decode().strip()
        await self._process.wait()
        self._kill()
        code = int(said) if said else self._process.returncode
        self.obituary = self._describe(code if code is not None else -signal.SIGKILL)
        if not self._stopping:
            logger.error("vllm server ended", server=self.launch.name, code=code, log=str(self.launch.log))
        self._ended.set()

    def _describe(self, code: int) -> str:
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        out_of_memory = " (often the kernel's answer to a machine without memory left)" if code == -9 else ""
        log = self._log()
        tail = _last_lines(log)
        error = root_error(log)
        return (
            f"vLLM replica {self.launch.name} at {self.launch.url} ended with {how}{out_of_memory}"
            f"{f': {error}' if error else ''}. {likely_cause(f'{error} {tail}')} "
            f"The end of {self.launch.log}:\n{tail}"
        )

    def log_tail(self) -> str:
        """The last lines of the log."""
        return _last_lines(self._log())

    def _log(self) -> str:
        with self.launch.log.open("rb") as log:
            log.seek(max(0, self.launch.log.stat().st_size - LOG_BYTES))
            return log.read().decode(errors="replace")

    async def ends_within(self, limit_s: float) -> bool:
        """Whether the server is gone, or goes within `limit_s`: a lost connection is noticed before an exit is."""
        with anyio.move_on_after(limit_s):
            await self._ended.wait()
        return self._ended.is_set()

    async def stop(self) -> None:
        """End the whole process group: SIGTERM, `GRACE_S`, SIGKILL. Cannot be cancelled, and is bounded."""
        self._stopping = True
        with anyio.CancelScope(shield=True):
            assert self._process.stdin is not None
            self._process.stdin.close()
            if not await self.ends_within(GRACE_S + 5):
                self._kill()
                await self.ends_within(5)
            self._watcher.cancel()

    def _kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # gone; macOS says permission for a group of zombies
            os.killpg(self.pid, signal.SIGKILL)


def _last_lines(log: str) -> str:
    return "\n".join(log.splitlines()[-LOG_LINES:])


@asynccontextmanager
async def serve(launches: Sequence[Launch], timeout_s: float) -> AsyncIterator[list[Server]]:
    """Start all, yield them when all are ready, and end them.

    Raises `SamplerError` when one ends, or is not ready within `timeout_s`.
    """
    servers: list[Server] = []
    try:
        for launch in launches:
            servers.append(await Server.start(launch))
            logger.info("vllm server starting", server=launch.name, url=launch.url, log=str(launch.log))
        await _wait_until_ready(servers, timeout_s)
        yield servers
    finally:
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*(server.stop() for server in servers))


async def _wait_until_ready(servers: Sequence[Server], timeout_s: float) -> None:
    """Wait until each server answers /health. Raises `SamplerError` at once when one ends."""
    began = time.monotonic()
    waiting = list(servers)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        while waiting:
            for server in servers:
                if server.obituary is not None:
                    raise SamplerError(server.obituary)
            waiting = [server for server in waiting if not await _healthy(http, server.launch.url)]
            if waiting and time.monotonic() - began > timeout_s:
                slow = waiting[0]
                raise SamplerError(
                    f"vLLM replica {slow.launch.name} was not ready after sampler.start_timeout_s={timeout_s:g} s. "
                    f"Raise it if the model is large. The end of {slow.launch.log}:\n{slow.log_tail()}"
                )
            if waiting:
                await anyio.sleep(POLL_S)
    logger.info("vllm servers ready", count=len(servers), seconds=round(time.monotonic() - began, 1))


async def _healthy(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
