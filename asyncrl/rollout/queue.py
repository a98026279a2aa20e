"""Finished groups on their way to the trainer: the one that is due first, groups whole, none too late.

`GroupOrder` is the pure rule, `GroupQueue` waits on it.

Under a hard bound every admitted group has a deadline: a group that began at version v, under the bound O, may be
trained in the batch that is taken after v + O steps, and in no later one. While O stays, the group that is due first
is the oldest. A finished group passes an unfinished one that is due earlier exactly as long as every unfinished group
still finds a place in time. docs/staleness.md has the proof that this keeps the bound, also where O moves, and what it
gains over handing groups out in admission order.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter

from asyncrl.types import Group


class GroupOrder:
    """Says which finished group is next. Owns the deadlines of the groups that are not handed out.

    Args:
        batch_groups: B, places of one batch.
        bound: O, in optimizer steps, for the groups that are admitted from now on. None: no deadlines, the oldest
            finished group is always next.
        in_order: No group passes an unfinished one, so that how long rollouts took changes nothing.
    """

    def __init__(self, batch_groups: int, bound: int | None, *, in_order: bool = False) -> None:
        self._batch_groups = batch_groups
        self.bound = bound
        self._in_order = in_order
        self._step = 0
        self._places = batch_groups
        self._due: Counter[int] = Counter()
        self._deadlines: dict[int, int] = {}
        self._ready: dict[int, Group] = {}
        self._heap: list[tuple[int, int]] = []
        """Of the finished groups: (deadline, sequence)."""

    def __len__(self) -> int:
        """Finished groups that wait."""
        return len(self._ready)

    def begin_batch(self, step: int) -> None:
        """The groups that are taken from now on are trained when `step` steps have been taken."""
        assert not self._due or min(self._due) >= step or self.bound is None
        self._step, self._places = step, self._batch_groups

    def admitted(self, sequence: int, version: int) -> None:
        """A group begins at `version`. Versions never fall from one admission to the next."""
        self._expect(sequence, version + (self.bound or 0))

    def admitted_before(self, group: Group, deadline: int) -> None:
        """An earlier life of the run admitted the group."""
        self._expect(group.sequence, group.version if self.bound is None else deadline)

    def _expect(self, sequence: int, deadline: int) -> None:
        self._deadlines[sequence] = deadline
        self._due[deadline] += 1

    def deadline(self, group: Group) -> int:
        """The step before which the group must be handed out; of one that has been, the step of its batch."""
        return self._deadlines.get(group.sequence, self._step)

    def finished(self, group: Group) -> None:
        self._ready[group.sequence] = group
        heapq.heappush(self._heap, (self._deadlines[group.sequence], group.sequence))

    def gone(self, sequence: int) -> None:
        """An admitted group leaves without having been handed out."""
        deadline = self._deadlines.pop(sequence)
        self._due[deadline] -= 1
        if not self._due[deadline]:
            del self._due[deadline]

    def take(self) -> Group | None:
        """The finished group that is due first, unless no place would be left for an unfinished one in time.

        Where that one does not fit, no other does: whatever is in its way is in theirs.
        """
        if not self._heap:
            return None
        deadline, sequence = self._heap[0]
        if not self._fits(deadline) or (self._in_order and sequence != min(self._deadlines)):
            return None
        assert self.bound is None or deadline >= self._step, f"group {sequence} was due at step {deadline}"
        heapq.heappop(self._heap)
        group = self._ready.pop(sequence)
        self.gone(sequence)
        self._places -= 1
        return group

    def _fits(self, deadline: int) -> bool:
        """Whether the groups that are due earlier still find places when this one takes the next place."""
        if self.bound is None:
            return True
        places, due = self._places - 1, 0
        for step in range(self._step, deadline):
            due += self._due.get(step, 0)
            if due > places:
                return False
            places += self._batch_groups
        return True

    def waiting(self) -> list[Group]:
        """The finished groups, in the order of their admission."""
        return [self._ready[sequence] for sequence in sorted(self._ready)]

    def put_back(self) -> None:
        """The group that was taken last is not trained after all: its place in the batch is free again."""
        self._places += 1


class GroupQueue:
    """The order, and someone who waits for the next group.

    Consumes finished groups from the scheduler; produces them for the engine; woken by `finished`, `gone`,
    `close` and `abort`.
    """

    def __init__(self, batch_groups: int, bound: int | None, *, in_order: bool = False) -> None:
        self.order = GroupOrder(batch_groups, bound, in_order=in_order)
        self._changed = asyncio.Event()
        self._closed = False
        self._aborted = False
        self.straggler_s = 0.0
        """How long somebody waited while groups were finished that might not pass an unfinished one."""

    def __len__(self) -> int:
        return len(self.order)

    def finished(self, group: Group) -> None:
        self.order.finished(group)
        self._changed.set()

    def gone(self, sequence: int) -> None:
        self.order.gone(sequence)
        self._changed.set()

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._changed.set()

    def reopen(self) -> None:
        """A group was sent back to the stream, so something more will come after all."""
        self._closed = False

    def abort(self) -> None:
        """Hand out nothing more, not even what is finished."""
        self._aborted = True
        self._changed.set()

    async def take(self) -> Group | None:
        """The next group, or None when the queue is closed and empty. The engine's watchdog limits the wait."""
        while not self._aborted:
            group = self.order.take()
            if group is not None or (self._closed and not len(self.order)):
                return group
            self._changed.clear()
            await self._wait(held_back=len(self.order) > 0)
        return None

    async def _wait(self, *, held_back: bool) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        await self._changed.wait()
        if held_back:
            self.straggler_s += clock() - began
