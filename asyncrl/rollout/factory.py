"""Rollout factories, for rollout functions with resources of their own to open and close.

    @asynccontextmanager
    async def make_rollout(setup):
        async with aiohttp.ClientSession() as session:
            async def rollout(prompt): ...
            yield rollout

A factory takes one argument called `setup`. It gives the rollout function, or a context manager around it.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.rollout.scheduler import RolloutFn


@dataclass(frozen=True)
class RolloutSetup:
    """What a factory may use."""

    config: Config
    run_dir: Path
    load_tokenizer: Callable[[], Any]
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What the program that starts the run has for its factory: clients, paths, a judge."""

    @cached_property
    def tokenizer(self) -> Any:
        """The model's `transformers` tokenizer."""
        return self.load_tokenizer()


def is_async(function: object) -> bool:
    """An async function, or an object whose call is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def is_factory(function: Any) -> bool:
    """A function, sync or a context manager, with an argument called `setup`."""
    return not is_async(function) and "setup" in inspect.signature(function).parameters


def with_extras(factory: Callable[[RolloutSetup], Any], extras: Mapping[str, Any]) -> Callable[[RolloutSetup], Any]:
    """The same factory; its setup carries `extras`."""

    def make_rollout(setup: RolloutSetup) -> Any:
        return factory(replace(setup, extras={**setup.extras, **extras}))

    return make_rollout


def require_rollout(function: Any) -> None:
    """See at once, before a model is loaded, that `function` cannot be a rollout function.

    Raises:
        ConfigError: neither an async function nor a factory.
    """
    if not (isinstance(function, AbstractAsyncContextManager) or (callable(function) and is_factory(function))):
        _checked(function)


@asynccontextmanager
async def open_rollout(function: Any, setup: RolloutSetup) -> AsyncIterator[RolloutFn]:
    """The rollout function itself, or what a factory makes, open as long as the block.

    Raises:
        ConfigError: neither an async function nor a factory.
    """
    made = function(setup) if callable(function) and is_factory(function) else function
    if isinstance(made, AbstractAsyncContextManager):
        async with made as rollout:
            yield _checked(rollout)
    else:
        yield _checked(made)


def _checked(rollout: Any) -> RolloutFn:
    if not is_async(rollout):
        name = getattr(rollout, "__qualname__", repr(rollout))
        raise ConfigError(
            f"the rollout function {name} is not async. Write `async def rollout(prompt)`; a factory takes one "
            "argument called `setup` and returns such a function."
        )
    return rollout  # type: ignore[no-any-return]
