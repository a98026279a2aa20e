"""The sampler as a simulation needs it: replicas that decode batches, in virtual time, without a token in sight.

A replica with n requests gives each of them a token every

    t(n) = token_s + (n - 1) * running_s        seconds

and works off prompts in between: each fresh prompt token takes `prompt_s`, in which nobody gets a token. All requests
of a replica progress alike, so one number, the tokens that each has been given since the replica began (`served`),
tells how far all of them are: a request that joins at `served` = 900 for 64 tokens ends at 964. The next to end is the
top of a heap, and nothing is done per token or per running request.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from asyncrl.planning.replica_model import Drawn, Replica, Request, Totals
from asyncrl.planning.workload import Attempt, Call
from asyncrl.planning.world import World
from asyncrl.sampling.routing import Router
from asyncrl.types import Completion, Load, SampleRequest, Weights


class Played(NamedTuple):
    """What came of a rollout."""

    drawn: Drawn
    """What drew its tokens, one entry per turn and version."""
    model_s: float
    """Seconds in calls of the model."""


@dataclass(frozen=True, slots=True)
class SamplerModel:
    """How fast the sampler is. Times in seconds."""

    replicas: int = 1
    token_s: float = 0.02
    """One token of a request that is alone in its replica."""
    running_s: float = 0.0
    """What each further running request adds to that, for all of them."""
    prompt_s: float = 0.0
    """One prompt token that is not in the cache; the others wait meanwhile."""
    call_s: float = 0.0
    """What each call adds, whatever its size: transport, and waiting for the next step of the engine."""
    max_running: int | None = None
    """Requests that a replica decodes at once; further ones wait. None: any number."""
    hot_load_s: tuple[float, ...] = (0.0,)
    """From exported weights until they are live: one is drawn for each hot-load."""
    pause_share: float = 0.0
    """The part of a hot-load in which no token is drawn."""
    side_by_side: bool = False
    """Several versions are live (LoRA), and a call ends on the one that it began with. Else all go on with the new."""
    drain: bool = False
    """A hot-load waits until all calls have ended, and new ones wait for it."""
    slowdown: float = 0.0
    """How much longer everything takes while the trainer computes on the same device: 0.5 is half as long again."""

    def token_time(self, running: float) -> float:
        """t(n), in seconds."""
        return self.token_s + max(running - 1, 0) * self.running_s


class ModelledSampler:
    """Implements `asyncrl.types.Sampler`, and plays whole rollouts without waking their coroutines in between."""

    wants: Literal["tensors", "files"] = "tensors"

    def __init__(self, model: SamplerModel, world: World, rng: random.Random) -> None:
        self.model = model
        self.world = world
        self.version = 0
        self.totals = Totals()
        self.generated = 0
        self._rng = rng
        self._router = Router(model.replicas)
        self._replicas = [Replica(self.totals, world, model) for _ in range(model.replicas)]
        self._closed = False
        self._held: list[Callable[[], None]] = []

    async def __aenter__(self) -> ModelledSampler:
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    # Rollouts

    async def play(self, attempt: Attempt, pinned: int | None = None) -> Played:
        """Live through the turns of a rollout."""
        play = _Play(self, attempt, pinned, asyncio.get_running_loop().create_future())
        play.go_on(self.world.now)
        try:
            await play.over
        except asyncio.CancelledError:
            play.cancel()
            raise
        return Played(play.drawn, play.model_s)

    def send(self, request: Request, home: int | None) -> int:
        """Give a call to the replica of its rollout, or to the one with the fewest. Returns which."""
        place = self._router.place(home)
        if self._closed:
            self._held.append(lambda: self._replicas[place].begin(request))
        else:
            self._replicas[place].begin(request)
        return place

    def ended(self, place: int, call: Call) -> None:
        self.generated += call.drawn
        self._router.end(place)

    def drop(self, request: Request, place: int) -> None:
        self._router.end(place)
        self._replicas[place].leave(request)

    # The rest of a sampler

    async def generate(self, request: SampleRequest) -> Completion:
        """As many tokens as the request allows; all are token 0, with log-prob 0."""
        call = Call(len(request.token_ids), len(request.token_ids), request.params.max_tokens)
        over: asyncio.Future[Drawn] = asyncio.get_running_loop().create_future()
        version = self.version if request.version is None else request.version
        sent = Request(call, version, lambda request, drawn: self.world.wake(over, drawn))
        place = self.send(sent, None)
        try:
            drawn = await over
        except asyncio.CancelledError:
            self.drop(sent, place)
            raise
        self.ended(place, call)
        await self.world.sleep(self.model.call_s)
        versions = [version for version, tokens in drawn for _ in range(tokens)]
        return Completion([0] * call.drawn, [0.0] * call.drawn, versions, "length")

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        return [0.0] * (len(token_ids) - start)

    async def publish(self, weights: Weights) -> None:
        seconds = self._rng.choice(self.model.hot_load_s)
        if self.model.drain:
            await self._drained()
        pause_s = seconds * self.model.pause_share
        for replica in self._replicas if pause_s else ():
            replica.pause(pause_s * replica.speed)
        await self.world.sleep(seconds)
        self.version = weights.version
        for replica in self._replicas if not self.model.side_by_side else ():
            replica.swap(weights.version)
        self._closed = False
        held, self._held = self._held, []
        for begin in held:
            begin()

    async def _drained(self) -> None:
        self._closed = True
        while self.totals.busy:
            await self.world.sleep(self.model.token_time(1))

    @contextmanager
    def hold(self) -> Iterator[int | None]:
        yield None

    async def load(self) -> Load:
        return Load(self.totals.running, self.totals.waiting, generated_tokens=self.generated)

    # The trainer beside it

    def trainer_computes(self, yes: bool) -> None:
        if self.model.slowdown:
            for replica in self._replicas:
                replica.set_speed(1 / (1 + self.model.slowdown) if yes else 1.0)


class _Play:
    """A rollout on its way through its turns."""

    __slots__ = (
        *("_attempt", "_home", "_pinned", "_sampler", "_sent_at", "_turn", "_under_way"),
        *("drawn", "model_s", "over"),
    )

    def __init__(
        self, sampler: ModelledSampler, attempt: Attempt, pinned: int | None, over: asyncio.Future[None]
    ) -> None:
        self._sampler, self._attempt, self._pinned = sampler, attempt, pinned
        self._turn = -1
        self._home: int | None = None
        self._sent_at = 0.0
        self._under_way: list[Request] = []
        self.drawn: Drawn = []
        self.model_s = 0.0
        self.over = over

    def go_on(self, now: float) -> None:
        """To the next turn, once its gap has passed; or to the end."""
        self._turn += 1
        attempt = self._attempt
        if self._turn < len(attempt.turns):
            gap_s, then = attempt.turns[self._turn].gap_s, self._call
        else:
            gap_s, then = attempt.after_s, self._end
        if self._turn:
            gap_s += self._sampler.model.call_s
        if gap_s > 0:
            self._sampler.world.at(now + gap_s, then)
        else:
            then(now)

    def cancel(self) -> None:
        for request in self._under_way:
            assert self._home is not None
            self._sampler.drop(request, self._home)
        self._under_way.clear()

    def _call(self, now: float) -> None:
        if self.over.done():
            return
        sampler = self._sampler
        version = sampler.version if self._pinned is None else self._pinned
        self._sent_at = now
        self._under_way = [Request(call, version, self._ended) for call in self._attempt.turns[self._turn].calls]
        for request in tuple(self._under_way):
            self._home = sampler.send(request, self._home)

    def _ended(self, request: Request, drawn: Drawn) -> None:
        sampler = self._sampler
        assert self._home is not None
        sampler.ended(self._home, request.call)
        if request.call.drawn:
            self.drawn += drawn
        self._under_way.remove(request)
        if not self._under_way:
            now = sampler.world.now
            self.model_s += now - self._sent_at + sampler.model.call_s
            self.go_on(now)

    def _end(self, now: float) -> None:
        self._sampler.world.wake(self.over)
