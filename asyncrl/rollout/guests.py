"""Slots of the training window for the rollouts of an evaluation.

A guest's rollout takes a slot like any other, so that the window stays what bounds the requests at the sampler, and
the controller sees nothing that it does not govern. Guests go first up to their share, or they would wait for ever
while the window is full. Only where their share is the whole window (one of a single slot) do both take turns.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from asyncrl.rollout.concurrency import ConcurrencyController

SHARE = 8
"""An evaluation has this part of the window, at least one slot: training keeps nearly all of its pace."""


class Guests:
    """Owns the slots that an evaluation holds, and who waits for one. `freed` is called when one comes free."""

    def __init__(self, slots: ConcurrencyController, most: int | None = None) -> None:
        self.in_use = 0
        self.freed: Callable[[], None] = self.admit
        self._slots: ConcurrencyController | None = slots
        self._most = most
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def most(self) -> int:
        """Slots that they may have now."""
        if self._most is not None or self._slots is None:
            return self._most or 1
        return max(1, self._slots.window_size // SHARE)

    async def acquire(self) -> None:
        """Wait for a slot."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self.admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        self.in_use -= 1
        if self._slots is not None:
            self._slots.release()
            if self.most < self._slots.window_size:
                self.admit()
        self.freed()

    def admit(self) -> None:
        """Give free slots to those that wait longest."""
        while self._waiting and self.in_use < self.most:
            if self._waiting[0].done():  # it was cancelled
                self._waiting.popleft()
            elif self._slots is None or self._slots.try_acquire():
                self.in_use += 1
                self._waiting.popleft().set_result(None)
            else:
                return

    def training_is_over(self, most: int) -> None:
        """The window has no other rollouts any more: from now on `most` may run at once."""
        self._slots, self._most, self.freed = None, most, self.admit
        self.admit()
