"""New weights on their way into the sampler, and the canary that looks at them.

consumes    `Weights` from the trainer
produces    a version that is live
waits for   the sampler, at most `timeout_s`
woken by    the engine, which may train on meanwhile
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from asyncrl.errors import CanaryError, EngineError
from asyncrl.types import Probe, Sampler, Weights


@dataclass(slots=True)
class Publication:
    """Owns the version that is live, and the hot-load under way."""

    sampler: Sampler
    timeout_s: float
    canary_tolerance: float | None
    """Largest difference of a log-prob. None: no canary."""
    on_live: Callable[[int], None]
    on_failed: Callable[[], None]
    """A hot-load that fails ends the run at once, not when the next one is due."""
    live: int = 0
    """In optimizer steps."""
    newest: int = 0
    """The version that is live, or on its way."""
    canary_diff: float = 0.0
    last_s: float = 0.0
    """How long the last hot-load took."""
    seconds: float = 0.0
    """Spent on hot-loads. Whoever reports it takes it back to 0."""
    began_at: float = 0.0
    """Of the last hot-load, on the loop's clock."""
    _task: asyncio.Task[None] | None = None

    def start(self, weights: Weights) -> None:
        """Begin to bring `weights` into the sampler. The one before must have `ended`."""
        assert self._task is None
        self.newest = weights.version
        self._task = asyncio.create_task(self._go_live(weights), name=f"asyncrl hot-load of {weights.version}")
        self._task.add_done_callback(self._done)

    async def ended(self) -> None:
        """Wait for the hot-load under way, if there is one.

        Raises:
            EngineError: it failed.
        """
        if self._task is not None:
            task, self._task = self._task, None
            await task

    def raise_failure(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()

    async def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _go_live(self, weights: Weights) -> None:
        loop = asyncio.get_running_loop()
        self.began_at = loop.time()
        await self.hot_load(weights)
        self.last_s = loop.time() - self.began_at
        self.seconds += self.last_s
        self.live = weights.version
        self.on_live(weights.version)

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self.on_failed()

    async def hot_load(self, weights: Weights) -> None:
        """Bring `weights` into the sampler, and have the canary look at them.

        Raises:
            EngineError: it took longer than `publish.timeout_s`, or the canary died.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                await self.sampler.publish(weights)
                if weights.probe is not None:
                    await self.check_canary(weights.probe, weights.version)
        except TimeoutError:
            raise EngineError(
                f"the hot-load of version {weights.version} took longer than publish.timeout_s={self.timeout_s:g} s. "
                "The sampler's log may say why; raise the limit if the model is that large."
            ) from None

    async def check_canary(self, probe: Probe, version: int) -> None:
        """Sampler and trainer must agree on the log-probs of the probe.

        Raises:
            CanaryError: with both numbers.
        """
        tolerance = self.canary_tolerance
        if tolerance is None:
            return
        scored = await self.sampler.score(probe.tokens, version)
        worst = max(range(len(scored)), key=lambda t: abs(scored[t] - probe.logprobs[t]))
        self.canary_diff = abs(scored[worst] - probe.logprobs[worst])
        if not self.canary_diff <= tolerance:
            raise CanaryError(
                f"sampler and trainer disagree about version {version}: token {worst + 1} of the probe has log-prob "
                f"{scored[worst]:.5f} in the sampler and {probe.logprobs[worst]:.5f} in the trainer, more than "
                f"{tolerance:g} apart. The weights did not arrive as they were sent, or the two load different "
                "models: with sampler.urls, compare `model` with what the servers were started with. Nothing that is "
                "drawn from them can be trusted, so the run ends."
            )
