"""Starts vLLM servers, waits until they are ready, notices when one ends, starts it again, and ends them.

    async with serve(launches, timeout_s) as servers:
        ...

Each server runs under `guard.py`, in a session of its own: no process of it outlives this one.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
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
KILL_S = 5.0
"""Until a killed process is gone. One that hangs in the kernel is left behind."""
POLL_S = 0.2
LOG_LINES = 25
"""Lines of the log in the message about a server that died."""
LOG_BYTES = 1 << 20
"""How far back the cause is looked for: a dead engine makes a traceback of 5 kB for each request in flight."""


class Server:
    """A vLLM server, and those that are started in its place. Owns the process group, one at a time."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.obituary: str | None = None
        """Why the server is gone; None while it runs."""
        self.on_end: Callable[[str], None] = lambda obituary: None
        """Called when the server ends by itself."""
        self._process: asyncio.subprocess.Process | None = None
        self._ended = anyio.Event()
        self._watcher: asyncio.Task[None]
        self._log_begins = 0

    async def start(self, launch: Launch | None = None) -> None:
        """End what is left of the process before, at once, and start one; `launch`: in another way than that one.
        Not ready on return: see `wait_until_ready`."""
        launch = launch or self.launch
        if self._process is not None and not self._ended.is_set():
            _kill(self._process.pid)
            await self.ends_within(KILL_S)
            self._watcher.cancel()
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        # Appended to: why the process before this one ended is what one wants to read.
        with launch.log.open("ab") as log, anyio.CancelScope(shield=True):  # no process without an owner
            self._log_begins = log.tell()
            scratch = tempfile.mkdtemp(prefix="vllm-")  # short: the paths of sockets are at most 107 bytes
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(GUARD), str(GRACE_S), scratch, *launch.argv),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **launch.env, "TMPDIR": scratch},
                start_new_session=True,
            )
        self.launch, self.obituary, self._process, self._ended = launch, None, process, anyio.Event()
        self._watcher = asyncio.create_task(self._watch(process, scratch), name=f"watch {launch.name}")
        logger.info("vllm server starting", server=launch.name, url=launch.url, log=str(launch.log))

    @property
    def pid(self) -> int:
        """Of the guard, which is also the id of the process group."""
        assert self._process is not None
        return self._process.pid

    async def _watch(self, process: asyncio.subprocess.Process, scratch: str) -> None:
        """Consumes the guard's last word, produces `obituary`. Woken by the end of the guard."""
        assert process.stdout is not None
        said = (await process.stdout.read()).decode().strip()
        await process.wait()
        _kill(process.pid)
        shutil.rmtree(scratch, ignore_errors=True)  # the guard did, unless it was killed
        code = int(said) if said else process.returncode
        self.obituary = self._describe(code if code is not None else -signal.SIGKILL)
        self._ended.set()
        self.on_end(self.obituary)

    def _describe(self, code: int) -> str:
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        out_of_memory = " (often the kernel's answer to a machine without memory left)" if code == -9 else ""
        log = self._log()
        tail = _last_lines(log)
        error = root_error(log)
        return (
            f"vLLM replica {self.launch.name} at {self.launch.url} ended with {how}{out_of_memory}"
            f"{f': {error}' if error else ''}. {likely_cause(f'{error} {tail}')}\n"
            f"The end of {self.launch.log}:\n{tail}"
        )

    def log_tail(self) -> str:
        """The last lines of the log."""
        return _last_lines(self._log())

    def _log(self) -> str:
        """What this process wrote, as far back as it matters."""
        try:
            with self.launch.log.open("rb") as log:
                log.seek(max(self._log_begins, self.launch.log.stat().st_size - LOG_BYTES))
                return log.read().decode(errors="replace")
        except OSError as error:
            return f"(the log cannot be read: {error})"

    async def ends_within(self, limit_s: float) -> bool:
        """Whether the server is gone, or goes within `limit_s`: a lost connection is noticed before an exit is."""
        with anyio.move_on_after(limit_s):
            await self._ended.wait()
        return self._ended.is_set()

    async def stop(self) -> None:
        """End the whole process group: SIGTERM, `GRACE_S`, SIGKILL. Cannot be cancelled, and is bounded."""
        self.on_end = lambda obituary: None
        with anyio.CancelScope(shield=True):
            if self._process is None:
                return
            assert self._process.stdin is not None
            self._process.stdin.close()
            if not await self.ends_within(GRACE_S + 5):
                _kill(self.pid)
                await self.ends_within(KILL_S)
            self._watcher.cancel()


def _kill(group: int) -> None:
    """SIGKILL for all of a process group; also ends what is stopped or deaf."""
    with suppress(ProcessLookupError, PermissionError):  # gone; macOS says permission for a group of zombies
        os.killpg(group, signal.SIGKILL)


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
            server = Server(launch)
            servers.append(server)
            await server.start()
        began = time.monotonic()
        await wait_until_ready(servers, timeout_s)
        logger.info("vllm servers ready", count=len(servers), seconds=round(time.monotonic() - began, 1))
        yield servers
    finally:
        with anyio.CancelScope(shield=True):
            await asyncio.gather(*(server.stop() for server in servers))


async def wait_until_ready(servers: Sequence[Server], timeout_s: float) -> None:
    """Wait until each server answers /health. Raises `SamplerError` at once when one ends."""
    waiting = list(servers)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http:
        with anyio.move_on_after(timeout_s):
            while True:
                for server in servers:
                    if server.obituary is not None:
                        raise SamplerError(server.obituary)
                waiting = [server for server in waiting if not await _healthy(http, server.launch.url)]
                if not waiting:
                    return
                await anyio.sleep(POLL_S)
    slow = waiting[0]
    raise SamplerError(
        f"vLLM replica {slow.launch.name} was not ready after sampler.start_timeout_s={timeout_s:g} s. "
        f"Raise it if the model is large. The end of {slow.launch.log}:\n{slow.log_tail()}"
    )


async def _healthy(http: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with http.get(f"{url}/health") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
