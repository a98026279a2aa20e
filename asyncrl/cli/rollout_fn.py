"""`rollout_fn` of a config file -> the user's rollout function, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError
from asyncrl.functions import load_function


def load_rollout(reference: str | None, folder: Path) -> Callable[..., Any]:
    """Import what `rollout_fn` names: an `async def rollout(prompt)`, or a factory `def make_rollout(setup)`.

    Files and modules are looked for from `folder`, the config file's. Raises `ConfigError`.
    """
    if not reference:
        raise ConfigError(
            'rollout_fn: this setting is needed. Name your function: rollout_fn = "rollout.py:rollout" in the file, or '
            "--rollout_fn rollout.py:rollout; or call asyncrl from Python."
        )
    return _check(load_function(reference, "rollout_fn", folder), reference)


def _check(found: Callable[..., Any], reference: str) -> Callable[..., Any]:
    call = found if inspect.isroutine(found) or inspect.isclass(found) else type(found).__call__
    if inspect.iscoroutinefunction(call) or "setup" in inspect.signature(found).parameters:
        return found
    raise ConfigError(
        f"rollout_fn: {reference!r} is not async. Write `async def {reference.rpartition(':')[2]}(prompt)`; "
        "a factory that makes the rollout function takes one argument called `setup`."
    )
