"""What a finished group is worth: its advantages, or the verdict that it teaches nothing. Pure.

A group carries signal when its rewards differ, or those of its turns, or when a run brought advantages of its own that
are not all 0.
`Config.group_filter` puts the user's own judgement in the place of this rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

from asyncrl.errors import ConfigError
from asyncrl.functions import load_function
from asyncrl.rollout.advantages import Advantage, advantage_function, ask, has_signal
from asyncrl.rollout.turns import spread, turn_rewards
from asyncrl.types import RolloutRun, RolloutSample

GroupFilter = Callable[[list[float]], bool]
"""A group's rewards -> whether it is trained."""

SIGNAL_SHARE = 0.1
"""Below it, nearly all rollouts are drawn to be thrown away."""


@dataclass(frozen=True, slots=True)
class Grader:
    """Decides about finished groups. Owns nothing."""

    advantage: Advantage
    group_filter: GroupFilter | None
    group_size: int
    turn_discount: float

    def grade(self, runs: Sequence[RolloutRun]) -> list[float]:
        """One advantage per run; none at all when the group is filtered.

        Raises:
            ConfigError: the user's `advantage` or `group_filter` failed, or returned something unusable.
        """
        rewards = [run.reward for run in runs]
        kept = self._carries_signal(runs, rewards) if self.group_filter is None else self._asked(rewards)
        return self.advantage(rewards) if kept else []

    def spread(self, runs: Sequence[RolloutRun], advantages: Sequence[float]) -> Sequence[RolloutRun]:
        """The same runs; what brought turn rewards has advantages per token. `advantages` are those of `grade`.

        Raises:
            ConfigError: the user's `advantage` failed, or returned something unusable.
        """
        return spread(runs, advantages, self.advantage, self.turn_discount) if advantages else runs

    def _asked(self, rewards: list[float]) -> bool:
        group_filter = self.group_filter
        assert group_filter is not None
        kept = ask("group_filter", lambda: group_filter(list(rewards)), rewards)
        if type(kept).__name__ not in ("bool", "bool_"):  # numpy's is one too; numpy is not loaded to know it
            raise ConfigError(
                f"group_filter returned {kept!r} ({type(kept).__name__}) for the rewards {rewards}. Expected True to "
                "train the group, or False to filter it."
            )
        return bool(kept)

    def _carries_signal(self, runs: Sequence[RolloutRun], rewards: list[float]) -> bool:
        samples = [sample for run in runs for sample in run.segments]
        compared = any(sample.advantages is None for sample in samples)
        if compared and (has_signal(rewards) or self.group_size == 1):
            return True
        if (of_turns := turn_rewards(runs)) and has_signal(of_turns):
            return True
        return any(map(_has_own_signal, samples))


def _has_own_signal(sample: RolloutSample) -> bool:
    return sample.advantages is not None and any(compress(sample.advantages, sample.loss_mask))


def grader(
    advantage: str | Advantage, group_filter: str | GroupFilter | None, group_size: int, turn_discount: float
) -> Grader:
    """From the settings of `Config`.

    Raises:
        ConfigError: an unknown `advantage`, or a `group_filter` that cannot be imported.
    """
    if isinstance(group_filter, str):
        group_filter = load_function(group_filter, "group_filter")
    return Grader(advantage_function(advantage), group_filter, group_size, turn_discount)


class SignalPatience:
    """Notices when the data has nothing to teach any more. None: never.

    `lost` says so, in words, once fewer than `SIGNAL_SHARE` of the last `groups` finished groups carried signal.
    """

    def __init__(self, groups: int | None) -> None:
        self._groups = groups
        self._recent: deque[bool] = deque(maxlen=groups or 0)
        self._with_signal = 0
        self.lost: str | None = None

    @property
    def recent(self) -> list[bool]:
        """Whether the groups that finished last carried signal, oldest first."""
        return list(self._recent)

    def finished(self, signal: bool) -> str | None:
        """A group has ended, with or without signal. Returns `lost` when it was this one that showed it."""
        if self._groups is None or self.lost is not None:
            return None
        if len(self._recent) == self._groups:
            self._with_signal -= self._recent[0]
        self._recent.append(signal)
        self._with_signal += signal
        if len(self._recent) == self._groups and self._with_signal < SIGNAL_SHARE * self._groups:
            self.lost = (
                f"only {self._with_signal} of the last {self._groups} groups carried signal, fewer than "
                f"{SIGNAL_SHARE:.0%} (signal_patience_groups={self._groups})"
            )
        return self.lost
