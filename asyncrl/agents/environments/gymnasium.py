"""A `gymnasium` environment as a world made of text. `pip install 'asyncrl[gymnasium]'`"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from asyncrl.agents.environments.text import Step
from asyncrl.errors import ConfigError

if TYPE_CHECKING:
    import gymnasium

    from asyncrl.data import Prompt

Describe = Callable[["gymnasium.Env[Any, Any]", Any, Mapping[str, Any]], str]
"""(environment, observation, info) -> what the model reads."""


class GymnasiumEnvironment:
    """Plays one episode of a `gymnasium` environment: reads actions by name, shows observations as text.

        environment_rollout(lambda: GymnasiumEnvironment(make, describe=picture, actions=["left", "down", ...]))

    An episode is seeded by `seed` of the dataset row, or else by `prompt.group_seed`: all members of a group meet the
    same world. A row may also have `options`, which `reset` takes.

    Args:
        make: Makes the environment for a dataset row: `lambda prompt: gymnasium.make("FrozenLake-v1")`.
        describe: Makes text of an observation. Not needed where observations are text already.
        actions: Names of the actions of a Discrete space, the first one for the lowest number. Left out: the numbers.
            The name that the model says last is what it does. A Text space takes what the model says as it is.
    """

    def __init__(
        self,
        make: Callable[[Prompt], gymnasium.Env[Any, Any]],
        *,
        describe: Describe | None = None,
        actions: Sequence[str] | None = None,
    ) -> None:
        self._make = make
        self._describe = describe
        self._names = actions
        self._env: gymnasium.Env[Any, Any] | None = None

    def reset(self, prompt: Prompt) -> str:
        """Make the environment and begin.

        Raises:
            ConfigError: gymnasium is not installed, or the environment cannot be played in text as it was described.
        """
        spaces = _spaces()
        self.close()
        self._env = env = self._make(prompt)
        if self._describe is None and not isinstance(env.observation_space, spaces.Text):
            raise ConfigError(
                f"{_name(env)} shows {env.observation_space}, which is no text. Give GymnasiumEnvironment a "
                "describe=function of (env, observation, info) that makes text of it."
            )
        self._actions = _actions(env, self._names, spaces)
        observation, info = env.reset(seed=prompt.get("seed", prompt.group_seed), options=prompt.get("options"))
        return self._show(observation, info)

    def step(self, action: str) -> Step:
        """Do the action that the text names; text that names none moves nothing and is answered with what does."""
        assert self._env is not None, "step before reset"
        chosen = self._actions.read(action)
        if chosen is None:
            return Step(f"{action[:200]!r} is no action here. Expected {self._actions.expected}.")
        observation, reward, terminated, truncated, info = self._env.step(chosen)
        return Step(
            observation=self._show(observation, info),
            reward=float(reward),
            done=bool(terminated or truncated),
            info={"truncated": bool(truncated)},
        )

    def close(self) -> None:
        if self._env is not None:
            self._env.close()

    def _show(self, observation: Any, info: Mapping[str, Any]) -> str:
        assert self._env is not None
        return str(observation) if self._describe is None else self._describe(self._env, observation, info)


class _Names:
    """The actions of a Discrete space by name."""

    def __init__(self, names: Sequence[str], first: int) -> None:
        longest_first = sorted(range(len(names)), key=lambda index: -len(names[index]))
        self._numbers = [first + index for index in longest_first]
        options = "|".join(f"({re.escape(names[index])})" for index in longest_first)
        self._pattern = re.compile(rf"(?<!\w)(?:{options})(?!\w)", re.IGNORECASE)
        self.expected = f"one of {', '.join(names)}"

    def read(self, text: str) -> int | None:
        found = list(self._pattern.finditer(text))
        return self._numbers[(found[-1].lastindex or 0) - 1] if found else None


class _Text:
    """A space of texts: what is said is what is done."""

    def __init__(self, space: gymnasium.spaces.Text) -> None:
        self._space = space
        self.expected = f"{space.min_length} to {space.max_length} of the characters {space.characters}"

    def read(self, text: str) -> str | None:
        return text if self._space.contains(text) else None


def _actions(env: gymnasium.Env[Any, Any], names: Sequence[str] | None, spaces: Any) -> _Names | _Text:
    space = env.action_space
    if isinstance(space, spaces.Discrete):
        names = [str(space.start + index) for index in range(int(space.n))] if names is None else names
        if len(names) != space.n:
            raise ConfigError(
                f"actions names {len(names)} actions, but {_name(env)} has {space.n}. Expected a name for each."
            )
        return _Names(names, int(space.start))
    if isinstance(space, spaces.Text) and names is None:
        return _Text(space)
    raise ConfigError(
        f"{_name(env)} takes actions from {space}. Expected a Discrete space (with names for its actions) or a Text "
        "space (without). Wrap it in a gymnasium.ActionWrapper that has one."
    )


def _name(env: gymnasium.Env[Any, Any]) -> str:
    return env.spec.id if env.spec is not None else type(env.unwrapped).__qualname__


def _spaces() -> Any:
    try:
        from gymnasium import spaces
    except ModuleNotFoundError:
        raise ConfigError("gymnasium is not installed. Run: pip install 'asyncrl[gymnasium]'") from None
    return spaces
