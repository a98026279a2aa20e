"""One vLLM server over HTTP: its requests, its errors, and how it is given new weights."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

import aiohttp
import anyio

from asyncrl.errors import SamplerRequestError
from asyncrl.sampling.load import EngineLoad, read_metrics
from asyncrl.sampling.params import adapter_name, refusal
from asyncrl.sampling.server import Server

T = TypeVar("T")

METRICS_TIMEOUT_S = 10.0
"""5 to 13 ms on an idle server; a busy one answers between two engine steps."""
RESUME_TIMEOUT_S = 10.0
"""Waited out even for a server that is lost: what is paused and forgotten would never draw again."""

PAUSE: Mapping[str, Mapping[str, str]] = {
    "interrupt": {"mode": "keep", "clear_cache": "true"},
    "keep": {"mode": "keep", "clear_cache": "false"},
    "drain": {"mode": "wait", "clear_cache": "true"},
}
"""What `sampler.in_flight` means to `POST /pause`. `keep` with a cleared cache throws running requests out of the KV
cache and computes prompt and partial completion again under the new weights, in the same request: the interruption
without a second request. The endpoint's own default, `abort`, would end them."""

UPDATING = "updating"
"""The version label while weights are being replaced. No completion with such a label is accepted."""


class Unreachable(SamplerRequestError):
    """Nobody took the connection, or it broke."""


class Endpoint:
    """One server. `server` is None for one that somebody else runs.

    Every request to it raises `SamplerRequestError` when it fails, whatever the reason.
    """

    def __init__(self, url: str, http: aiohttp.ClientSession, server: Server | None = None) -> None:
        self.model = ""
        """What it was started with: a name on the hub, or a folder of its machine; known after `connect`."""
        self.context_tokens = 0
        """Prompt and completion together; known after `connect`."""
        self.counted_from = EngineLoad()
        """What the counters of a server of somebody else said when it was connected to: it has served others before."""
        self.repacks = server is not None
        """It has the worker extension `asyncrl.sampling.vllm_worker.HotLoad`."""
        self.replacing = False
        """Its weights are being replaced: no token is drawn meanwhile."""
        self.server = server
        self._url = url.rstrip("/")
        self._http = http

    @property
    def url(self) -> str:
        """Where it answers: a server of ours may move when it is started again."""
        return self.server.launch.url if self.server is not None else self._url

    @property
    def name(self) -> str:
        return f"vLLM replica {self.server.launch.name} at {self.url}" if self.server else f"vLLM at {self.url}"

    async def post(
        self, path: str, body: Any = None, *, timeout_s: float | None, params: Mapping[str, str] | None = None
    ) -> Any:
        """The JSON of the answer, None for one without. Raises as `_ask` does."""
        text = await self._ask("POST", path, timeout_s, json=body, params=params)
        try:
            return json.loads(text) if text.startswith(("{", "[")) else None
        except ValueError:
            raise SamplerRequestError(f"{self.name}: {path} answered JSON that breaks off: {text[-100:]!r}") from None

    async def get(self, path: str, *, timeout_s: float | None) -> str:
        """The text of the answer. Raises as `_ask` does."""
        return await self._ask("GET", path, timeout_s)

    async def _ask(self, method: str, path: str, timeout_s: float | None, **content: Any) -> str:
        """One exchange. Raises `SamplerRequestError`; its status is None where there was no answer."""
        try:
            status, text = await self._exchange(method, path, timeout_s, **content)
        except TimeoutError as error:
            limit = f"within {timeout_s:g} s" if timeout_s is not None else "in time"
            raise SamplerRequestError(f"{self.name} did not answer {path} {limit}") from error
        except aiohttp.ClientError as error:
            raise Unreachable(f"{self.name}: {_failure(path, error)}") from error
        if status == 200:
            return text
        raise refusal(f"{self.name}: {path}", status, text)

    async def _exchange(self, method: str, path: str, timeout_s: float | None, **content: Any) -> tuple[int, str]:
        """Status and text. A lost connection is tried once more: vLLM closes one without notice after an answer 500,
        and then it is the next request on it that is lost. Nothing that is asked here does harm when asked twice."""
        for last in (False, True):
            try:
                timeout = aiohttp.ClientTimeout(total=timeout_s)
                async with self._http.request(method, self.url + path, timeout=timeout, **content) as answer:
                    return answer.status, await answer.text()
            except aiohttp.ClientConnectionError as error:
                if last or isinstance(error, TimeoutError):
                    raise
        raise AssertionError("unreachable")

    async def load(self) -> EngineLoad:
        text = await self.get("/metrics", timeout_s=METRICS_TIMEOUT_S)
        try:
            return read_metrics(text).since(self.counted_from)
        except ValueError as error:
            raise SamplerRequestError(
                f"{self.name}: {error}. Do not start it with --disable-log-stats.", recoverable=False
            ) from None

    async def load_adapter(self, version: int, folder: str) -> None:
        """Load the LoRA adapter in `folder` under the name of its version. Running requests do not notice.

        Raises after the second failure in a row.
        """
        body = {"lora_name": adapter_name(version), "lora_path": folder}
        try:
            await self.post("/v1/load_lora_adapter", body, timeout_s=None)
        except SamplerRequestError:
            try:
                await self.post("/v1/load_lora_adapter", body, timeout_s=None)
            except SamplerRequestError as error:
                # The first attempt may have got through after all, and only its answer was lost.
                if not (error.status == 400 and "already been loaded" in str(error)):
                    raise

    async def unload_adapter(self, name: str, timeout_s: float) -> None:
        try:
            await self.post("/v1/unload_lora_adapter", {"lora_name": name}, timeout_s=timeout_s)
        except SamplerRequestError as error:
            if error.status != 404:
                raise

    async def load_weights(self, version: int, source: str, in_flight: Literal["interrupt", "keep", "drain"]) -> None:
        """Replace all weights between two tokens by those in `source`, a folder or a name on the hub.

        Raises after the second failure in a row. Generation is resumed in any case.
        """
        try:
            await self.post("/pause", params=PAUSE[in_flight], timeout_s=None)
            self.replacing = True
            try:
                await self._replace_weights(version, source)
            except SamplerRequestError:
                # A paused engine recovers from a half-loaded model when it is loaded again.
                await self._replace_weights(version, source)
        except SamplerRequestError:
            # A step over half-loaded weights kills the engine: what is in flight ends before anything is resumed.
            with suppress(SamplerRequestError):
                await self.post("/pause", params={"mode": "abort"}, timeout_s=RESUME_TIMEOUT_S)
            raise
        finally:
            self.replacing = False
            with anyio.CancelScope(shield=True):
                await self.post("/resume", timeout_s=RESUME_TIMEOUT_S)

    async def _replace_weights(self, version: int, source: str) -> None:
        method, argument = ("asyncrl_load_weights", "source") if self.repacks else ("reload_weights", "weights_path")
        await self.set_version(UPDATING)
        await self.post("/collective_rpc", {"method": method, "kwargs": {argument: source}}, timeout_s=None)
        await self.set_version(str(version))

    async def set_version(self, label: str) -> None:
        """How the tokens drawn from now on are labelled."""
        await self.post("/update_weight_version", {"new_version": label}, timeout_s=None)


def _failure(path: str, error: aiohttp.ClientError) -> str:
    """In words; aiohttp's own are full of its objects."""
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        why = os.strerror(cause.errno) if isinstance(cause, ConnectionError) and cause.errno else cause.strerror
        return f"no connection for {path}: {why or cause}"
    return f"connection lost during {path}: {error or type(error).__name__}"


async def all_of(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """All calls at once; their results in order. All come to their end, then the first failure is raised."""
    results: dict[int, T] = {}
    failures: list[SamplerRequestError] = []

    async def run(place: int) -> None:
        try:
            results[place] = await calls[place]()
        except SamplerRequestError as error:
            failures.append(error)

    async with anyio.create_task_group() as group:
        for place in range(len(calls)):
            group.start_soon(run, place)
    if failures:
        raise failures[0]
    return [results[place] for place in range(len(calls))]
