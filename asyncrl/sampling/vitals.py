"""Whether a vLLM replica lives, and how soon it is started again. Pure: no clock, no I/O; time is an argument."""

from __future__ import annotations

from asyncrl.sampling.load import EngineLoad

ANSWER_S = 10.0
"""How long a server may take to say how it is. Its HTTP side does not wait for the engine: it answers in milliseconds,
and in seconds on a CPU that everything shares."""

SILENCES = 3
"""Questions in a row without any answer: the server hangs. Of one alone this process may be to blame, where something
blocks its event loop."""

REFUSALS = 2
"""Connections in a row that nobody takes, at least a second apart: the server is gone, or the way to it."""

QUICK_DEATHS = 3
"""Deaths in a row of one replica, none with an answer in between, that show that starting it again does not mend it."""

LONGEST_DELAY_S = 60.0


class Pulse:
    """One replica in rotation. Owns what it did not answer, and when its engine last moved.

    `stuck_s`: its engine may do nothing for so long while requests are with it. One engine step, the prefill of a whole
    batch on a CPU say, moves nothing until it ends.
    """

    def __init__(self, now: float, stuck_s: float) -> None:
        self._stuck_s = stuck_s
        self._moved_at = now
        self._seen: EngineLoad | None = None
        self._silent = 0
        self._refused = 0

    def answered(self, load: EngineLoad, now: float, *, requests: int) -> None:
        """The replica said how busy it is; `requests` are with it and should make it move."""
        self._silent = self._refused = 0
        if load != self._seen or not requests:
            self._moved_at, self._seen = now, load

    def silent(self) -> None:
        """It said nothing for `ANSWER_S`."""
        self._silent += 1

    def refused(self) -> bool:
        """Nobody took the connection. Returns whether that is enough."""
        self._refused += 1
        return self._refused >= REFUSALS

    def verdict(self, now: float) -> str | None:
        """What is wrong with it; None where nothing is."""
        if self._refused >= REFUSALS:
            return "it takes no connections"
        if self._silent >= SILENCES:
            return f"it has not answered for {self._silent * ANSWER_S:.0f} s"
        if now - self._moved_at >= self._stuck_s:
            return f"its engine has drawn no token for {now - self._moved_at:.0f} s, though requests are with it"
        return None


class Comeback:
    """When a lost replica is tried again. Owns the count of deaths without an answer in between."""

    def __init__(self) -> None:
        self.quick_deaths = 0

    def lost(self, *, served: bool) -> None:
        """It is gone; `served`: it answered a request since it was last put into rotation."""
        self.quick_deaths = 0 if served else self.quick_deaths + 1

    @property
    def delay_s(self) -> float:
        """At once, then 1, 2, 4 ... seconds."""
        return min(LONGEST_DELAY_S, 2.0 ** (self.quick_deaths - 1)) if self.quick_deaths else 0.0

    @property
    def hopeless(self) -> bool:
        return self.quick_deaths >= QUICK_DEATHS
