"""A world made of text as a rollout function: what it shows is the user's message, the model's turn is the action.

class Guess:
    def reset(self, prompt):
        self.secret = prompt["secret"]
        return "I think of a number below 10."

    def step(self, action):
        if action == self.secret:
            return asyncrl.Step("Right.", reward=1.0, done=True)
        return asyncrl.Step("No. Guess again.")

asyncrl.train(asyncrl.environment_rollout(Guess, max_turns=5), dataset=rows, config=config)
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import anyio
import structlog
from anyio.lowlevel import RunVar

from asyncrl.errors import RolloutContractError
from asyncrl.rollout.failures import brief, describe
from asyncrl.types import Rollout
from asyncrl.workers import Threads

if TYPE_CHECKING:
    from asyncrl.agents.chat import Chat
    from asyncrl.data import Prompt

T = TypeVar("T")
ENVIRONMENT_THREADS = 64
"""Environments that are not async and compute at once, in one run."""
CLOSE_TIMEOUT_S = 5.0
LIMIT = "(step_timeout_s of environment_rollout)"

log = structlog.get_logger(__name__)

_pool: RunVar[Threads] = RunVar("asyncrl_environment_threads")


@dataclass(frozen=True, slots=True)
class Step:
    """What an environment answers to one action."""

    observation: str
    """What the model reads next. Nobody reads that of the last step."""
    reward: float = 0.0
    """For this action alone. The reward of the rollout is the sum."""
    done: bool = False
    """The episode is over."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold; that of the last step goes to the rollout log."""

    def __post_init__(self) -> None:
        """Here, where the traceback shows the line that made it. Raises RolloutContractError."""
        if not isinstance(self.info, Mapping):
            raise RolloutContractError(f"the info of a Step is {brief(self.info)}. Expected a dict, or nothing.")
        try:
            math.isfinite(self.reward)  # asks for a number; whether it is finite is asked of the whole rollout's
        except (TypeError, ValueError, OverflowError):
            raise RolloutContractError(f"the reward of a Step is {brief(self.reward)}. Expected a number.") from None


class Environment(Protocol):
    """A world that one rollout plays in. Both methods may be `async`; if not, they run in a worker thread.

    It may also have a method `close()`, which is called once, however the rollout ended.
    """

    def reset(self, prompt: Prompt) -> str | Awaitable[str]:
        """Begin an episode for this dataset row. Returns what the model sees first.

        Chance in it should come from the row or from `prompt.group_seed`: members of a group are compared with one
        another, which is fair only if they all meet the same world.
        """

    def step(self, action: str) -> Step | Awaitable[Step]:
        """Do what the model said. What is no action of this world is answered with an observation that says so."""


def environment_rollout(
    make: Callable[[], Environment | Awaitable[Environment]],
    *,
    system: str | None = None,
    action: Callable[[str], str] = str.strip,
    max_turns: int = 16,
    turn_rewards: bool = False,
    step_timeout_s: float = 60.0,
    **chat: Any,
) -> Callable[[Prompt], Awaitable[Rollout]]:
    """A rollout function that plays one episode in a new environment.

    The episode ends when the environment says so, after `max_turns` turns, and when a turn was cut at its token limit
    or the context is full; the reward is then what has been earned so far. How it ended is in the rollout log.

    Args:
        make: Makes the environment of one rollout: its class, or any function without arguments. May be `async` too.
        system: What the model is told before the first observation: the rules, and how to write an action.
        action: Finds the action in what the model said (thoughts are left out already).
        max_turns: Most actions of one episode.
        turn_rewards: Also give the reward of each step to the turn that earned it (`RolloutSample.turn_rewards`).
        step_timeout_s: Longest `reset` or `step`. Past it the rollout is drawn again.
        chat: Anything else that `policy.chat` takes, such as `max_tokens`.
    """

    if not callable(make):
        raise RolloutContractError(
            f"environment_rollout was given {brief(make)}. Expected the class of an environment, or a function that "
            "makes one: each rollout plays in its own."
        )

    async def rollout(prompt: Prompt) -> Rollout:
        host = await _Host.open(make, step_timeout_s)
        try:
            opening = [{"role": "system", "content": system}] if system is not None else []
            opening.append({"role": "user", "content": await host.reset(prompt)})
            episode = _Episode(prompt.policy.chat(opening, max_turns=max_turns, **chat))
            await episode.play(host, action, max_turns)
        except BaseException:
            try:
                await host.close()
            except Exception as error:  # of the user's; what went wrong first says what becomes of the rollout
                log.warning("an environment could not be closed after a failure", name=host.name, error=describe(error))
            raise
        await host.close()
        return episode.rollout(turn_rewards)

    return rollout


class _Host:
    """Calls the methods of an environment, off the event loop and under a time limit."""

    def __init__(self, environment: Environment, timeout_s: float) -> None:
        self.environment = environment
        self.name = type(environment).__name__
        self._timeout_s = timeout_s

    @classmethod
    async def open(cls, make: Callable[[], Environment | Awaitable[Environment]], timeout_s: float) -> _Host:
        name, given_up = getattr(make, "__name__", "make"), threading.Event()
        if inspect.iscoroutinefunction(make):
            return cls(await _call(make, name, timeout_s), timeout_s)

        def in_thread() -> Environment | Awaitable[Environment]:
            made = make()
            close = getattr(made, "close", None)
            if given_up.is_set() and close is not None and not inspect.iscoroutinefunction(close):
                close()  # nobody else will: this thread could not be ended
            return made

        try:
            return cls(await _call(in_thread, name, timeout_s), timeout_s)
        except BaseException:
            given_up.set()
            raise

    async def reset(self, prompt: Prompt) -> str:
        return self._text(await self._call("reset", self.environment.reset, prompt), "reset")

    async def step(self, action: str) -> Step:
        """Raises RolloutContractError: it returned something else than a `Step`."""
        step = await self._call("step", self.environment.step, action)
        if not isinstance(step, Step):
            raise RolloutContractError(
                f"{self.name}.step returned a {type(step).__name__}. Expected asyncrl.Step(observation, reward, done)."
            )
        self._text(step.observation, "step")
        return step

    async def close(self) -> None:
        """Also of a rollout that is being cancelled, which must not take long."""
        close = getattr(self.environment, "close", None)  # the one method that is optional
        if close is not None:
            self._timeout_s = min(self._timeout_s, CLOSE_TIMEOUT_S)
            with anyio.CancelScope(shield=True):
                await self._call("close", close)

    async def _call(self, name: str, method: Callable[..., T | Awaitable[T]], *args: Any) -> T:
        return await _call(method, f"{self.name}.{name}", self._timeout_s, *args)

    def _text(self, observation: object, method: str) -> str:
        if not isinstance(observation, str):
            raise RolloutContractError(
                f"the observation of {self.name}.{method} is a {type(observation).__name__}. Expected text for the "
                "model to read."
            )
        return observation


async def _call(function: Callable[..., T | Awaitable[T]], name: str, timeout_s: float, *args: Any) -> T:
    """Raises TimeoutError, which has the rollout drawn again; whatever the function raises goes through."""
    if inspect.iscoroutinefunction(function):
        result: T | Awaitable[T] = function(*args)
    else:
        try:
            outcome = await _threads().run(lambda: function(*args), name, timeout_s)
        except TimeoutError as error:  # one that the function raised would be in the outcome
            raise TimeoutError(f"{error} {LIMIT}") from None
        result = outcome.unwrap()
    if not inspect.isawaitable(result):
        return result
    with anyio.move_on_after(timeout_s):
        return await result
    raise TimeoutError(f"{name} took longer than {timeout_s:g} s {LIMIT}")


def _threads() -> Threads:
    """One pool for each event loop."""
    try:
        return _pool.get()
    except LookupError:
        _pool.set(Threads(ENVIRONMENT_THREADS))
        return _pool.get()


class _Episode:
    """One conversation with an environment, and what each turn of it earned."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._rewards: list[float] = []
        self._last: Step | None = None

    async def play(self, host: _Host, action: Callable[[str], str], max_turns: int) -> None:
        said = await self._turn(None)
        while self._chat.finish_reason == "stop":
            step = self._last = await host.step(action(said))
            self._rewards[-1] = float(step.reward)
            if step.done or self._chat.turns == max_turns:
                return
            said = await self._turn(step.observation)

    def rollout(self, turn_rewards: bool) -> Rollout:
        last = self._last
        return self._chat.sample(
            reward=sum(self._rewards),
            turn_rewards=self._rewards if turn_rewards else None,
            step_rewards=self._rewards,
            done=last is not None and last.done,
            environment=dict(last.info) if last is not None else {},
        )

    async def _turn(self, observation: str | None) -> str:
        """Draw a turn. One that calls tools, of which there are none, is told so and followed by another."""
        said = await self._chat.step(observation)
        while self._chat.finish_reason is None:
            said = await self._chat.step()
        self._rewards += [0.0] * (self._chat.turns - len(self._rewards))
        return said
