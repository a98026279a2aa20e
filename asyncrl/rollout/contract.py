"""The contract of a rollout function: what it may return, checked once, before anything else sees it.

Everything passes through here, tens of thousands of times a second, so each check is one pass in C over a
sequence, and a message is worked out only when a check has failed. N is the number of tokens.
"""

from __future__ import annotations

import math
import operator
from array import array
from collections.abc import Callable, Iterable, Mapping, Set, Sized
from dataclasses import dataclass
from itertools import compress, islice
from typing import Any

from asyncrl.errors import RolloutContractError
from asyncrl.rollout.failures import brief, describe
from asyncrl.rollout.turns import turns
from asyncrl.types import RolloutRun, RolloutSample

_LOGPROB_SLACK = 1e-3
"""A log-prob of a certain token may come out a rounding error above 0."""
LARGEST = 1e30
"""Of rewards, advantages and log-probs: the trainer's float32 holds it, and sums of it over a group."""
MOST_SEGMENTS = 10_000
"""Of one run: far above any agent, far below what would hold up the event loop."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What every sample of this run must keep to."""

    vocabulary: int = 1 << 31
    """Token ids are below it."""
    max_tokens: int = 1 << 24
    """Longest sample."""

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
        segments = [self._sample(segment, oldest, newest) for segment in _segments(result)]
        if len({segment.reward for segment in segments}) > 1:
            rewards = [segment.reward for segment in segments]
            raise RolloutContractError(
                f"the segments of a RolloutRun have the rewards {brief(rewards)}. Expected the same reward, that of "
                "the whole rollout, on each."
            )
        return RolloutRun(segments)

    def _sample(self, sample: RolloutSample, oldest: int, newest: int) -> RolloutSample:
        tokens = self._integers("tokens", sample.tokens)
        logprobs = self._floats("logprobs", sample.logprobs)
        mask = self._integers("loss_mask", sample.loss_mask)
        reward = _reward(sample.reward)
        self._check_tokens(tokens)
        _check_lengths(len(tokens), logprobs=logprobs, loss_mask=mask)
        _check_mask(mask)
        if sample.versions is None:
            versions = [oldest] * len(tokens)
        else:
            versions = self._integers("versions", sample.versions)
            _check_lengths(len(tokens), versions=versions)
        # A plain one of its own: neither a subclass nor what the user still holds reaches what comes after.
        return RolloutSample(
            tokens=tokens,
            logprobs=_checked_logprobs(logprobs, mask),
            loss_mask=mask,
            reward=reward,
            versions=_checked_versions(versions, mask, oldest, newest),
            info=_info(sample.info),
            advantages=None if sample.advantages is None else self._advantages(sample.advantages, mask),
            turn_rewards=None if sample.turn_rewards is None else self._turn_rewards(sample, mask),
        )

    def _integers(self, name: str, values: Any) -> list[int]:
        return _converted(name, values, self.max_tokens, "integers", lambda items: list(map(operator.index, items)))

    def _floats(self, name: str, values: Any) -> list[float]:
        return _converted(name, values, self.max_tokens, "numbers", _floats)

    def _check_tokens(self, tokens: list[int]) -> None:
        if not tokens:
            raise RolloutContractError("a sample has no tokens. Return None to drop a draw.")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            bad = next(i for i, token in enumerate(tokens) if not 0 <= token < self.vocabulary)
            raise RolloutContractError(
                f"tokens[{bad}] is {brief(tokens[bad])}. Expected token ids of the model: 0 to {self.vocabulary - 1}."
            )

    def _advantages(self, values: Any, mask: list[int]) -> list[float]:
        """[N] 0 where nothing is trained, so that nothing strange goes further."""
        advantages = self._floats("advantages", values)
        _check_lengths(len(mask), advantages=advantages)
        for place, (advantage, trained) in enumerate(zip(advantages, mask, strict=True)):
            if trained and not abs(advantage) <= LARGEST:
                raise RolloutContractError(
                    f"advantages[{place}] is {advantage} on a token that shall be trained. Expected a finite number, "
                    f"at most {LARGEST:g} in size. Leave `advantages` out to have the group's rewards compared."
                )
        return [advantage if trained else 0.0 for advantage, trained in zip(advantages, mask, strict=True)]

    def _turn_rewards(self, sample: RolloutSample, mask: list[int]) -> list[float | None]:
        """One per turn; None where a turn has no reward of its own."""
        if sample.advantages is not None:
            raise RolloutContractError(
                "a sample has both advantages and turn_rewards. Expected one of the two: advantages are what turn "
                "rewards become."
            )
        rewards: list[float | None] = _converted(
            "turn_rewards",
            sample.turn_rewards,
            self.max_tokens,
            "numbers, or None",
            lambda items: [None if item is None else _floats([item])[0] for item in items],
        )
        count = len(turns(mask))
        if len(rewards) != count:
            raise RolloutContractError(
                f"turn_rewards has {len(rewards)} entries, but the sample has {count} turns: stretches of ones in "
                "loss_mask. Expected one entry per turn, None for a turn without a reward of its own."
            )
        for place, reward in enumerate(rewards):
            if reward is not None and not abs(reward) <= LARGEST:
                raise RolloutContractError(
                    f"turn_rewards[{place}] is {reward}. Expected a finite number, or None; at most {LARGEST:g} in "
                    "size."
                )
        return rewards


def _described(value: object) -> str:
    return f"{brief(value)} ({type(value).__name__})"


def _segments(run: RolloutRun) -> list[RolloutSample]:
    segments = _converted("segments", run.segments, MOST_SEGMENTS, "RolloutSamples", list, of="a RolloutRun")
    for place, segment in enumerate(segments):
        if not isinstance(segment, RolloutSample):
            raise RolloutContractError(
                f"segments[{place}] of a RolloutRun is a {type(segment).__name__}. Expected a RolloutSample."
            )
    if not segments:
        raise RolloutContractError(
            "the rollout function returned a RolloutRun without segments. Expected at least one, or None in place of "
            "the RolloutRun to drop the draw."
        )
    return segments


def _converted(
    name: str, values: Any, most: int, wanted: str, convert: Callable[[Iterable[Any]], list[Any]], of: str = "a sample"
) -> list[Any]:
    """A list of its own of what the user wrote, whatever that is. It is never walked beyond `most`, so that nothing
    without an end holds up the event loop."""
    why = ""
    try:
        if (items := _listed(name, values, most)) is not None:
            return convert(items)
    except RolloutContractError:
        raise
    except Exception as error:  # of the user's __iter__, __index__, __float__, ...: whatever it is, it is no number
        why = f" ({describe(error)})"
    raise RolloutContractError(f"{name} of {of} is {_described(values)}. Expected a sequence of {wanted}.{why}")


def _listed(name: str, values: Any, most: int) -> Iterable[Any] | None:
    """`values` when they are a sequence of at most `most`, else None. A str is one of letters, a set has no order."""
    plain = type(values) is list or type(values) is tuple
    if not plain and (isinstance(values, str | bytes | bytearray | Mapping | Set) or not isinstance(values, Sized)):
        return None
    count = len(values)
    if count > most:
        raise RolloutContractError(
            f"{name} has {count} entries, more than the {most} that are trained at most. Expected fewer: raise "
            "max_seq_len if it is that and the model allows it, or end such rollouts earlier."
        )
    if plain:
        return values  # type: ignore[no-any-return]
    items = list(islice(iter(values), count + 1))
    if len(items) != count:
        raise TypeError(f"its length is {count}, but that is not how many entries it gives")
    return items


def _floats(items: Iterable[Any]) -> list[float]:
    """As `float` of each, but text is no number. One pass in C."""
    return array("d", items).tolist()


def _reward(value: Any) -> float:
    try:
        reward = _floats([value])[0]
    except Exception:  # of the user's __float__: whatever it is, it is no number
        raise RolloutContractError(f"the reward is {_described(value)}. Expected a number.") from None
    if not abs(reward) <= LARGEST:
        raise RolloutContractError(f"the reward is {reward}. Expected a finite number, at most {LARGEST:g} in size.")
    return reward


def _info(info: Any) -> dict[str, Any]:
    """A copy of its own: what it holds is the user's, and the rollout log writes it later."""
    try:
        if isinstance(info, Mapping):
            return dict(info)
    except Exception:  # of the user's own mapping
        pass
    raise RolloutContractError(
        f"info of a sample is {_described(info)}. Expected a dict of what the rollout log shall show."
    )


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
        raise RolloutContractError(f"loss_mask[{bad}] is {brief(mask[bad])}. Expected 0 or 1.")
    if 1 not in mask:
        raise RolloutContractError(
            "loss_mask is 0 everywhere, so there is nothing to train. Return None to drop a draw."
        )
    if mask[0]:
        raise RolloutContractError(
            "loss_mask[0] is 1, but the first token has nothing before it that could predict it. Expected at least "
            "one prompt token, with mask 0."
        )


def _checked_logprobs(logprobs: list[float], mask: list[int]) -> list[float]:
    """With 0 in place of a masked one that is no number: 0 x NaN would be NaN in somebody's loss."""
    # inf and nan survive a sum, so one addition and one look at either end check them all.
    if math.isfinite(sum(logprobs)) and min(logprobs) >= -LARGEST and max(logprobs) <= _LOGPROB_SLACK:
        return logprobs
    for place, (logprob, trained) in enumerate(zip(logprobs, mask, strict=True)):
        if trained and not -LARGEST <= logprob <= _LOGPROB_SLACK:
            raise RolloutContractError(
                f"logprobs[{place}] is {logprob} on a token that shall be trained. Expected the natural log of its "
                f"probability under the weights that drew it: finite, at most 0, at least -{LARGEST:g}."
            )
    return [logprob if abs(logprob) <= LARGEST else 0.0 for logprob in logprobs]


def _checked_versions(versions: list[int], mask: list[int], oldest: int, newest: int) -> list[int]:
    """With `oldest` in place of a masked one that never was."""
    low, high = min(compress(versions, mask)), max(compress(versions, mask))
    if low < oldest or high > newest:
        raise RolloutContractError(
            f"the versions of a sample's trained tokens are {brief(low)} to {brief(high)}, but this rollout ran while "
            f"{oldest} to {newest} were live. Take them from Completion.versions, or leave `versions` out."
        )
    if min(versions) >= 0 and max(versions) <= newest:
        return versions
    return [version if 0 <= version <= newest else oldest for version in versions]
