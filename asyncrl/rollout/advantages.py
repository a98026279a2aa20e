"""Advantages over one prompt group. Pure, on plain floats; formulas in docs/objectives.md.

r is the list of a group's rewards, n its length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from asyncrl.errors import ConfigError
from asyncrl.functions import is_reference, load_function
from asyncrl.rollout.contract import LARGEST
from asyncrl.rollout.failures import users_traceback

T = TypeVar("T")
Advantage = Callable[[list[float]], list[float]]


def grpo(rewards: list[float]) -> list[float]:
    """(r - mean) / (std + 1e-6), with the population standard deviation (arXiv:2402.03300)."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return [(reward - mean) / (std + 1e-6) for reward in rewards]


def dr_grpo(rewards: list[float]) -> list[float]:
    """r - mean (arXiv:2503.20783)."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: list[float]) -> list[float]:
    """r - mean of the others (arXiv:2402.14740). A group of one has no others: its advantage is 0."""
    if len(rewards) == 1:
        return [0.0]
    total = sum(rewards)
    return [reward - (total - reward) / (len(rewards) - 1) for reward in rewards]


def reinforce(rewards: list[float]) -> list[float]:
    """r itself."""
    return list(rewards)


ADVANTAGES: dict[str, Advantage] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce": reinforce}


def advantage_function(choice: str | Advantage) -> Advantage:
    """The function of that name, or the user's own, its results checked.

    Raises:
        ConfigError: an unknown name; or later, when the user's function returns something unusable.
    """
    if isinstance(choice, str):
        if choice in ADVANTAGES:
            return ADVANTAGES[choice]
        if not is_reference(choice):
            raise ConfigError(f"advantage is {choice!r}. Expected one of {', '.join(ADVANTAGES)}, or a function.")
        choice = load_function(choice, "advantage")

    def checked(rewards: list[float]) -> list[float]:
        advantages = ask("advantage", lambda: [float(advantage) for advantage in choice(list(rewards))], rewards)
        if len(advantages) != len(rewards) or not all(abs(a) <= LARGEST for a in advantages):
            raise ConfigError(
                f"the advantage function returned {advantages} for the rewards {rewards}. "
                f"Expected one finite number for each reward, at most {LARGEST:g} in size."
            )
        return advantages

    return checked


def ask(setting: str, call: Callable[[], T], rewards: list[float]) -> T:
    """What the user's function of that setting says.

    Raises:
        ConfigError: it failed; with its traceback.
    """
    try:
        return call()
    except BaseException as error:  # whatever it is, it is that function's, and ends the run under its name
        raise ConfigError(
            f"the function of `{setting}` failed for the rewards {rewards}:\n{users_traceback(error)}"
        ) from error


def has_signal(rewards: list[float]) -> bool:
    """False when all rewards are equal: such a group teaches nothing by comparison."""
    return min(rewards) != max(rewards)
