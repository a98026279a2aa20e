"""Which weights are live in vLLM, and how every replica comes to hold them: as adapters, or as the whole model.

A replica in rotation holds every version that a request may be sent to. Publication and comeback keep this without a
lock: a publication goes on until no replica in rotation lacks the new version, a comeback until the replica lacks none,
and between that last look and the change that follows from it neither waits for anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import anyio
import structlog

from asyncrl.config import Config
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.connect import ANSWER_TIMEOUT_S, loaded_models, weight_label
from asyncrl.sampling.fleet import Answers, Fleet
from asyncrl.sampling.params import adapter_name
from asyncrl.sampling.replica import Replica
from asyncrl.sampling.routing import AdapterShelf

logger = structlog.get_logger()

SHARE = 0.8
"""Of `publish.timeout_s`: what one replica may take. One that hangs is lost then, and the others go on in time."""


class LiveWeights(ABC):
    """Owns the versions that requests can be sent to."""

    what: str
    """Of a version: "the adapter", "the weights"."""

    def __init__(self, fleet: Fleet, config: Config) -> None:
        self._fleet = fleet
        self._limit_s = SHARE * config.publish.timeout_s

    @property
    @abstractmethod
    def version(self) -> int:
        """The newest that is live."""

    @abstractmethod
    def resolve(self, wanted: int | None) -> int:
        """The version that a request is sent to. Raises when it is not live."""

    def model(self, version: int) -> str | None:
        """The name under which a server knows `version`; None is what it was started with."""
        return None

    def using(self, version: int) -> AbstractContextManager[None]:
        """A request is with `version` while the block lasts."""
        return nullcontext()

    @abstractmethod
    async def until_open(self) -> None:
        """Wait until no hot-load holds requests back; returns at once where none does."""

    @abstractmethod
    async def publish(self, version: int, folder: Path) -> None:
        """Make `version` live on every replica in rotation; one that cannot take it is lost. Waits for the first to
        come back where none is up.

        Raises `SamplerError` when none could take it.
        """

    @abstractmethod
    def lacking(self, replica: Replica) -> list[int]:
        """Live versions that the replica does not hold."""

    @abstractmethod
    async def give(self, replica: Replica, version: int) -> None:
        """Bring a live version to a replica. Raises `SamplerRequestError`."""

    @abstractmethod
    async def forgot(self, replica: Replica) -> str | None:
        """What a server of somebody else does not hold any more: it was started again. None: all is there."""

    async def _in_time(self, version: int, act: Awaitable[None]) -> None:
        try:
            with anyio.fail_after(self._limit_s):
                await act
        except TimeoutError:
            raise SamplerRequestError(f"it did not take version {version} within {self._limit_s:g} s") from None

    def _settle(self, version: int, answers: Answers[None]) -> None:
        """Those that refused `version` are lost. Raises `SamplerError` when all that answered did."""
        if answers.refused and not answers.given:
            first = next(iter(answers.refused.values()))
            raise SamplerError(f"version {version} of {self.what} could not be made live: {first}") from first
        for replica, error in answers.refused.items():
            self._fleet.lose(replica, f"it could not take version {version}, as others could: {error}")


class LiveAdapters(LiveWeights):
    """LoRA: each version is an adapter of its own name, and several are live. Nothing pauses."""

    what = "the adapter"

    def __init__(self, fleet: Fleet, config: Config, keep: int) -> None:
        super().__init__(fleet, config)
        self._keep = keep
        self._shelf = AdapterShelf(keep)
        self._folders: dict[int, Path] = {}

    @property
    def version(self) -> int:
        return self._shelf.newest

    def resolve(self, wanted: int | None) -> int:
        if wanted is None:
            return self.version
        if wanted in self._shelf:
            return wanted
        raise SamplerRequestError(
            f"version {wanted} is not live: the newest is {self.version}, and {self._keep} adapters are kept."
        )

    def model(self, version: int) -> str | None:
        return adapter_name(version) if self._shelf.has_adapter(version) else None

    @contextmanager
    def using(self, version: int) -> Iterator[None]:
        self._shelf.begin(version)
        try:
            yield
        finally:
            self._shelf.end(version)

    async def until_open(self) -> None:
        """Requests go on beside a hot-load."""

    async def publish(self, version: int, folder: Path) -> None:
        if self._shelf.has_adapter(version):
            raise SamplerError(f"version {version} was published twice: versions grow.")
        self._folders[version] = folder
        while True:
            await self._fleet.some_up()
            behind = [replica for replica in self._fleet.up if version not in replica.adapters]
            if not behind:
                break
            self._settle(version, await self._fleet.on(behind, partial(self.give, version=version)))
        self._shelf.add(version)
        await self._unload(self._shelf.take_drained())

    async def _unload(self, versions: Sequence[int]) -> None:
        for version in versions:
            del self._folders[version]
            answers = await self._fleet.on(self._fleet.up, partial(_unload, version=version))
            for replica, error in answers.refused.items():
                # It only takes room there, until the server throws out what was not used for longest.
                logger.warning("adapter not unloaded", replica=replica.name, version=version, error=str(error))

    def lacking(self, replica: Replica) -> list[int]:
        return [version for version in self._shelf.adapters if version not in replica.adapters]

    async def give(self, replica: Replica, version: int) -> None:
        folder = self._folders[version]
        if version < self.version and not await anyio.Path(folder).is_dir():
            # Held for long, by an evaluation say: its files are gone, and those who ask for it draw anew.
            if version in self._shelf:
                logger.warning("version given up: its files are gone, and a new server needs them", version=version)
                self._shelf.withdraw(version)
            return
        await self._in_time(version, replica.endpoint.load_adapter(version, str(folder)))
        replica.adapters.add(version)

    async def forgot(self, replica: Replica) -> str | None:
        expected, names = self._shelf.adapters, await loaded_models(replica.endpoint)
        for version in expected:
            if adapter_name(version) not in names and version in self._shelf:  # and not unloaded meanwhile
                return f"it does not know adapter {adapter_name(version)} any more: it was started again"
        return None


async def _unload(replica: Replica, version: int) -> None:
    replica.adapters.discard(version)
    await replica.endpoint.unload_adapter(adapter_name(version), ANSWER_TIMEOUT_S)


class LiveModel(LiveWeights):
    """Full weights: all replicas hold one version. A hot-load pauses them, and new requests wait at a gate meanwhile:
    none may fill one version's cache with another version's weights."""

    what = "the weights"

    def __init__(self, fleet: Fleet, config: Config) -> None:
        super().__init__(fleet, config)
        self._mode = config.sampler.in_flight
        self._version = 0
        self._folder: Path | None = None
        self._gate = anyio.Event()
        self._gate.set()
        self._broken: str | None = None

    @property
    def version(self) -> int:
        return self._version

    def resolve(self, wanted: int | None) -> int:
        if self._broken is not None:
            raise SamplerError(self._broken)
        if wanted is None or wanted == self._version:
            return self._version
        raise SamplerRequestError(
            f"version {wanted} is not live: the newest is {self._version}, and full weights have no other."
        )

    async def until_open(self) -> None:
        # When one hot-load ends, the next may have begun before this task runs.
        while not self._gate.is_set():
            await self._gate.wait()

    async def publish(self, version: int, folder: Path) -> None:
        done = False
        while not done:
            await self._fleet.some_up()
            self._gate = anyio.Event()
            self._broken = f"the hot-load of version {version} did not finish, so the weights in vLLM are not known"
            try:
                load = partial(self._load, version=version, source=str(folder))
                answers = await self._fleet.on(self._fleet.up, load)
                self._settle(version, answers)
                self._broken = None
                if done := bool(answers.given):  # else all were lost meanwhile: they come back with the version before
                    self._version, self._folder = version, folder
            finally:
                self._gate.set()

    async def _load(self, replica: Replica, version: int, source: str) -> None:
        await self._in_time(version, replica.endpoint.load_weights(version, source, self._mode))
        replica.version = version

    def lacking(self, replica: Replica) -> list[int]:
        return [self._version] if replica.version != self._version else []

    async def give(self, replica: Replica, version: int) -> None:
        await self._load(replica, version, str(self._folder))

    async def forgot(self, replica: Replica) -> str | None:
        expected, label = self._version, await weight_label(replica.endpoint)
        moved = not self._gate.is_set() or self._broken is not None or self._version != expected
        if moved or label == str(expected):
            return None
        return f"its weights are labelled {label!r} and not {expected}: it was started again, or somebody changed them"
