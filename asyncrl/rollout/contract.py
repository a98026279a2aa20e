"""The contract of a rollout function: what it may return, checked once, before anything else sees it.

Everything passes through here, tens of thousands of times a second, so each check is one pass in C over a
sequence, and a message is worked out only when a check has failed. N is the number of tokens.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

from asyncrl.errors import RolloutContractError
from asyncrl.rollout.turns import turns
from asyncrl.types import RolloutRun, RolloutSample

_LOGPROB_SLACK = 1e-3
"""A log-prob of a certain token may come out a rounding error above 0."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What every sample of this run must keep to."""

    vocabulary: int | None = None
    """Token ids are below it; None: unknown."""
    max_tokens: int | None = None
    """Longest sample; None: no limit."""

    def check(self, result: object, *, oldest: int, newest: int) -> RolloutRun:
        """The run in plain lists, every field filled.

        `oldest` and `newest` are the versions that this rollout can have seen; samples that do not say which
        weights drew their tokens are taken to be from `oldest`.

        Raises:
            RolloutContractError: what was found, what was expected.
        """
        if isinstance(result, RolloutSample):
            return RolloutRun([self._sample(result, oldest, newest)])
        if not isinstance(result, RolloutRun):
            raise RolloutContractError(
                f"the rollout function returned a {type(result).__name__}. Expected a RolloutSample, a RolloutRun, "
                "or None to drop the draw."
            )
        if not result.segments:
            raise RolloutContractError("the rollout function returned a RolloutRun without segments.")
        segments = [self._sample(segment, oldest, newest) for segment in result.segments]
        if len({segment.reward for segment in segments}) > 1:
            rewards = [segment.reward for segment in segments]
            raise RolloutContractError(
                f"the segments of a RolloutRun have the rewards {rewards}. Expected the same reward, that of the "
                "whole rollout, on each."
            )
        return RolloutRun(segments)

    def _sample(self, sample: RolloutSample, oldest: int, newest: int) -> RolloutSample:
        tokens = _numbers("tokens", sample.tokens, operator.index)
        logprobs = _numbers("logprobs", sample.logprobs, float)
        mask = _numbers("loss_mask", sample.loss_mask, operator.index)
        reward = _reward(sample.reward)
        self._check_tokens(tokens)
        _check_lengths(len(tokens), logprobs=logprobs, loss_mask=mask)
        _check_mask(mask)
        _check_logprobs(logprobs, mask)
        if sample.versions is None:
            versions = [oldest] * len(tokens)
        else:
            versions = _numbers("versions", sample.versions, operator.index)
            _check_lengths(len(tokens), versions=versions)
            _check_versions(versions, mask, oldest, newest)
        return replace(
            sample,
            tokens=tokens,
            logprobs=logprobs,
            loss_mask=mask,
            reward=reward,
            versions=versions,
            advantages=None if sample.advantages is None else _advantages(sample.advantages, mask),
            turn_rewards=None if sample.turn_rewards is None else _turn_rewards(sample, mask),
        )

    def _check_tokens(self, tokens: list[int]) -> None:
        if not tokens:
            raise RolloutContractError("a sample has no tokens. Return None to drop a draw.")
        if min(tokens) < 0 or (self.vocabulary is not None and max(tokens) >= self.vocabulary):
            bad = next(i for i, t in enumerate(tokens) if t < 0 or t >= (self.vocabulary or t + 1))
            raise RolloutContractError(
                f"tokens[{bad}] is {tokens[bad]}. Expected token ids of the model: 0 to {(self.vocabulary or 0) - 1}."
            )
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            raise RolloutContractError(
                f"a sample has {len(tokens)} tokens, more than the longest that is trained, {self.max_tokens}. "
                "Raise max_seq_len if the model allows it, or end such rollouts earlier."
            )


def _numbers(name: str, values: Sequence[Any], kind: Callable[[Any], Any]) -> list[Any]:
    try:
        return list(map(kind, values))
    except (TypeError, ValueError, OverflowError):
        wanted = "integers" if kind is operator.index else "numbers"
        raise RolloutContractError(
            f"{name} of a sample is {_brief(values)}. Expected a sequence of {wanted}."
        ) from None


def _brief(value: object) -> str:
    shown = repr(value)
    return f"{shown[:80]}... ({type(value).__name__})" if len(shown) > 80 else f"{shown} ({type(value).__name__})"


def _reward(value: Any) -> float:
    try:
        reward = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RolloutContractError(f"the reward is {_brief(value)}. Expected a number.") from None
    if not math.isfinite(reward):
        raise RolloutContractError(f"the reward is {reward}. Expected a finite number.")
    return reward


def _check_lengths(expected: int, **fields: list[Any]) -> None:
    for name, values in fields.items():
        if len(values) != expected:
            raise RolloutContractError(
                f"{name} has {len(values)} entries, but tokens has {expected}. Expected one entry per token, "
                "prompt and tool tokens included."
            )


def _check_mask(mask: list[int]) -> None:
    if mask.count(0) + mask.count(1) != len(mask):
        bad = next(i for i, m in enumerate(mask) if m not in (0, 1))
        raise RolloutContractError(f"loss_mask[{bad}] is {mask[bad]}. Expected 0 or 1.")
    if 1 not in mask:
        raise RolloutContractError(
            "loss_mask is 0 everywhere, so there is nothing to train. Return None to drop a draw."
        )
    if mask[0]:
        raise RolloutContractError(
            "loss_mask[0] is 1, but the first token has nothing before it that could predict it. Expected at least "
            "one prompt token, with mask 0."
        )


def _check_logprobs(logprobs: list[float], mask: list[int]) -> None:
    # inf and nan survive a sum, so one addition checks them all.
    if math.isfinite(sum(compress(logprobs, mask))) and max(compress(logprobs, mask)) <= _LOGPROB_SLACK:
        return
    bad = next(
        i for i, m in enumerate(mask) if m and not (math.isfinite(logprobs[i]) and logprobs[i] <= _LOGPROB_SLACK)
    )
    raise RolloutContractError(
        f"logprobs[{bad}] is {logprobs[bad]} on a token that shall be trained. Expected the natural log of its "
        "probability under the weights that drew it: finite, at most 0."
    )


def _advantages(values: Sequence[Any], mask: list[int]) -> list[float]:
    """[N] 0 where nothing is trained, so that nothing strange goes further."""
    advantages = _numbers("advantages", values, float)
    _check_lengths(len(mask), advantages=advantages)
    if not math.isfinite(sum(compress(advantages, mask))):
        for place, (advantage, trained) in enumerate(zip(advantages, mask, strict=True)):
            if trained and not math.isfinite(advantage):
                raise RolloutContractError(
                    f"advantages[{place}] is {advantage} on a token that shall be trained. Expected a finite number. "
                    "Leave `advantages` out to have the group's rewards compared."
                )
    return [advantage if trained else 0.0 for advantage, trained in zip(advantages, mask, strict=True)]


def _turn_rewards(sample: RolloutSample, mask: list[int]) -> list[float | None]:
    """One per turn; None where a turn has no reward of its own."""
    if sample.advantages is not None:
        raise RolloutContractError(
            "a sample has both advantages and turn_rewards. Advantages are what turn rewards become: leave one of the "
            "two out."
        )
    assert sample.turn_rewards is not None
    rewards = _numbers("turn_rewards", sample.turn_rewards, lambda reward: None if reward is None else float(reward))
    count = len(turns(mask))
    if len(rewards) != count:
        raise RolloutContractError(
            f"turn_rewards has {len(rewards)} entries, but the sample has {count} turns: stretches of ones in "
            "loss_mask. Expected one entry per turn, None for a turn without a reward of its own."
        )
    for place, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise RolloutContractError(f"turn_rewards[{place}] is {reward}. Expected a finite number, or None.")
    return rewards


def _check_versions(versions: list[int], mask: list[int], oldest: int, newest: int) -> None:
    low, high = min(compress(versions, mask)), max(compress(versions, mask))
    if low < oldest or high > newest:
        raise RolloutContractError(
            f"the versions of a sample's trained tokens are {low} to {high}, but this rollout ran while {oldest} to "
            f"{newest} were live. Take them from Completion.versions, or leave `versions` out."
        )
