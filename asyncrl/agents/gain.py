"""Information gain: how much likelier each turn made the true answer (arXiv:2510.14967).

    context | turn 1 | tool result | turn 2 | tool result | turn 3
            ^ s0                   ^ s1                   ^ s2         s_t = mean log P(answer | everything before here)

Turn t gains s_t - s_(t-1). In a sample the tokens before a turn end where the policy begins to speak, so the answer is
scored as the turn that it could say there, next to what its last turn has found out. The last turn has no gain of its
own: the reward judges it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import anyio

from asyncrl.agents.policy import Policy, Scored
from asyncrl.errors import RolloutContractError, first_failure
from asyncrl.rollout.turns import turns
from asyncrl.types import Rollout, RolloutRun, RolloutSample

ROUNDS = 3
"""Hot-loads that come faster than a few one-token requests are answered are rare; then weights are mixed after all."""


async def with_information_gain(policy: Policy, rollout: Rollout, answer: str, prefix: str = "") -> Rollout:
    """The same rollout; the `turn_rewards` of its samples are the information gains of their turns.

    Args:
        policy: Whose rollout it is.
        rollout: What `chat.sample(...)` or `policy.captured_run(...)` gave.
        answer: The truth, as the policy would write it.
        prefix: What the policy writes before its answer, such as `</think>` or `The answer is `. It is not scored.

    Raises: as `information_gain`.
    """
    if isinstance(rollout, RolloutRun):
        return RolloutRun([await _with_gain(policy, segment, answer, prefix) for segment in rollout.segments])
    return await _with_gain(policy, rollout, answer, prefix)


async def _with_gain(policy: Policy, sample: RolloutSample, answer: str, prefix: str) -> RolloutSample:
    return replace(sample, turn_rewards=await information_gain(policy, sample, answer, prefix))


async def information_gain(policy: Policy, sample: RolloutSample, answer: str, prefix: str = "") -> list[float | None]:
    """The gain of each turn of a sample, in nats per token of the answer. Arguments as of `with_information_gain`.

    None for the last turn, and where the answer does not fit into `max_seq_len`. All places are scored at once and by
    the same weights, those that the rollout is pinned to or the newest: nothing but the turn is between two of them.

    Raises:
        RolloutContractError: the answer is empty.
        SamplerRequestError: the sampler refused or lost a request.
    """
    said, unscored = _answer_tokens(policy, answer, prefix)
    places = [begin for begin, _ in turns(sample.loss_mask)]
    fitting = [place for place in places if place + len(said) < policy.max_seq_len]
    if len(fitting) < 2:
        return [None] * len(places)
    tokens = [int(token) for token in sample.tokens]
    scored = await _by_the_same_weights(policy, {place: [*tokens[:place], *said] for place in fitting}, unscored)
    means = [sum(scored[place].logprobs) / len(scored[place].logprobs) for place in fitting]
    gains = [after - before for before, after in pairwise(means)]
    return [*gains, *[None] * (len(places) - len(gains))]


async def _by_the_same_weights(policy: Policy, asked: dict[int, list[int]], unscored: int) -> dict[int, Scored]:
    """What the policy says of the tokens at each place. What a hot-load overtakes is asked again, `ROUNDS` times."""
    scored: dict[int, Scored] = {}

    async def ask(place: int) -> None:
        scored[place] = await policy.score(asked[place], place + unscored)

    for _ in range(ROUNDS):
        newest = max((found.version for found in scored.values()), default=None)
        old = [place for place in asked if place not in scored or scored[place].version != newest]
        try:
            async with anyio.create_task_group() as group:
                for place in old:
                    group.start_soon(ask, place)
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
    return scored


def _answer_tokens(policy: Policy, answer: str, prefix: str) -> tuple[list[int], int]:
    """Prefix and answer, and how many of their tokens hold nothing of the answer."""
    if not answer:
        raise RolloutContractError("the true answer is empty, so no turn can make it likelier. Expected some text.")
    before: Sequence[int] = policy.tokenizer.encode(prefix, add_special_tokens=False)
    said: list[int] = policy.tokenizer.encode(prefix + answer, add_special_tokens=False)
    most = min(len(before), len(said) - 1)  # where prefix and answer merge into one token, that one is scored
    return said, next((place for place in range(most) if before[place] != said[place]), most)
