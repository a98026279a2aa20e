"""Watches vLLM replicas, starts those that are lost again, and puts them back when they hold the current weights.

consumes    the ends of servers, their /health and /metrics, requests that failed in a telling way
produces    replicas that leave the rotation and return to it; `fleet.fail` when none will
waits for   the next look, a back-off, a server that starts, the weights
woken by    a server that ends, a request that failed
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import anyio
import structlog

from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.endpoint import Unreachable
from asyncrl.sampling.fleet import Fleet, headline
from asyncrl.sampling.launch import Launch
from asyncrl.sampling.replica import EXIT_NOTICE_S, Replica
from asyncrl.sampling.server import wait_until_ready
from asyncrl.sampling.vitals import ANSWER_S, QUICK_DEATHS, Pulse
from asyncrl.standstill import where

WATCH_EVERY_S = 1.0
"""How often a replica is asked how it is: a few ms of its time."""
POLL_S = 2.0
"""How often a server of somebody else is tried that is out of reach."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Limits:
    """How long what may take, in seconds."""

    stuck_s: float
    """An engine that draws nothing while requests are with it."""
    start_s: float
    """A server until it is ready."""
    weights_s: float
    """A server that is ready until it holds the current weights."""
    outage_s: float
    """No replica in rotation."""


class Supervisor:
    """Owns the return of lost replicas to `fleet`, and the clock of an outage.

    `prepare` brings a server that is ready to the current weights, and returns without a pause after it has seen that
    it holds them. `forgot` says what a server of somebody else lost without being lost itself. `relaunch` is how a
    server is started again.
    """

    def __init__(
        self,
        fleet: Fleet,
        limits: Limits,
        *,
        prepare: Callable[[Replica], Awaitable[None]],
        forgot: Callable[[Replica], Awaitable[str | None]],
        relaunch: Callable[[Launch], Launch],
    ) -> None:
        self._fleet = fleet
        self._limits = limits
        self._prepare = prepare
        self._forgot = forgot
        self._relaunch = relaunch
        self._scope = anyio.CancelScope()
        self._keepers: dict[Replica, asyncio.Task[object]] = {}

    async def run(self) -> None:
        """Until it is stopped, or no replica will come back."""
        with self._scope:
            async with anyio.create_task_group() as group:
                group.start_soon(self._bound_outages, name="asyncrl vllm outage clock")
                for replica in self._fleet.replicas:
                    group.start_soon(self._keep, replica, name=f"asyncrl supervisor of {replica.name}")

    def stop(self) -> None:
        self._scope.cancel()

    async def _keep(self, replica: Replica) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._keepers[replica] = task
        while True:
            await self._watch(replica)
            replica.comeback.lost(served=replica.served)
            await self._bring_back(replica)

    # In rotation

    async def _watch(self, replica: Replica) -> None:
        """Return when the replica is lost."""
        pulse = Pulse(_now(), self._limits.stuck_s)
        while replica.up:
            with replica.while_up(counts=False):
                await self._examine(replica, pulse)
                if cause := pulse.verdict(_now()):
                    self._fleet.lose(replica, cause)
                    return
                with anyio.move_on_after(WATCH_EVERY_S):
                    await replica.look.wait()
                replica.look = anyio.Event()

    async def _examine(self, replica: Replica, pulse: Pulse) -> None:
        try:
            with anyio.move_on_after(ANSWER_S) as silence:
                await replica.endpoint.get("/health", timeout_s=None)
                load = await replica.observe()
            if silence.cancelled_caught:
                pulse.silent()
                return
            busy = 0 if replica.endpoint.replacing else replica.in_flight
            pulse.answered(load, _now(), requests=busy)
            with anyio.move_on_after(ANSWER_S):  # the label is in the engine, which may be in the middle of a long step
                if replica.endpoint.server is None and (cause := await self._forgot(replica)):
                    self._fleet.lose(replica, cause)
        except Unreachable:
            if not pulse.refused():
                await anyio.sleep(WATCH_EVERY_S)
        except SamplerRequestError as error:
            if error.status == 503:
                server = replica.endpoint.server
                if server is not None:  # it ends by itself, and then its log says why
                    await server.ends_within(EXIT_NOTICE_S)
                self._fleet.lose(replica, f"its engine is dead: {error}")

    # Out of rotation

    async def _bring_back(self, replica: Replica) -> None:
        """Return when the replica is in rotation again."""
        began, server = _now(), replica.endpoint.server
        while True:
            self._give_up_if_hopeless()
            await anyio.sleep(replica.comeback.delay_s if server is not None else POLL_S)
            try:
                if server is not None:
                    await server.start(self._relaunch(server.launch))
                    await wait_until_ready([server], self._limits.start_s)
                with anyio.fail_after(self._limits.weights_s):
                    await self._prepare(replica)
            except (SamplerError, SamplerRequestError, OSError) as error:
                await self._failed(replica, error)
            else:
                self._fleet.put_in(replica)
                logger.warning("vllm replica back", replica=replica.name, seconds=round(_now() - began, 1))
                return

    async def _failed(self, replica: Replica, error: Exception) -> None:
        cause, server = str(error), replica.endpoint.server
        if isinstance(error, TimeoutError):
            cause = f"it did not take the current weights within {self._limits.weights_s:g} s"
        if server is not None:
            if isinstance(error, Unreachable) and await server.ends_within(EXIT_NOTICE_S):
                cause = server.obituary or cause
            replica.comeback.lost(served=False)
        if headline(cause) != headline(replica.cause):  # a server of somebody else is tried every few seconds
            logger.warning("vllm replica not back", replica=replica.name, cause=headline(cause, replica.name))
        replica.cause = cause

    def _give_up_if_hopeless(self) -> None:
        """What dies at once each time, for lack of memory say, is not mended by time."""
        ours = all(replica.endpoint.server is not None for replica in self._fleet.replicas)
        if ours and not self._fleet.up and all(replica.comeback.hopeless for replica in self._fleet.replicas):
            self._give_up(
                f"Every vLLM replica died {QUICK_DEATHS} times in a row without one answer. Starting them again does "
                "not mend that, so the run ends."
            )

    async def _bound_outages(self) -> None:
        """Return when one lasts too long."""
        while True:
            await self._fleet.none_up()
            began = _now()
            with anyio.move_on_after(self._limits.outage_s) as waited:
                try:
                    await self._fleet.some_up()
                except SamplerError:
                    return  # given up already
            if waited.cancelled_caught and not self._fleet.up:
                break
        self._give_up(
            f"No vLLM replica has come back within {_now() - began:.0f} s: sampler.outage_timeout_s, and as long as "
            "the first start took. Mend what ended them; raise the limit if that takes longer.",
            *(f"{replica.name} comes back, and waits at: {where(task)}" for replica, task in self._keepers.items()),
        )

    def _give_up(self, why: str, *stands: str) -> None:
        """`stands`: lines about where things are now."""
        logs = [replica.cause for replica in self._fleet.replicas if "\n" in replica.cause]
        self._fleet.fail("\n".join([why, self._fleet.describe(), *stands, *logs[:1]]))
        self.stop()


def _now() -> float:
    return asyncio.get_running_loop().time()
