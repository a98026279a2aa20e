"""The ledger: what became of every prompt. Every admitted prompt ends in it exactly once.

    admitted -> trained(step) | filtered | rejected(reason)        and until then it is pending

A prompt is a draw: one row in one epoch. Memory holds the pending ones and the counts; the ends go to a
writer as they happen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

Key = tuple[int, int]
"""(epoch, row index)"""

Writer = Callable[[Mapping[str, Any]], None]


class Ledger:
    """Owns the account of every draw. Synchronous: `write` must not block.

    Ending a draw that is not pending, or admitting one twice, is a fault of the engine and asserted here.
    """

    def __init__(self, write: Writer | None = None) -> None:
        self._pending: dict[Key, int] = {}
        self._write = write
        self.admitted = 0
        self.requeued = 0
        self.ends: Counter[str] = Counter()

    def admit(self, key: Key, sequence: int) -> None:
        assert key not in self._pending, f"the draw {key} was admitted twice"
        self._pending[key] = sequence
        self.admitted += 1

    def requeue(self, key: Key, sequence: int) -> None:
        """A pending draw is rolled out again, in a new place of the admission order."""
        assert key in self._pending, f"the draw {key} is not pending"
        self._pending[key] = sequence
        self.requeued += 1

    def trained(self, key: Key, step: int) -> None:
        self._end(key, "trained", step=step)

    def filtered(self, key: Key) -> None:
        self._end(key, "filtered")

    def rejected(self, key: Key, reason: str) -> None:
        self._end(key, "rejected", reason=reason)

    def _end(self, key: Key, state: str, **details: Any) -> None:
        assert key in self._pending, f"the draw {key} ended as {state}, but it is not pending"
        sequence = self._pending.pop(key)
        self.ends[state] += 1
        if self._write is not None:
            self._write({"epoch": key[0], "row": key[1], "sequence": sequence, "state": state, **details})

    @property
    def pending(self) -> int:
        return len(self._pending)

    def close(self) -> None:
        """Write what is still pending, so that the file accounts for every admitted draw, and check."""
        self.check()
        if self._write is not None:
            for (epoch, row), sequence in self._pending.items():
                self._write({"epoch": epoch, "row": row, "sequence": sequence, "state": "pending"})

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
