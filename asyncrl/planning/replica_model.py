"""One engine of the modelled sampler: a batch of requests that share it, in virtual time."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from asyncrl.planning.workload import Call
from asyncrl.planning.world import World

if TYPE_CHECKING:
    from asyncrl.planning.sampler_model import SamplerModel

ENDED = 1e-6
"""Tokens that a request may be short of its end: rounding, far below one token."""
Drawn = list[tuple[int, int]]
"""(version, tokens that it drew), in order."""


@dataclass(slots=True)
class Totals:
    """What the replicas of a sampler do, together. They keep it."""

    running: int = 0
    waiting: int = 0
    busy: int = 0
    """Replicas that have something to do."""
    on_busy: Callable[[], None] = lambda: None
    """Called when the first one has, and when the last one has not any more."""

    def went_busy(self) -> None:
        self.busy += 1
        if self.busy == 1:
            self.on_busy()

    def went_idle(self) -> None:
        self.busy -= 1
        if not self.busy:
            self.on_busy()


class Request:
    """A call on its way through a replica."""

    __slots__ = ("began_at", "call", "dead", "on_end", "version")

    def __init__(self, call: Call, version: int, on_end: Callable[[Request, Drawn], None]) -> None:
        self.call = call
        self.version = version
        self.on_end = on_end
        self.began_at = -1.0
        """`served` of the replica; negative before that."""
        self.dead = False


class Replica:
    """Owns the requests of one engine. `served` is right as of `at`."""

    __slots__ = (
        *("_at", "_debt_s", "_due", "_heap", "_model", "_order", "_totals", "_world"),
        *("running", "served", "speed", "swaps", "waiting"),
    )

    def __init__(self, totals: Totals, world: World, model: SamplerModel) -> None:
        self._totals, self._world, self._model = totals, world, model
        self.running = 0
        self.served = 0.0
        self.speed = 1.0
        self.waiting: deque[Request] = deque()
        self.swaps: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=64)
        """(served, version that tokens are drawn from since then)."""
        self._heap: list[tuple[float, int, Request]] = []
        self._order = count()
        self._at = 0.0
        self._debt_s = 0.0
        """Seconds of work that come before the next token: prompts, and pauses."""
        self._due = math.inf
        """When it is looked at next."""

    def begin(self, request: Request) -> None:
        if request.dead:
            return
        self._advance()
        if self._model.max_running is not None and self.running >= self._model.max_running:
            self.waiting.append(request)
            self._totals.waiting += 1
        else:
            if not self.running:
                self._totals.went_busy()
            self._join(request)
            self._arm()

    def leave(self, request: Request) -> None:
        """Its rollout was cancelled."""
        request.dead = True
        if request in self.waiting:
            self.waiting.remove(request)
            self._totals.waiting -= 1
        elif request.began_at >= 0:
            self._advance()
            self._left()
            self._arm()

    def pause(self, seconds: float) -> None:
        self._advance()
        self._debt_s += seconds
        self._arm()

    def swap(self, version: int) -> None:
        """Tokens come from other weights from now on."""
        self._advance()
        self.swaps.append((self.served, version))

    def set_speed(self, speed: float) -> None:
        self._advance()
        self.speed = speed
        self._arm()

    def _advance(self) -> None:
        now = self._world.now
        work_s = (now - self._at) * self.speed
        self._at = now
        if work_s <= self._debt_s:
            self._debt_s -= work_s
            return
        if self.running:
            self.served += (work_s - self._debt_s) / self._model.token_time(self.running)
        self._debt_s = 0.0

    def _arm(self) -> None:
        """Look again when the next request ends. One that is set too early only looks once more."""
        heap = self._heap
        while heap and heap[0][2].dead:
            heapq.heappop(heap)
        if not heap:
            return
        left_s = self._debt_s + max(0.0, heap[0][0] - self.served) * self._model.token_time(self.running)
        # Later than now, also where the rest takes less than the clock can tell.
        due = max(self._world.now + left_s / self.speed, math.nextafter(self._world.now, math.inf))
        if due < self._due:
            self._due = due
            self._world.at(due, self._look)

    def _look(self, time: float) -> None:
        if time != self._due:
            return  # another look is set
        self._due = math.inf
        self._advance()
        heap, ended = self._heap, list[Request]()
        while heap and heap[0][0] <= self.served + ENDED:
            request = heapq.heappop(heap)[2]
            if not request.dead:
                self._left()
                ended.append(request)
        self._arm()
        for request in ended:
            request.on_end(request, self._drawn(request))

    def _left(self) -> None:
        self.running -= 1
        self._totals.running -= 1
        if self.waiting:
            self._totals.waiting -= 1
            self._join(self.waiting.popleft())
        elif not self.running:
            self._totals.went_idle()

    def _join(self, request: Request) -> None:
        self.running += 1
        self._totals.running += 1
        self._debt_s += request.call.fresh * self._model.prompt_s
        request.began_at = self.served
        heapq.heappush(self._heap, (self.served + request.call.drawn, next(self._order), request))

    def _drawn(self, request: Request) -> Drawn:
        """Which weights drew how many of its tokens."""
        tokens, swaps = request.call.drawn, self.swaps
        if self._model.side_by_side:
            return [(request.version, tokens)]
        if request.began_at >= swaps[-1][0]:
            return [(swaps[-1][1], tokens)]
        found: Drawn = []
        for served, version in reversed(swaps):
            own = min(tokens, max(0, tokens - round(served - request.began_at)))
            if own:
                found.append((version, own))
                tokens -= own
            if served <= request.began_at or not tokens:
                break
        if tokens:  # it has seen more hot-loads than are remembered
            found.append((swaps[0][1], tokens))
        return found[::-1]
