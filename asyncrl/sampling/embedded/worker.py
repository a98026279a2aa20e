"""The thread that decodes.

    consumes   commands from the event loop: submit, cancel, publish, score, stop
    produces   replies, all of one decode step in one call of `deliver`
    waits for  a command, and only when no row is running
    woken by   its inbox

Rows are decoded in batches by weights: the batch `None` follows the newest version, every other one is pinned to
its own. One forward per batch and step.
"""

from __future__ import annotations

import math
import threading
from asyncio import Future
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
import torch

from asyncrl.errors import AsyncRLError, SamplerError, SamplerRequestError
from asyncrl.sampling.embedded.batch import DecodeBatch, Finished, Ticket
from asyncrl.sampling.embedded.columns import ColumnCache
from asyncrl.sampling.embedded.prefixes import PrefixStore
from asyncrl.sampling.embedded.versions import LiveModel, ModelVersions

_JOIN_SHARE = 8
"""A prefill is a forward of its own, so requests wait until they are 1/8 of the running rows ..."""
_JOIN_PATIENCE_STEPS = 4
"""... but for no more steps than this. Against joining at once: 4% more tokens per CPU second for a tiny model; more
where a forward costs the same for two rows as for all, as on a GPU."""
_IDLE_S = 1.0
"""An idle worker looks up this often, so that it never waits without a limit."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the worker has to know beside the weights."""

    max_running: int
    in_flight: Literal["interrupt", "keep", "drain"]
    side_by_side: bool
    """Every request keeps the version it was sent with, and nothing pauses."""
    prefill_tokens: int
    """Padded prompt tokens of one forward."""
    torch_threads: int | None
    alone: bool = False
    """A request is decoded by itself, in a batch of its own, from nothing that another one computed: kernels round
    otherwise for another number of rows, so only then are the bits of an answer those of its request alone."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A future of the event loop and what it becomes."""

    future: Future[Any]
    result: Any = None
    error: AsyncRLError | None = None


@dataclass(frozen=True, slots=True)
class Submit:
    tickets: Sequence[Ticket]


@dataclass(frozen=True, slots=True)
class Cancel:
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Publish:
    model: LiveModel
    done: Future[None]


@dataclass(frozen=True, slots=True)
class Score:
    token_ids: np.ndarray
    """[N] int64."""
    start: int
    version: int
    session: str
    reply: Future[list[float]]


@dataclass(frozen=True, slots=True)
class Stop:
    """The last command."""


Command = Submit | Cancel | Publish | Score | Stop


class Worker:
    """Owns the models, the batches and the queue of requests. Other threads use `inbox` and read the counters."""

    def __init__(self, versions: ModelVersions, settings: Settings, deliver: Callable[[list[Reply]], None]) -> None:
        self.inbox: SimpleQueue[Command] = SimpleQueue()
        self.running = 0
        self.generated_tokens = 0
        self.failure: SamplerError | None = None
        self.prefixes = PrefixStore(0) if settings.alone else PrefixStore.beside(versions.base)
        self.thread = threading.Thread(target=self._run, name="asyncrl-sampler", daemon=True)
        self._versions = versions
        self._settings = settings
        self._deliver = deliver
        self._batches: dict[int | None, DecodeBatch] = {}
        self._open: set[Ticket] = set()  # all that wait or run, so that none is forgotten if this thread fails
        self._waiting: deque[Ticket] = deque()
        self._held_steps = 0
        self._swaps: deque[Publish] = deque()
        self._scores: deque[Score] = deque()
        self._replies: list[Reply] = []
        self._stopping = False

    def _run(self) -> None:
        if self._settings.torch_threads is not None:
            torch.set_num_threads(self._settings.torch_threads)
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self.turn()
            reason = SamplerError("the sampler was closed while this request was under way.")
        # Whatever ends this thread must reach those who wait for it: nobody else will ever answer them.
        except Exception as error:
            reason = self._explain(error)
        self._fail(reason)

    def turn(self) -> None:
        """Everything that happens between two decode steps, and the step."""
        self._take_commands()
        self._swap()
        self._count()
        self._join()
        for batch in self._batches.values():
            if batch.running:
                self.generated_tokens += batch.running
                self._collect(batch.step())
        self._score()
        self._tidy()
        self._count()
        if self._replies:
            self._deliver(self._replies)
            self._replies = []

    # Commands

    def _take_commands(self) -> None:
        busy = self.running or self._waiting or self._swaps or self._scores
        try:
            self._take(self.inbox.get(timeout=_IDLE_S) if not busy else self.inbox.get_nowait())
            while True:
                self._take(self.inbox.get_nowait())
        except Empty:
            return

    def _take(self, command: Command) -> None:
        match command:
            case Submit(tickets):
                for ticket in tickets:
                    self._submit(ticket)
            case Cancel(ticket):
                self._open.discard(ticket)
                if ticket.batch is not None and ticket.row >= 0:
                    ticket.batch.leave(ticket)
                elif ticket in self._waiting:
                    self._waiting.remove(ticket)
            case Publish():
                self._swaps.append(command)
                if self._settings.side_by_side:
                    self._swap()  # before the requests behind it in the inbox
            case Score():
                self._scores.append(command)
            case Stop():
                self._stopping = True

    def _submit(self, ticket: Ticket) -> None:
        if ticket.version is None and self._settings.side_by_side:
            ticket.version = self._versions.newest
        if ticket.version is None or self._versions.get(ticket.version) is not None:
            self._waiting.append(ticket)
            self._open.add(ticket)
        else:
            self._replies.append(Reply(ticket.reply, error=self._not_loaded(ticket.version)))

    def _score(self) -> None:
        while self._scores:
            job = self._scores[0]
            model = self._versions.get(job.version)
            if model is None:
                self._replies.append(Reply(job.reply, error=self._not_loaded(job.version)))
            else:
                states, seen = self.prefixes.find(model, job.session, job.token_ids[: job.start])
                cache = ColumnCache.of_row(states, seen, len(job.token_ids)) if seen else None
                ids = torch.from_numpy(job.token_ids).to(model.device)
                self._replies.append(Reply(job.reply, model.logprobs(ids, job.start, cache, seen).tolist()))
            self._scores.popleft()

    def _not_loaded(self, version: int) -> SamplerRequestError:
        loaded = ", ".join(map(str, self._versions.loaded()))
        return SamplerRequestError(
            f"version {version} is not in the sampler (there are: {loaded}). A rollout outlived the versions that are "
            "kept; let it begin again, or keep more versions.",
            status=404,
        )

    # Weights

    def _swap(self) -> None:
        """Make published weights live, in order. Drained swaps wait for the last row that follows the newest."""
        while self._swaps:
            following, settings = self._batches.get(None), self._settings
            if following is not None and following.running and settings.in_flight == "drain":
                return
            job = self._swaps[0]
            self._versions.add(job.model)
            if following is not None:
                following.swap(job.model, recompute=settings.in_flight == "interrupt")
            self._retire()
            self._replies.append(Reply(job.done))
            self._swaps.popleft()

    def _retire(self) -> None:
        pinned = {version for version, batch in self._batches.items() if version is not None and batch.running}
        self._versions.retire(pinned | {ticket.version for ticket in self._waiting if ticket.version is not None})
        self.prefixes.retain(self._versions.models())

    def _tidy(self) -> None:
        """Free the caches of pinned versions that nobody uses any more."""
        kept = () if self._settings.alone else (None, self._versions.newest)
        spent = [version for version, batch in self._batches.items() if version not in kept and not batch.running]
        for version in spent:
            del self._batches[version]
        if spent:
            self._retire()

    # Rows

    def _join(self) -> None:
        """Give free rows to those that wait longest, batch by batch."""
        admitted = self._admit()
        by_version: dict[int | None, list[Ticket]] = {}
        for ticket in admitted:
            by_version.setdefault(ticket.version, []).append(ticket)
        for version, tickets in by_version.items():
            batch = self._batch(version)
            self.generated_tokens += len(tickets)
            self._collect(batch.join(tickets))

    def _collect(self, finished: Sequence[Finished]) -> None:
        self._replies += [Reply(item.ticket.reply, item.completion) for item in finished]
        self._open.difference_update(item.ticket for item in finished)

    def _count(self) -> None:
        self.running = sum(batch.running for batch in self._batches.values())

    def _admit(self) -> list[Ticket]:
        draining = bool(self._swaps)
        free = self._settings.max_running - self.running
        ready = min(free, len(self._waiting))
        if ready <= 0:
            return []
        self._held_steps += 1
        if ready < math.ceil(self.running / _JOIN_SHARE) and self._held_steps <= _JOIN_PATIENCE_STEPS:
            return []
        self._held_steps = 0
        if not draining:
            return [self._waiting.popleft() for _ in range(ready)]
        admitted = [ticket for ticket in self._waiting if ticket.version is not None][:ready]
        for ticket in admitted:
            self._waiting.remove(ticket)
        return admitted

    def _batch(self, version: int | None) -> DecodeBatch:
        batch = self._batches.get(version)
        if batch is None:
            model = self._versions.get(self._versions.newest if version is None else version)
            assert model is not None, f"version {version} was retired while a request for it was waiting"
            settings = self._settings
            batch = DecodeBatch(
                model, self.prefixes, max_rows=settings.max_running, prefill_tokens=settings.prefill_tokens
            )
            self._batches[version] = batch
        return batch

    # The end

    def _fail(self, reason: SamplerError) -> None:
        """Answer everyone. `failure` is set first: whoever puts a command in later looks at it afterwards."""
        self.failure = reason
        futures: list[Future[Any]] = [ticket.reply for ticket in self._open]
        futures += [job.done for job in self._swaps] + [job.reply for job in self._scores]
        while not self.inbox.empty():
            match self.inbox.get_nowait():
                case Submit(tickets):
                    futures += [ticket.reply for ticket in tickets]
                case Publish(done=future) | Score(reply=future):
                    futures.append(future)
        self._batches.clear()
        self.prefixes.retain(())
        self._waiting.clear()
        self.running = 0
        self._deliver(self._replies + [Reply(future, error=reason) for future in futures])

    def _explain(self, error: Exception) -> SamplerError:
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        memory = isinstance(error, torch.OutOfMemoryError) or "memory" in str(error)
        advice = (
            f"Lower sampler.max_running (now {self._settings.max_running}), or max_seq_len."
            if memory
            else "This is a defect of the sampler or of the model's code; the cause is attached."
        )
        failure = SamplerError(f"the embedded sampler died with {self.running} requests running. {what}. {advice}")
        failure.__cause__ = error
        return failure
