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

from asyncrl.agents.policy import Policy, Scored
from asyncrl.errors import RolloutContractError
from asyncrl.rollout.turns import turns
from asyncrl.types import Rollout, RolloutRun, RolloutSample


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

    None for the last turn, and where the answer does not fit into `max_seq_len`. All places are scored by the same
    weights, those that the rollout is pinned to or the newest, so that nothing but the turn is between two of them.

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
    likely: dict[int, Scored] = {}
    # One after the other: each finds what the one before it left in the prefix cache. Those that newer weights have
    # overtaken are asked again.
    while asked := [place for place in fitting if place not in likely]:
        for place in asked:
            likely[place] = await policy.score([*tokens[:place], *said], place + unscored)
        newest = max(scored.version for scored in likely.values())
        likely = {place: scored for place, scored in likely.items() if scored.version == newest}
    means = [sum(likely[place].logprobs) / len(likely[place].logprobs) for place in fitting]
    gains = [after - before for before, after in pairwise(means)]
    return [*gains, *[None] * (len(places) - len(gains))]


def _answer_tokens(policy: Policy, answer: str, prefix: str) -> tuple[list[int], int]:
    """Prefix and answer, and how many of their tokens hold nothing of the answer."""
    if not answer:
        raise RolloutContractError("the true answer is empty, so no turn can make it likelier. Expected some text.")
    before: Sequence[int] = policy.tokenizer.encode(prefix, add_special_tokens=False)
    said: list[int] = policy.tokenizer.encode(prefix + answer, add_special_tokens=False)
    most = min(len(before), len(said) - 1)  # where prefix and answer merge into one token, that one is scored
    return said, next((place for place in range(most) if before[place] != said[place]), most)
