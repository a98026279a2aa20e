"""Which replica answers a request, and which adapter versions stay loaded. Pure: no clock, no I/O."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict

SESSIONS_REMEMBERED = 1 << 16
"""Sessions that keep their replica. One that is forgotten only loses its prefix cache."""
ENTRIES_PER_REPLICA = 8
"""Of the router's heap, before what is past is thrown out of it: a request costs the same with a thousand replicas."""


class Router:
    """Least-loaded routing with session affinity. Owns the count of requests in flight of each replica."""

    def __init__(self, replicas: int) -> None:
        self.in_flight = [0] * replicas
        self._given = [0] * replicas  # sessions and requests that each got so far: breaks ties evenly
        self._up = set(range(replicas))
        self._homes: OrderedDict[str, int] = OrderedDict()
        self._by_load: list[tuple[int, int, int]] = []  # (in flight, given, replica): a heap, with entries of the past
        self._note_all()

    def take_out(self, replica: int) -> None:
        """No request goes there until it is put in again; its sessions move when they next ask."""
        self._up.discard(replica)

    def put_in(self, replica: int) -> None:
        self._up.add(replica)
        self._note(replica)

    def begin(self, session: str) -> int:
        """The replica for a request that starts now; one must be up. Every `begin` needs its `end`."""
        home = self.place(self._homes.get(session) if session else None)
        if session:
            self._homes[session] = home
            self._homes.move_to_end(session)
            if len(self._homes) > SESSIONS_REMEMBERED:
                self._homes.popitem(last=False)
        return home

    def place(self, home: int | None) -> int:
        """As `begin`, for those who remember the home of their session, None being none yet."""
        if home is None or home not in self._up:
            home = self._idlest()
            self._given[home] += 1
        self.in_flight[home] += 1
        self._note(home)
        return home

    def end(self, replica: int) -> None:
        assert self.in_flight[replica] > 0
        self.in_flight[replica] -= 1
        self._note(replica)

    def _idlest(self) -> int:
        """The first entry of the heap that still holds. There is always one for each replica that is up."""
        while True:
            in_flight, given, replica = self._by_load[0]
            if replica in self._up and (in_flight, given) == (self.in_flight[replica], self._given[replica]):
                return replica
            heapq.heappop(self._by_load)

    def _note(self, replica: int) -> None:
        if len(self._by_load) > ENTRIES_PER_REPLICA * len(self.in_flight):
            self._note_all()
        else:
            heapq.heappush(self._by_load, (self.in_flight[replica], self._given[replica], replica))

    def _note_all(self) -> None:
        self._by_load = [(self.in_flight[replica], self._given[replica], replica) for replica in self._up]
        heapq.heapify(self._by_load)


class AdapterShelf:
    """Versions of the adapter that can be sampled from. Owns the count of requests in flight of each.

    The base model without an adapter is there from the start, under the version that it counts as, for good.
    """

    def __init__(self, keep: int, base: int = 0) -> None:
        assert keep >= 1
        self.newest = base
        self._keep = keep
        self._base: int | None = base
        self._loaded: list[int] = []  # ascending
        self._withdrawn: set[int] = set()
        self._users: Counter[int] = Counter()

    def __contains__(self, version: int) -> bool:
        return version == self._base or version in self.adapters

    def has_adapter(self, version: int) -> bool:
        """False where `version` is the bare base model."""
        return version in self.adapters

    @property
    def adapters(self) -> list[int]:
        """Versions that every replica must have loaded, oldest first."""
        return [version for version in self._loaded if version not in self._withdrawn]

    def add(self, version: int) -> None:
        """`version` is loaded everywhere, and is the newest from now on."""
        assert version not in self._loaded
        if version == self._base:
            self._base = None
        self._loaded.append(version)
        self.newest = version

    def begin(self, version: int) -> None:
        """A request starts on `version`. Every `begin` needs its `end`."""
        assert version in self
        self._users[version] += 1

    def end(self, version: int) -> None:
        assert self._users[version] > 0
        self._users[version] -= 1
        if not self._users[version]:
            del self._users[version]

    def withdraw(self, version: int) -> None:
        """No request may begin on `version` any more; those in flight end on it."""
        assert version in self._loaded
        self._withdrawn.add(version)

    def take_drained(self) -> list[int]:
        """Versions to unload: not among the newest `keep`, and nobody uses them. They are gone from here on return."""
        drained = [version for version in self._loaded[: -self._keep] if not self._users[version]]
        self._loaded = [version for version in self._loaded if version not in drained]
        self._withdrawn -= set(drained)
        return drained
