"""One vLLM replica: its server, whether requests go to it, and what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import anyio

from asyncrl.errors import SamplerRequestError
from asyncrl.sampling.endpoint import Endpoint
from asyncrl.sampling.load import EngineLoad
from asyncrl.sampling.vitals import Comeback
from asyncrl.types import ServerLoad

EXIT_NOTICE_S = 3.0
"""A server whose engine died answers 500 and ends about 0.5 s later; one that takes no connections is found gone after
a second."""


class ReplicaLost(Exception):
    """The replica died, hangs or is out of reach; its answer will not come."""


class Replica:
    """A place in the rotation, in which one server follows another. Owns what is in flight there."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.up = True
        """Requests go to it."""
        self.cause = ""
        """Why they do not."""
        self.served = False
        """It has answered a request since it was last put into rotation."""
        self.adapters: set[int] = set()
        """Versions that its server has loaded."""
        self.version = 0
        """Full weights: the version that its server holds."""
        self.comeback = Comeback()
        self.look = anyio.Event()
        """Set when there is reason to look at it now."""
        self._out = anyio.Event()
        self._load = EngineLoad()
        self._before = EngineLoad()  # counters of the servers that are gone
        self._in_flight: dict[anyio.CancelScope, bool] = {}

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def in_flight(self) -> int:
        """Requests and hot-loads that are with it, questions about its health left out."""
        return sum(self._in_flight.values())

    @contextmanager
    def while_up(self, *, counts: bool = True) -> Iterator[None]:
        """What waits in the block is cancelled when the replica is lost, and the block is left."""
        with anyio.CancelScope() as scope:
            self._in_flight[scope] = counts
            try:
                yield
            finally:
                del self._in_flight[scope]

    async def is_lost_after(self, error: SamplerRequestError) -> bool:
        """Whether it is lost, now that a request failed with `error`; if so, this is found out within seconds.

        A refusal says nothing about the server, but no answer, an error of its own, a fragment (it was told to end), or
        an adapter that it does not know (somebody started it anew) do.
        """
        if error.status is None or error.status == 404 or (error.status >= 500 and error.status != 503):
            self.look.set()
            with anyio.move_on_after(EXIT_NOTICE_S):
                await self._out.wait()
        return not self.up

    def take_out(self, cause: str) -> None:
        self.up, self.cause = False, cause
        self._out.set()
        for scope in list(self._in_flight):
            scope.cancel()
        self._before, self._load = self.counted, EngineLoad()

    def put_in(self) -> None:
        self.up, self.served, self.cause = True, False, ""
        self._out = anyio.Event()

    async def observe(self) -> EngineLoad:
        """How busy its server is."""
        load = await self.endpoint.load()
        if self.up:  # the last word of a server that is lost has been counted
            self._load = load
        return load

    def load(self) -> ServerLoad:
        """What its server last said."""
        return ServerLoad(self.name, self._load.running, self._load.waiting, self._load.kv_use, self.up)

    @property
    def counted(self) -> EngineLoad:
        """What it last said: gauges of this server, counters of all that were here."""
        return EngineLoad(
            running=self._load.running,
            waiting=self._load.waiting,
            kv_use=self._load.kv_use,
            preemptions=self._before.preemptions + self._load.preemptions,
            generated_tokens=self._before.generated_tokens + self._load.generated_tokens,
        )
