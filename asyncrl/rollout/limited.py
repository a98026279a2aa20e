"""One call of the user's rollout function that ends in time, whatever the function does."""

from __future__ import annotations

import asyncio
from typing import Any

from asyncrl.data import Prompt
from asyncrl.errors import RolloutError, RolloutTimeout
from asyncrl.rollout.scheduler import CANCEL_GRACE_S, RolloutFn
from asyncrl.workers import Outcome, in_own_task


async def call(rollout: RolloutFn, prompt: Prompt, name: str, timeout_s: float) -> Outcome[Any]:
    """Call `rollout`. One that ignores its cancellation is left behind: it may not hold up who waits for it."""
    try:
        outcome = await in_own_task(lambda: rollout(prompt), name, timeout_s, CANCEL_GRACE_S)
    except TimeoutError:  # the function's own would be in the outcome
        return Outcome(error=RolloutTimeout(f"{name} took longer than rollout.timeout_s={timeout_s:g} s"))
    if isinstance(outcome.error, asyncio.CancelledError):
        return Outcome(error=RolloutError(f"{name} ended with CancelledError, though nobody had cancelled it"))
    return outcome
