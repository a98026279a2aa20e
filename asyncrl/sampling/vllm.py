"""The vLLM sampler: servers that it starts, or that run at `sampler.urls`. docs/vllm.md.

Versions. LoRA: each version is an adapter of its own name, a request ends on the version that it began with, and
nothing pauses. Full weights: all servers hold one version; a hot-load pauses them, and each token carries the version
that the server was labelled with when it drew it.

Prefix cache. Every request is salted with this sampler's own salt and its version, so that no KV block of one version
is read by a request that begins under another.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import aiohttp
import anyio
import structlog

from asyncrl.config import Config
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.open_files import raise_open_files_limit
from asyncrl.sampling.connect import connect
from asyncrl.sampling.endpoint import Endpoint, all_of, on_each
from asyncrl.sampling.launch import plan
from asyncrl.sampling.load import together
from asyncrl.sampling.params import (
    GENERATE_PATH,
    adapter_name,
    next_token_bodies,
    read_completion,
    read_next_token,
    read_scores,
    read_spans,
    sampling_body,
    scoring_body,
)
from asyncrl.sampling.routing import AdapterShelf, Router
from asyncrl.sampling.server import Server, serve
from asyncrl.types import Completion, Load, SampleRequest, Weights

logger = structlog.get_logger()

Answer = TypeVar("Answer")

KEEP_ALIVE_S = 4.0
"""Less than the 5 s after which a vLLM of somebody else closes an idle connection; ours wait longer."""

REPLICA_TOLERANCE = 0.25
"""Replicas that hold the same weights differ by rounding alone; bfloat16 kernels round by up to this much."""


class VllmSampler:
    """Draws tokens from vLLM servers. Owns the servers that it starts, and which weights each request is sent to.

    `run_dir`: server logs go to its `logs/`. `context_tokens`: longest sample that the model allows; None leaves it
    to vLLM where `config.max_seq_len` is not set. `keep_versions`: newest LoRA versions that stay loaded.
    """

    wants: Literal["tensors", "files"] = "files"

    def __init__(self, config: Config, *, run_dir: Path, context_tokens: int | None = None, keep_versions: int) -> None:
        self._config = config
        self._run_dir = run_dir
        self._context_tokens = context_tokens
        self._keep_versions = keep_versions
        self._lora = config.lora.rank > 0
        self._salt = secrets.token_hex(16)
        self._shelf = AdapterShelf(keep_versions)
        self._version = 0
        self._gate = anyio.Event()
        self._gate.set()
        self._broken: str | None = None
        self._endpoints: list[Endpoint] = []
        self._router = Router(1)
        self._context = 0
        self._exit = AsyncExitStack()

    @property
    def version(self) -> int:
        """The newest weights that are live."""
        return self._shelf.newest if self._lora else self._version

    @property
    def urls(self) -> list[str]:
        """Where the servers answer."""
        return [endpoint.url for endpoint in self._endpoints]

    @property
    def servers(self) -> list[Server]:
        """Those that this sampler started."""
        return [endpoint.server for endpoint in self._endpoints if endpoint.server is not None]

    async def __aenter__(self) -> VllmSampler:
        raise_open_files_limit()
        async with AsyncExitStack() as stack:
            key = os.environ.get("VLLM_API_KEY")
            http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                headers={"Authorization": f"Bearer {key}"} if key else None,
            )
            await stack.enter_async_context(http)
            if self._config.sampler.urls:
                self._endpoints = [Endpoint(url, http) for url in self._config.sampler.urls]
            else:
                launches = await anyio.to_thread.run_sync(
                    plan, self._config, self._run_dir, self._context_tokens, self._keep_versions
                )
                servers = await stack.enter_async_context(serve(launches, self._config.sampler.start_timeout_s))
                self._endpoints = [Endpoint(server.launch.url, http, server) for server in servers]
            await on_each(self._endpoints, lambda endpoint: connect(endpoint, lora=self._lora))
            limits = [self._config.max_seq_len, self._context_tokens, *(end.context_tokens for end in self._endpoints)]
            self._context = min(limit for limit in limits if limit is not None)
            self._router = Router(len(self._endpoints))
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def generate(self, request: SampleRequest) -> Completion:
        """Draw one completion. Cancelling this call closes its connection, upon which vLLM frees its place.

        Raises `SamplerRequestError` for one bad or lost request, `SamplerError` when a server is gone.
        """
        return await self._limited("a completion", lambda: self._generate(request))

    async def _passed_gate(self) -> None:
        """Wait until no hot-load is under way: when one ends, the next may have begun before this task runs."""
        while not self._gate.is_set():
            await self._gate.wait()

    async def _generate(self, request: SampleRequest) -> Completion:
        await self._passed_gate()
        room = self._room(len(request.token_ids))
        version = self._resolve(request.version)
        replica = self._router.begin(request.session)
        if self._lora:
            self._shelf.begin(version)
        try:
            body = sampling_body(
                request.token_ids,
                request.params,
                max_tokens=min(room, request.params.max_tokens),
                model=self._model(version),
                cache_salt=f"{self._salt}-{version}",
            )
            # The limit is that of `_limited`: time at the gate counts too.
            answer = await self._endpoints[replica].post(GENERATE_PATH, body, timeout_s=None)
        finally:
            self._router.end(replica)
            if self._lora:
                self._shelf.end(version)
        completion = read_completion(answer, version=version if self._lora else None)
        self._check_pinned(request.version, completion.versions)
        return completion

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        """Log-probs [N - start] of `token_ids[start:]` under the weights of `version`, at temperature 1.

        The replica of `session` is asked, and may use what that session left in its prefix cache. Without a session
        every replica computes everything anew; `SamplerError` when they disagree: one of them holds other weights.
        """
        return await self._limited("scoring", lambda: self._score(token_ids, version, start, session))

    async def _score(self, token_ids: Sequence[int], version: int, start: int, session: str | None) -> list[float]:
        await self._passed_gate()
        self._room(len(token_ids))
        self._resolve(version)
        if self._lora:
            self._shelf.begin(version)
        try:
            if session is not None:
                return await self._score_in(session, token_ids, version, start)
            ask = self._score_by_token if self._lora else self._score_by_prompt
            salt = _fresh()
            scores = await on_each(self._endpoints, lambda end: ask(end, token_ids, version, start, salt))
        finally:
            if self._lora:
                self._shelf.end(version)
        self._check_agreement(scores, version)
        return scores[0]

    async def _score_in(self, session: str, token_ids: Sequence[int], version: int, start: int) -> list[float]:
        """Token by token: what the session said before is in the cache, which prompt log-probs would not read."""
        replica = self._router.begin(session)
        try:
            end, salt = self._endpoints[replica], f"{self._salt}-{version}"
            return await self._score_by_token(end, token_ids, version, start, salt)
        finally:
            self._router.end(replica)

    async def _score_by_prompt(
        self, end: Endpoint, token_ids: Sequence[int], version: int, start: int, salt: str
    ) -> list[float]:
        answer = await end.post(GENERATE_PATH, scoring_body(token_ids, model=None, cache_salt=salt), timeout_s=None)
        self._check_scored(answer, version)
        return read_scores(answer, token_ids, start)

    async def _score_by_token(
        self, end: Endpoint, token_ids: Sequence[int], version: int, start: int, salt: str
    ) -> list[float]:
        bodies = next_token_bodies(token_ids, start=start, model=self._model(version), cache_salt=salt)
        answers = await all_of([partial(end.post, GENERATE_PATH, body, timeout_s=None) for body in bodies])
        for answer in answers:
            self._check_scored(answer, version)
        return [read_next_token(answer, token) for answer, token in zip(answers, token_ids[start:], strict=True)]

    def _check_scored(self, answer: Mapping[str, Any], version: int) -> None:
        """An adapter is asked for by its name; full weights may have been replaced meanwhile."""
        if not self._lora:
            self._check_pinned(version, read_spans(answer["choices"][0]["weight_versions"], 1))

    async def publish(self, weights: Weights) -> None:
        """Make `weights` live on every replica. On return, new requests are drawn from them.

        Raises `SamplerError` when that fails twice in a row, or takes longer than `publish.timeout_s`.
        """
        if weights.folder is None or weights.adapter != self._lora:
            raise SamplerError(
                f"the vLLM sampler was given {'an adapter' if weights.adapter else 'full weights'} in "
                f"{weights.folder}; expected a folder with {'an adapter' if self._lora else 'full weights'}."
            )
        if weights.version < self.version or (self._lora and self._shelf.has_adapter(weights.version)):
            raise SamplerError(f"version {weights.version} was published after version {self.version}: versions grow.")
        folder, limit_s = _absolute(weights.folder), self._config.publish.timeout_s
        began = anyio.current_time()
        try:
            with anyio.fail_after(limit_s):
                if self._lora:
                    await self._publish_adapter(weights.version, folder, limit_s)
                else:
                    await self._publish_full(weights.version, folder, limit_s)
        except TimeoutError as error:
            raise SamplerError(
                f"version {weights.version} was not live after publish.timeout_s={limit_s:g} s. "
                "Raise it; with sampler.in_flight='drain' it must exceed the longest completion."
            ) from error
        logger.info("weights live", version=weights.version, seconds=round(anyio.current_time() - began, 4))

    async def _publish_adapter(self, version: int, folder: str, limit_s: float) -> None:
        await on_each(self._endpoints, lambda end: end.load_adapter(version, folder, limit_s))
        self._shelf.add(version)
        for drained in self._shelf.take_drained():
            name = adapter_name(drained)
            await on_each(self._endpoints, lambda end, name=name: end.unload_adapter(name, limit_s))  # type: ignore[misc]

    async def _publish_full(self, version: int, folder: str, limit_s: float) -> None:
        """New requests wait at the gate meanwhile: none may fill one version's cache with another version's weights."""
        in_flight = self._config.sampler.in_flight
        self._gate = anyio.Event()
        self._broken = f"the hot-load of version {version} did not finish, so the weights in vLLM are not known"
        try:
            await on_each(self._endpoints, lambda end: end.load_weights(version, folder, in_flight, limit_s))
            self._version, self._broken = version, None
        finally:
            self._gate.set()

    @contextmanager
    def hold(self) -> Iterator[int | None]:
        """Keep the newest adapter loaded while the block lasts. None: full weights have one version at a time."""
        if not self._lora:
            yield None
            return
        version = self._shelf.newest
        self._shelf.begin(version)
        try:
            yield version
        finally:
            self._shelf.end(version)

    async def load(self) -> Load:
        """How busy the replicas are, together."""
        total = together(await on_each(self._endpoints, Endpoint.load))
        return Load(
            running=total.running,
            waiting=total.waiting,
            kv_use=total.kv_use,
            preemptions=total.preemptions,
            rejected=sum(endpoint.rejected for endpoint in self._endpoints),
            generated_tokens=total.generated_tokens,
        )

    async def _limited(self, what: str, act: Callable[[], Awaitable[Answer]]) -> Answer:
        limit_s = self._config.sampler.request_timeout_s
        try:
            with anyio.fail_after(limit_s):
                return await act()
        except TimeoutError as error:
            raise SamplerRequestError(
                f"vLLM took longer than sampler.request_timeout_s={limit_s:g} s for {what}; it was cancelled."
            ) from error

    def _resolve(self, wanted: int | None) -> int:
        """The version that a request is sent to. Raises when it is not live."""
        for endpoint in self._endpoints:
            endpoint.check_alive()
        if self._broken is not None:
            raise SamplerError(self._broken)
        if wanted is None:
            return self.version
        if wanted in self._shelf if self._lora else wanted == self._version:
            return wanted
        raise SamplerRequestError(
            f"version {wanted} is not live: the newest is {self.version}, "
            + (f"and {self._keep_versions} adapters are kept." if self._lora else "and full weights have no other.")
        )

    def _model(self, version: int) -> str | None:
        """The name under which the server knows `version`; None is the base model."""
        return adapter_name(version) if self._lora and self._shelf.has_adapter(version) else None

    def _room(self, prompt_tokens: int) -> int:
        """Tokens that can follow the prompt."""
        if 0 < prompt_tokens < self._context:
            return self._context - prompt_tokens
        raise SamplerRequestError(
            f"the prompt has {prompt_tokens} tokens; expected 1 to {self._context - 1}, so that at least one more fits "
            f"into the context of {self._context}. Shorten it, or raise max_seq_len.",
            recoverable=False,
        )

    def _check_pinned(self, wanted: int | None, versions: Sequence[int]) -> None:
        if wanted is not None and any(version != wanted for version in versions):
            raise SamplerRequestError(
                f"version {wanted} was asked for, but a hot-load came in between: drawn by {sorted(set(versions))}."
            )

    def _check_agreement(self, scores: Sequence[Sequence[float]], version: int) -> None:
        tolerance = self._config.publish.canary_tolerance or REPLICA_TOLERANCE
        for endpoint, other in zip(self._endpoints[1:], scores[1:], strict=True):
            worst = max((abs(a - b) for a, b in zip(scores[0], other, strict=True)), default=0.0)
            if worst > tolerance:
                raise SamplerError(
                    f"{endpoint.name} and {self._endpoints[0].name} disagree on version {version} by {worst:.3g} in a "
                    f"log-prob; at most {tolerance:g} was expected. They do not hold the same weights."
                )


def _fresh() -> str:
    """A salt that nobody used: not one token of a canary's score may come from the prefix cache."""
    return secrets.token_hex(16)


def _absolute(folder: Path) -> str:
    """A server has a working directory of its own."""
    return str(folder.absolute())
