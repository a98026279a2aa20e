"""The vLLM replicas together: which of them a request goes to, and what becomes of it when that one is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import anyio
import structlog

from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.replica import Replica, ReplicaLost
from asyncrl.sampling.routing import Router

T = TypeVar("T")
Act = Callable[[Replica], Awaitable[T]]

MOST_LOSSES = 2
"""Replicas that a request may be lost with; it is drawn again each time. What is lost with a third one may be what
ends them, and shall not take all of them down for good."""

logger = structlog.get_logger()


@dataclass(slots=True)
class Answers(Generic[T]):
    """What several replicas said. One that was lost meanwhile said nothing."""

    given: dict[Replica, T] = field(default_factory=dict)
    refused: dict[Replica, SamplerRequestError] = field(default_factory=dict)


class Fleet:
    """Owns the rotation: which replicas are up, and the requests in flight at each."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self.replicas = list(replicas)
        self.fatal: str | None = None
        """Why none will come back."""
        self.losses = 0
        """Replicas that were lost so far."""
        self.rejected = 0
        """Requests that were refused because a queue was full, or lost on the way."""
        self._router = Router(len(self.replicas))
        self._some = anyio.Event()
        self._none = anyio.Event()
        self._some.set()

    @property
    def up(self) -> list[Replica]:
        """Those that requests go to."""
        return [replica for replica in self.replicas if replica.up]

    def check(self) -> None:
        """Raises `SamplerError` when none will come back."""
        if self.fatal is not None:
            raise SamplerError(self.fatal)

    async def some_up(self) -> None:
        """Wait until one is up; return at once where one is. Raises as `check`."""
        self.check()
        while not self.up:
            await self._some.wait()
            self.check()

    async def none_up(self) -> None:
        """Wait until none is up."""
        while self.up:
            await self._none.wait()

    def describe(self) -> str:
        """What is wrong with those that are not up, a line for each."""
        out = [replica for replica in self.replicas if not replica.up]
        return "\n".join(f"{replica.name}: {headline(replica.cause, replica.name)}" for replica in out)

    # What becomes of them

    def lose(self, replica: Replica, cause: str) -> None:
        """Take it out of the rotation: what is in flight there is cancelled."""
        if not replica.up:
            return
        logger.warning(
            "vllm replica lost", replica=replica.name, requests=replica.in_flight, cause=headline(cause, replica.name)
        )
        self.losses += 1
        self._router.take_out(self.replicas.index(replica))
        replica.take_out(cause)
        if not self.up:
            self._some = anyio.Event()
            self._none.set()

    def put_in(self, replica: Replica) -> None:
        """Requests may go to it again: it holds the weights that the others hold."""
        replica.put_in()
        self._router.put_in(self.replicas.index(replica))
        self._none = anyio.Event()
        self._some.set()

    def fail(self, cause: str) -> None:
        """None will come back: whoever waits for one is told."""
        self.fatal = self.fatal or cause
        self._some.set()

    # What is asked of them

    async def ask(self, session: str, act: Act[T], ready: Callable[[], Awaitable[None]]) -> T:
        """`act` on the replica of `session`; on another one, or on the first that comes back, when that one is lost.

        `ready`: waited for before each attempt, while no replica is chosen yet.
        Raises `SamplerRequestError` for a refusal, and for a request that is lost again and again.
        """
        for _ in range(MOST_LOSSES + 1):
            while True:
                await self.some_up()
                await ready()
                if self.up:
                    break
            place = self._router.begin(session)
            replica = self.replicas[place]
            try:
                answer = await self._attend(replica, act)
            except ReplicaLost:
                self.rejected += 1
                last = replica
            except SamplerRequestError as error:
                self.rejected += error.status is None or error.status >= 500
                raise
            else:
                replica.served = True
                return answer
            finally:
                self._router.end(place)
        raise SamplerRequestError(
            f"this request was with {MOST_LOSSES + 1} replicas when they were lost, so it may be what ends them; it is "
            f"not sent a further time. The last was {last.name}: {headline(last.cause, last.name)}"
        )

    async def on(self, replicas: Sequence[Replica], act: Act[T], *, counts: bool = True) -> Answers[T]:
        """`act` on all of `replicas` at once. `counts`: while it lasts, their engines should be at work."""
        answers: Answers[T] = Answers()

        async def one(replica: Replica) -> None:
            try:
                answers.given[replica] = await self._attend(replica, act, counts=counts)
            except SamplerRequestError as error:
                answers.refused[replica] = error
            except ReplicaLost:
                pass

        async with anyio.create_task_group() as group:
            for replica in replicas:
                group.start_soon(one, replica)
        return answers

    async def _attend(self, replica: Replica, act: Act[T], *, counts: bool = True) -> T:
        """Raises `ReplicaLost` when the replica is lost before it answers."""
        with replica.while_up(counts=counts):
            try:
                return await act(replica)
            except SamplerRequestError as error:
                if not await replica.is_lost_after(error):
                    raise
        raise ReplicaLost(replica.cause)


def headline(cause: str, name: str = "") -> str:
    """The first line; without the name that it begins with, where that has been said."""
    return cause.partition("\n")[0].removeprefix(name).strip(" :")
