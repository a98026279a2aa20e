"""The ledger: what became of every prompt. Every admitted prompt ends in it exactly once.

    admitted -> finished -> trained(step) | filtered | rejected(reason)        and until then it is pending

A prompt is a draw: one row in one epoch. It may be rolled out again: `requeued` where it had become too old to be
trained, `restarted` where the end of a process had cut it off. Memory holds the pending ones and the counts; a store
keeps every event (ledger_file.py).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

Key = tuple[int, int]
"""(epoch, row index)"""

Entry = tuple[int, float, int, int, int, int, str, int | None, int | None, Sequence[float] | None, str | None]
"""One event: the columns of `ledger_file.EVENTS`, in that order. The store makes text of the rewards."""


class EventStore(Protocol):
    """Keeps events. `write` only hands over: what it is given must not change any more. `flush` returns when all of
    them are on the disk."""

    position: int
    """The last event of earlier lives; 0 where there is none."""
    life: int

    def write(self, entry: Entry) -> None: ...

    async def flush(self) -> None: ...

    def close(self) -> None: ...


class Ledger:
    """Owns the account of every draw. Synchronous, and never blocks. Without a store it is memory alone.

    A draw that ends without being pending, is admitted twice, or is trained before it has finished, is a fault of the
    engine and asserted here.

    Raises:
        EngineError: by whatever is called after the store could not write.
    """

    def __init__(self, store: EventStore | None = None) -> None:
        self._store = store
        self._life = store.life if store is not None else 0
        self._last = store.position if store is not None else 0
        self.position = 0
        """Number of the last event that this account stands on: of this life, or else the one that it went on from.
        They are counted over all lives of a run, those that are undone too."""
        self.sequences: dict[Key, int] = {}
        """The pending draws, each with its place in the order of admission."""
        self._finished: set[Key] = set()
        self._interrupted: set[Key] = set()
        self.admitted = 0
        self.requeued = 0
        self.ends: Counter[str] = Counter()

    # What happens to a draw

    def admit(self, key: Key, sequence: int, version: int) -> None:
        """Its rollouts begin, while the weights of `version` are live."""
        assert key not in self.sequences, f"the draw {key} was admitted twice"
        self.sequences[key] = sequence
        self.admitted += 1
        self._record("admitted", key, sequence, version)

    def requeue(self, key: Key, sequence: int, version: int) -> None:
        """A pending draw is rolled out again, in a new place of the admission order.

        Either it was finished and became too old, or an earlier life of the run ended before it was finished.
        """
        assert key in self.sequences, f"the draw {key} is not pending"
        self.sequences[key] = sequence
        if key in self._interrupted:
            self._interrupted.remove(key)
            self._record("restarted", key, sequence, version)
            return
        assert key in self._finished, f"the draw {key} is being rolled out already"
        self._finished.remove(key)
        self.requeued += 1
        self._record("requeued", key, sequence, version)

    def finished(self, key: Key, version: int, rewards: Sequence[float]) -> None:
        """All members have ended: the group, which began at `version`, waits to be trained. It is still pending."""
        assert key in self.sequences, f"the draw {key} finished, but it is not pending"
        assert key not in self._finished, f"the draw {key} finished twice"
        assert key not in self._interrupted, f"the draw {key} finished, but this process has not begun it"
        self._finished.add(key)
        self._record("finished", key, self.sequences[key], version, rewards=rewards)

    def trained(self, key: Key, step: int) -> None:
        assert key in self._finished, f"the draw {key} was trained in step {step}, but it had not finished"
        self._end(key, "trained", step=step)

    def filtered(self, key: Key) -> None:
        self._end(key, "filtered")

    def rejected(self, key: Key, reason: str) -> None:
        self._end(key, "rejected", reason=reason)

    def _end(self, key: Key, state: str, *, step: int | None = None, reason: str | None = None) -> None:
        assert key in self.sequences, f"the draw {key} ended as {state}, but it is not pending"
        sequence = self.sequences.pop(key)
        self._finished.discard(key)
        self.ends[state] += 1
        self._record(state, key, sequence, step=step, reason=reason)

    def _record(
        self,
        state: str,
        key: Key,
        sequence: int,
        version: int | None = None,
        *,
        step: int | None = None,
        rewards: Sequence[float] | None = None,
        reason: str | None = None,
    ) -> None:
        self._last += 1
        self.position = self._last
        if self._store is not None:
            self._store.write(
                (self.position, time.time(), self._life, *key, sequence, state, version, step, rewards, reason)
            )

    # The account

    @property
    def pending(self) -> int:
        return len(self.sequences)

    def check(self) -> None:
        """admitted = trained + filtered + rejected + pending."""
        ended = sum(self.ends.values())
        assert self.admitted == ended + self.pending, (
            f"the ledger lost a prompt: {self.admitted} admitted, {dict(self.ends)} ended, {self.pending} pending"
        )

    def summary(self) -> dict[str, int]:
        return {
            "admitted": self.admitted,
            "trained": self.ends["trained"],
            "filtered": self.ends["filtered"],
            "rejected": self.ends["rejected"],
            "pending": self.pending,
            "requeued": self.requeued,
        }

    # From one life to the next

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON. Whoever keeps it awaits `flush` first: the events must be there too."""
        pending = [[*key, sequence, key in self._finished] for key, sequence in self.sequences.items()]
        return {"position": self.position, "counts": self.summary(), "pending": pending}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where an earlier life took `state`. Unfinished draws are to be rolled out again (`requeue`)."""
        assert not self.admitted, "a ledger is restored before it is used"
        counts = state["counts"]
        self.admitted, self.requeued = counts["admitted"], counts["requeued"]
        self.ends.update({end: counts[end] for end in ("trained", "filtered", "rejected")})
        for epoch, row, sequence, finished in state["pending"]:
            self.sequences[epoch, row] = sequence
            (self._finished if finished else self._interrupted).add((epoch, row))
        self.position = state["position"]
        self._last = max(self._last, self.position)
        self.check()

    async def flush(self) -> None:
        """Return when everything that has happened is on the disk, safe from a power cut.

        Raises:
            EngineError: the store cannot write.
        """
        if self._store is not None:
            await self._store.flush()

    def close(self) -> None:
        """Write the rest, and check. What is pending stays so."""
        try:
            self.check()
        finally:
            if self._store is not None:
                self._store.close()
