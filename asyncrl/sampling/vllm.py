"""The vLLM sampler: servers that it starts, or that run at `sampler.urls`. docs/vllm.md.

Versions. LoRA: each version is an adapter of its own name, a request ends on the version that it began with, and
nothing pauses. Full weights: all servers hold one version; a hot-load pauses them, and each token carries the version
that the server was labelled with when it drew it.

Prefix cache. Every request is salted with this sampler's own salt and its version, so that no KV block of one version
is read by a request that begins under another.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import aiohttp
import anyio
import structlog

from asyncrl.config import Config
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.open_files import raise_open_files_limit
from asyncrl.sampling.connect import connect
from asyncrl.sampling.endpoint import Endpoint
from asyncrl.sampling.fleet import Fleet
from asyncrl.sampling.launch import elsewhere, plan
from asyncrl.sampling.live import LiveAdapters, LiveModel, LiveWeights
from asyncrl.sampling.load import together
from asyncrl.sampling.params import GENERATE_PATH, read_completion, sampling_body
from asyncrl.sampling.replica import EXIT_NOTICE_S, Replica
from asyncrl.sampling.scoring import check_agreement, check_pinned, score_by_prompt, score_by_token
from asyncrl.sampling.server import Server, serve
from asyncrl.sampling.supervisor import Limits, Supervisor
from asyncrl.types import Completion, Load, Probe, SampleRequest, Weights

logger = structlog.get_logger()

Answer = TypeVar("Answer")

KEEP_ALIVE_S = 4.0
"""Less than the 5 s after which a vLLM of somebody else closes an idle connection; ours wait longer."""

LOAD_PATIENCE_S = 2.0
"""A replica that does not say how busy it is counts with what it last said."""

SCORE_ATTEMPTS = 5
"""3 s in all: longer than a server needs to notice a lost connection, short against a hot-load."""

STUCK_SHARE = 0.25
"""Of `sampler.request_timeout_s`: an engine that draws nothing for so long is stuck. Who raises the limit of a request
has a slow machine, where one step takes long too."""


class VllmSampler:
    """Draws tokens from vLLM servers. Owns them where it starts them, and what is said to them.

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
        self._context = 0
        self._probe: tuple[int, Probe] | None = None
        self._fleet = Fleet([])
        self._live = self._live_weights()
        self._exit = AsyncExitStack()

    def _live_weights(self) -> LiveWeights:
        if self._lora:
            return LiveAdapters(self._fleet, self._config, self._keep_versions)
        return LiveModel(self._fleet, self._config)

    @property
    def version(self) -> int:
        """The newest weights that are live."""
        return self._live.version

    @property
    def urls(self) -> list[str]:
        """Where the servers answer."""
        return [replica.endpoint.url for replica in self._fleet.replicas]

    @property
    def servers(self) -> list[Server]:
        """Those that this sampler started."""
        return [replica.endpoint.server for replica in self._fleet.replicas if replica.endpoint.server is not None]

    # Life

    async def __aenter__(self) -> VllmSampler:
        raise_open_files_limit()
        began = anyio.current_time()
        async with AsyncExitStack() as stack:
            endpoints = await self._open_endpoints(stack)
            for endpoint in endpoints:
                await self._connect_first(endpoint)
            start_s = anyio.current_time() - began
            limits = [self._config.max_seq_len, self._context_tokens, *(end.context_tokens for end in endpoints)]
            self._context = min(limit for limit in limits if limit is not None)
            self._fleet = Fleet([Replica(endpoint) for endpoint in endpoints])
            self._live = self._live_weights()
            await stack.enter_async_context(self._supervised(start_s))
            self._exit = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._exit.aclose()

    async def _open_endpoints(self, stack: AsyncExitStack) -> list[Endpoint]:
        """A server of ours has a key of its own; those of somebody else have theirs in the environment."""
        config, urls = self._config, self._config.sampler.urls
        key = os.environ.get("VLLM_API_KEY") if urls else secrets.token_urlsafe(32)
        http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
            headers={"Authorization": f"Bearer {key}"} if key else None,
        )
        await stack.enter_async_context(http)
        if key is None or urls:
            return [Endpoint(url, http) for url in urls]
        launches = await anyio.to_thread.run_sync(
            plan, config, self._run_dir, self._context_tokens, self._keep_versions, key
        )
        servers = await stack.enter_async_context(serve(launches, config.sampler.start_timeout_s))
        return [Endpoint(server.launch.url, http, server) for server in servers]

    async def _connect_first(self, endpoint: Endpoint) -> None:
        limit_s = self._config.sampler.start_timeout_s
        try:
            with anyio.fail_after(limit_s):
                await connect(endpoint, lora=self._lora)
            self._compare_model(endpoint)
        except (SamplerRequestError, TimeoutError) as error:
            if endpoint.server is not None and await endpoint.server.ends_within(EXIT_NOTICE_S):
                raise SamplerError(endpoint.server.obituary) from error
            cause = str(error).removeprefix(f"{endpoint.name}: ")
            cause = cause or f"what it serves was not known after sampler.start_timeout_s={limit_s:g} s"
            raise SamplerError(f"{endpoint.name} cannot be used: {cause}. {_advice(endpoint, error)}") from error

    def _compare_model(self, endpoint: Endpoint) -> None:
        """Full weights in a folder are loaded into a server of somebody else. Its base model stays what it is, and may
        have another name there: training has the canary, an evaluation has this warning alone."""
        model, served = Path(self._config.model), Path(endpoint.model)
        replaced = not self._lora and model.is_dir()
        if endpoint.server is None and not replaced and model.absolute() != served.absolute():
            logger.warning(
                "vllm serves a model of another name", replica=endpoint.name, found=str(served), model=str(model)
            )

    @asynccontextmanager
    async def _supervised(self, start_s: float) -> AsyncIterator[None]:
        """Replicas that are lost come back while the block lasts. `start_s`: what the first start took."""
        sampler, fleet = self._config.sampler, self._fleet
        supervisor = Supervisor(
            fleet,
            Limits(
                stuck_s=STUCK_SHARE * sampler.request_timeout_s,
                start_s=sampler.start_timeout_s,
                weights_s=self._config.publish.timeout_s,
                outage_s=sampler.outage_timeout_s + start_s,
            ),
            prepare=self._prepare,
            forgot=self._live.forgot,
            relaunch=(lambda launch: launch) if sampler.port else elsewhere,
        )
        for replica in fleet.replicas:
            if (server := replica.endpoint.server) is not None:
                server.on_end = partial(fleet.lose, replica)
        task = asyncio.create_task(supervisor.run(), name="asyncrl vllm supervisor")
        task.add_done_callback(self._supervisor_ended)
        try:
            yield
        finally:
            supervisor.stop()
            await asyncio.wait([task])

    def _supervisor_ended(self, task: asyncio.Task[None]) -> None:
        """Nobody brings a replica back any more: no request shall wait for one."""
        error = None if task.cancelled() else task.exception()
        self._fleet.fail(f"vLLM is not watched any more: {error!r}" if error else "the vLLM sampler is closed")
        if error:
            logger.error("vllm supervisor failed", exc_info=error)

    async def _prepare(self, replica: Replica) -> None:
        """Bring a server that has just started to what the others hold. Without a pause after the last look."""
        endpoint = replica.endpoint
        model = endpoint.model
        await connect(endpoint, lora=self._lora)
        if endpoint.model != model or endpoint.context_tokens < self._context:
            raise SamplerError(
                f"{endpoint.name} came back with {endpoint.model} and a context of {endpoint.context_tokens} tokens; "
                f"expected {model} and at least {self._context}."
            )
        replica.adapters, replica.version = set(), 0
        checked: int | None = None
        while True:
            await self._live.until_open()
            if lacking := self._live.lacking(replica):
                await self._live.give(replica, lacking[0])
            elif checked != self.version:
                checked = self.version
                await self._check_canary(replica, checked)
            else:
                return

    async def _check_canary(self, replica: Replica, version: int) -> None:
        """What the trainer said about these weights must be what the replica says."""
        if self._probe is None or self._probe[0] != version:
            return
        probe = self._probe[1]
        scored = await self._score_anew(replica, probe.tokens, version, 1)
        check_agreement(
            {"the trainer": probe.logprobs, replica.name: scored}, version, self._config.publish.canary_tolerance
        )

    # Requests

    async def generate(self, request: SampleRequest) -> Completion:
        """Draw one completion. Cancelling this call closes its connection, upon which vLLM frees its place.

        A request whose replica is lost is drawn again on another one.
        Raises `SamplerRequestError` for one bad or lost request, `SamplerError` when no replica will come back.
        """
        room = self._room(len(request.token_ids))
        draw = partial(self._draw, request=request, room=room)
        ready = partial(self._ready, request.version)
        completion = await self._limited("a completion", self._fleet.ask(request.session, draw, ready))
        check_pinned(request.version, completion.versions)
        await self._check_live(max(completion.versions))
        return completion

    async def _check_live(self, newest: int) -> None:
        """A replica that holds the next full weights goes on with what it has in flight, while others still load them:
        nobody shall see a version before it is live."""
        if newest > self.version:
            await self._live.until_open()
        if newest > self.version:
            raise SamplerRequestError(
                f"version {newest} drew a part of this completion, but its replica was lost before that was live."
            )

    async def _ready(self, version: int | None) -> None:
        """Wait until a request for `version` can be sent. Raises when there is no such version."""
        await self._live.until_open()
        self._live.resolve(version)

    async def _draw(self, replica: Replica, request: SampleRequest, room: int) -> Completion:
        version = self._live.resolve(request.version)
        with self._live.using(version):
            body = sampling_body(
                request.token_ids,
                request.params,
                max_tokens=min(room, request.params.max_tokens),
                model=self._live.model(version),
                cache_salt=f"{self._salt}-{version}",
            )
            # The limit is that of `_limited`: time at the gate counts too.
            answer = await replica.endpoint.post(GENERATE_PATH, body, timeout_s=None)
        return read_completion(answer, version=version if self._lora else None)

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        """Log-probs [N - start] of `token_ids[start:]` under the weights of `version`, at temperature 1.

        The replica of `session` is asked, and may use what that session left in its prefix cache. Without a session
        every replica computes everything anew; `SamplerError` when they disagree: one of them holds other weights.
        """
        self._room(len(token_ids))
        if session is None:
            return await self._limited("scoring", self._score_everywhere(token_ids, version, start))
        # Token by token: what the session said before is in the cache, which prompt log-probs would not read.
        ask = partial(
            self._score_by_token, token_ids=token_ids, version=version, start=start, salt=f"{self._salt}-{version}"
        )
        return await self._limited("scoring", self._fleet.ask(session, ask, partial(self._ready, version)))

    async def _score_everywhere(self, token_ids: Sequence[int], version: int, start: int) -> list[float]:
        for attempt in itertools.count(1):
            await self._fleet.some_up()
            await self._ready(version)
            ask = partial(self._score_anew, token_ids=token_ids, version=version, start=start)
            with self._live.using(version):
                answers = await self._fleet.on(self._fleet.up, ask)
            for error in answers.refused.values():
                if attempt == SCORE_ATTEMPTS or not error.recoverable:
                    raise error
            if answers.refused:  # a connection that was lost for a moment must not look like wrong weights
                await anyio.sleep(2.0**attempt / 10)
                continue
            if answers.given:  # else all were lost
                named = {replica.name: scores for replica, scores in answers.given.items()}
                check_agreement(named, version, self._config.publish.canary_tolerance)
                return next(iter(answers.given.values()))
        raise AssertionError("unreachable")

    async def _score_anew(self, replica: Replica, token_ids: Sequence[int], version: int, start: int) -> list[float]:
        """Not one number may come from the prefix cache: the salt is one that nobody used."""
        salt = secrets.token_hex(16)
        if self._lora:
            return await self._score_by_token(replica, token_ids, version, start, salt)
        return await score_by_prompt(replica.endpoint, token_ids, start, salt=salt, label=version)

    async def _score_by_token(
        self, replica: Replica, token_ids: Sequence[int], version: int, start: int, salt: str
    ) -> list[float]:
        with self._live.using(version):
            label, model = (None, self._live.model(version)) if self._lora else (version, None)
            return await score_by_token(replica.endpoint, token_ids, start, salt=salt, model=model, label=label)

    async def _limited(self, what: str, act: Awaitable[Answer]) -> Answer:
        limit_s = self._config.sampler.request_timeout_s
        try:
            with anyio.fail_after(limit_s):
                return await act
        except TimeoutError as error:
            lost = self._fleet.describe()
            raise SamplerRequestError(
                f"vLLM took longer than sampler.request_timeout_s={limit_s:g} s for {what}; it was cancelled."
                + (f" Out of rotation:\n{lost}" if lost else "")
            ) from error

    def _room(self, prompt_tokens: int) -> int:
        """Tokens that can follow the prompt."""
        if 0 < prompt_tokens < self._context:
            return self._context - prompt_tokens
        raise SamplerRequestError(
            f"the prompt has {prompt_tokens} tokens; expected 1 to {self._context - 1}, so that at least one more fits "
            f"into the context of {self._context}. Shorten it, or raise max_seq_len.",
            recoverable=False,
        )

    # Weights

    async def publish(self, weights: Weights) -> None:
        """Make `weights` live on every replica. On return, new requests are drawn from them.

        Raises `SamplerError` when that fails twice in a row, or takes longer than `publish.timeout_s`.
        """
        if weights.folder is None or weights.adapter != self._lora:
            raise SamplerError(
                f"the vLLM sampler was given {'an adapter' if weights.adapter else 'full weights'} in "
                f"{weights.folder}; expected a folder with {'an adapter' if self._lora else 'full weights'}."
            )
        if weights.version < self.version:
            raise SamplerError(f"version {weights.version} was published after version {self.version}: versions grow.")
        # Absolute: a server has a working directory of its own.
        folder, limit_s = weights.folder.absolute(), self._config.publish.timeout_s
        began = anyio.current_time()
        try:
            with anyio.fail_after(limit_s):
                await self._live.publish(weights.version, folder)
        except TimeoutError as error:
            raise SamplerError(
                f"version {weights.version} was not live after publish.timeout_s={limit_s:g} s. "
                "Raise it; with sampler.in_flight='drain' it must exceed the longest completion."
            ) from error
        self._probe = (weights.version, weights.probe) if weights.probe is not None else None
        logger.info("weights live", version=weights.version, seconds=round(anyio.current_time() - began, 4))

    @contextmanager
    def hold(self) -> Iterator[int | None]:
        """Keep the newest adapter loaded while the block lasts. None: full weights have one version at a time."""
        if not self._lora:
            yield None
            return
        version = self.version
        with self._live.using(version):
            yield version

    async def load(self) -> Load:
        """How busy the replicas are, together. One that is lost counts with the tokens that it drew.

        Raises `SamplerError` when none will come back.
        """
        self._fleet.check()
        with anyio.move_on_after(LOAD_PATIENCE_S):
            await self._fleet.on(self._fleet.up, Replica.observe, counts=False)
        total = together(replica.counted for replica in self._fleet.replicas)
        return Load(
            running=total.running,
            waiting=total.waiting,
            kv_use=total.kv_use,
            preemptions=total.preemptions,
            rejected=self._fleet.rejected,
            generated_tokens=total.generated_tokens,
            replicas_up=len(self._fleet.up),
            replicas_lost=self._fleet.losses,
            servers=tuple(replica.load() for replica in self._fleet.replicas),
        )


def _advice(endpoint: Endpoint, error: Exception) -> str:
    """What to do about a server that cannot be connected to."""
    if endpoint.server is not None:
        return f"Its log, {endpoint.server.launch.log}, may say why."
    if isinstance(error, SamplerRequestError) and error.status in (401, 403):
        return "Put the key of that server into the variable VLLM_API_KEY."
    return "Check sampler.urls; docs/vllm.md has the flags it needs."
