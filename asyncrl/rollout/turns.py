"""The turns of a sample, and advantages turn by turn. Pure, on plain floats; formulas in docs/objectives.md.

A turn is what the policy drew between two pieces of context: a maximal stretch of ones in `loss_mask`. Each segment of
a run is one line of turns that ends with the run's outcome. A turn that several segments share is trained in the first
of them only, and is a turn of that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from asyncrl.types import RolloutRun, RolloutSample


def turns(loss_mask: Sequence[int]) -> list[tuple[int, int]]:
    """First token of each turn, and the one behind its last."""
    found, end = [], 0
    for trained, stretch in groupby(loss_mask):
        start, end = end, end + sum(1 for _ in stretch)
        if trained:
            found.append((start, end))
    return found


def turn_rewards(runs: Iterable[RolloutRun]) -> list[float]:
    """Those of all turns of a group that have one, in order."""
    given = [sample.turn_rewards for run in runs for sample in run.segments if sample.turn_rewards]
    return [reward for rewards in given for reward in rewards if reward is not None]


def spread(
    runs: Sequence[RolloutRun],
    outcomes: Sequence[float],
    compare: Callable[[list[float]], list[float]],
    discount: float,
) -> list[RolloutRun]:
    """The runs of a group; the samples with turn rewards have advantages per token, the others stay as they are.

    Args:
        runs: Of one group.
        outcomes: The advantage of each run. It comes with the last turn of each of its segments.
        compare: From the rewards of the group's turns to their advantages.
        discount: How much of the next turn's return counts for a turn: A_t = r_t + discount A_(t+1).
    """
    rewards = turn_rewards(runs)
    compared = iter(compare(rewards) if rewards else ())
    return [
        RolloutRun([_spread(sample, outcome, compared, discount) for sample in run.segments])
        for run, outcome in zip(runs, outcomes, strict=True)
    ]


def _spread(sample: RolloutSample, outcome: float, compared: Iterator[float], discount: float) -> RolloutSample:
    """Takes from `compared` what belongs to this sample's turns."""
    if sample.turn_rewards is None:
        return sample
    returns = [0.0 if reward is None else next(compared) for reward in sample.turn_rewards]
    returns[-1] += outcome
    for turn in range(len(returns) - 2, -1, -1):
        returns[turn] += discount * returns[turn + 1]
    advantages = [0.0] * len(sample.tokens)  # [N]
    for (start, end), value in zip(turns(sample.loss_mask), returns, strict=True):
        advantages[start:end] = [value] * (end - start)
    return replace(sample, advantages=advantages)
