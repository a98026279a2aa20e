"""Virtual time for millions of rollouts: what happens outside of the event loop happens inside of its `select`.

In real time an event loop sleeps in `select` until the world outside has news for it. Here the world is a heap of
things to come: `select` lets them happen, one after the other, and returns as soon as one of them has woken somebody on
the loop. So a rollout of ten turns wakes its coroutine once, and a turn costs a few heap operations and no timer, task
or future of asyncio. Timers of asyncio work too, on the same clock.

    outcome = run_in(world, main())
"""

from __future__ import annotations

import asyncio
import heapq
import math
import selectors
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeVar

from asyncrl.testing.clock import Deadlock

T = TypeVar("T")
Act = Callable[[float], None]
"""Something that happens, called with its own time (s)."""

POLL_EVERY = 1024
"""Turns of the loop between two looks at its sockets: there is only the one that a signal or a thread would use."""


class World:
    """Owns the clock and what is still to come. Acts at the same time happen in the order they were set."""

    def __init__(self) -> None:
        self.now = 0.0
        """s."""
        self._coming: list[tuple[float, int, Act]] = []
        self._order = count()
        self._woke = False

    def at(self, time: float, act: Act) -> None:
        heapq.heappush(self._coming, (time, next(self._order), act))

    def wake(self, future: asyncio.Future[Any], result: Any = None) -> None:
        """Give a future of the loop its result; the loop goes on before anything else happens."""
        if not future.done():
            future.set_result(result)
            self._woke = True

    async def sleep(self, seconds: float) -> None:
        """`asyncio.sleep`, at a third of its price."""
        if seconds <= 0:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.at(self.now + seconds, lambda _: self.wake(future))
        await future

    def pass_until(self, limit: float) -> None:
        """Let things happen until one has woken the loop, or up to the time `limit`.

        Raises:
            Deadlock: `limit` is infinite, and nothing is left that could wake anybody.
        """
        coming = self._coming
        self._woke = False
        while coming and coming[0][0] <= limit:
            self.now, _, act = heapq.heappop(coming)
            act(self.now)
            if self._woke:
                return
        if math.isinf(limit):
            raise Deadlock("every task waits for another, no timer is set, and nothing is to come")
        self.now = limit


class _Select(selectors.DefaultSelector):
    """Instead of sleeping until something happens, makes it happen."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._turns += 1
        events = super().select(0) if self._turns % POLL_EVERY == 0 else []
        if not events and timeout != 0:
            self._world.pass_until(math.inf if timeout is None else self._world.now + timeout)
        return events


class _Loop(asyncio.SelectorEventLoop):
    """`time()` is that of the world."""

    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__(_Select(world))

    def time(self) -> float:
        return self._world.now


def run_in(world: World, main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` in the time of `world`.

    Raises:
        Deadlock: nothing can happen any more, and `main` has not ended.
    """
    with asyncio.Runner(loop_factory=lambda: _Loop(world)) as runner:
        return runner.run(main)
