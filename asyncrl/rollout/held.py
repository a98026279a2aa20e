"""What holds rollouts back, and for how long: the answer to "why is not more going on?". Pure."""

from __future__ import annotations

from typing import Literal

Reason = Literal["slots", "budget", "unpublished", "data"]
REASONS: tuple[Reason, ...] = ("slots", "budget", "unpublished", "data")


class Held:
    """Seconds by reason, since the start.

    slots        the concurrency window is full, and groups might begin
    budget       the staleness budget is used up
    unpublished  likewise, while groups that are trained keep their places until their weights are live
    data         nothing is left to begin

    One of them always holds: everything that may begin begins at once.
    """

    __slots__ = ("_seconds", "_since", "reason")

    def __init__(self) -> None:
        self.reason: Reason = "data"
        self._since: float | None = None
        self._seconds: dict[Reason, float] = dict.fromkeys(REASONS, 0.0)

    def by(self, reason: Reason, now: float) -> None:
        """From `now` on (s) it is this reason."""
        if self._since is not None:
            self._seconds[self.reason] += now - self._since
        self.reason, self._since = reason, now

    def seconds(self, now: float) -> dict[Reason, float]:
        """Up to `now`."""
        if self._since is None:
            return dict(self._seconds)
        return {**self._seconds, self.reason: self._seconds[self.reason] + now - self._since}


def between(before: dict[Reason, float], after: dict[Reason, float], name: str) -> dict[str, float]:
    """What came to each reason, as metrics: `name` is such as `wait_{}_s`."""
    return {name.format(reason): after[reason] - before[reason] for reason in REASONS}
