from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from asyncrl.agents.transcript import Transcript, as_metrics
from asyncrl.errors import RolloutContractError
from asyncrl.rollout.contract import Contract
from asyncrl.types import Completion, RolloutRun, RolloutSample


def said(*tokens: int, version: int = 0, finish: Any = "stop") -> Completion:
    return Completion(tokens, [-token / 1000 for token in tokens], [version] * len(tokens), finish)


def trained(sample: RolloutSample) -> list[int]:
    return [token for token, mask in zip(sample.tokens, sample.loss_mask, strict=True) if mask]


def segments(transcript: Transcript, **more: Any) -> list[RolloutSample]:
    rollout = transcript.rollout(1.0, {}, **more)
    return list(rollout.segments) if isinstance(rollout, RolloutRun) else [rollout]


def test_one_conversation_is_one_sample() -> None:
    transcript = Transcript()
    first = transcript.add(transcript.root, [1, 2], said(11, 12, version=3))
    transcript.add(first, [3], said(13, version=4))
    sample = transcript.rollout(0.5, {"a": 1})
    assert isinstance(sample, RolloutSample)
    assert sample.tokens == [1, 2, 11, 12, 3, 13]
    assert sample.loss_mask == [0, 0, 1, 1, 0, 1]
    assert sample.logprobs == [0.0, 0.0, -0.011, -0.012, 0.0, -0.013]
    assert sample.versions == [0, 0, 3, 3, 0, 4]
    assert (sample.reward, sample.info, sample.turn_rewards) == (0.5, {"a": 1}, None)
    assert not transcript.counts


def test_what_branches_share_is_trained_in_the_first_of_them() -> None:
    transcript = Transcript()
    trunk = transcript.add(transcript.root, [1], said(11))
    left = transcript.add(trunk, [2], said(12))
    transcript.add(trunk, [3], said(13), cause="branch")
    transcript.add(left, [4], said(14))
    one, two = segments(transcript)
    assert (one.tokens, one.loss_mask) == ([1, 11, 3, 13], [0, 1, 0, 1])
    assert (two.tokens, two.loss_mask) == ([1, 11, 2, 12, 4, 14], [0, 0, 0, 1, 0, 1])
    assert transcript.counts == {"fork: branch": 1}
    Contract().check(transcript.rollout(1.0, {}), oldest=0, newest=0)


def test_a_turn_that_goes_on_without_reading_anything_is_one_with_the_turn_before() -> None:
    """As raw completions can ask for it: what they drew stands next to each other."""
    transcript = Transcript()
    begun = transcript.add(transcript.root, [1], said(11))
    more = transcript.add(begun, [], said(12))
    transcript.add(more, [2], said(13))
    (sample,) = segments(transcript, turn_rewards=[0.5, 0.25, None])
    assert (sample.loss_mask, sample.turn_rewards) == ([0, 1, 1, 0, 1], [0.75, None])
    Contract().check(sample, oldest=0, newest=0)


def test_turn_rewards_go_where_their_turns_are_trained() -> None:
    transcript = Transcript()
    trunk = transcript.add(transcript.root, [1], said(11))
    transcript.add(trunk, [2], said(12))
    transcript.add(trunk, [3], said(13))
    one, two = segments(transcript, turn_rewards=[0.1, 0.2, 0.3])
    assert (one.turn_rewards, two.turn_rewards) == ([0.1, 0.2], [0.3])
    one, two = segments(transcript, turn_rewards=[None, None, 0.3])
    assert (one.turn_rewards, two.turn_rewards) == ([None, None], [0.3])
    for wrong in (1.0, {0: 1.0, 1: 1.0, 2: 1.0}):
        with pytest.raises(RolloutContractError, match=r"turn_rewards is .* Expected a list, one for each turn"):
            segments(transcript, turn_rewards=wrong)
    with pytest.raises(RolloutContractError, match="2 turn rewards, but the policy spoke 3 turns"):
        transcript.rollout(1.0, {}, [1.0, 2.0])


def test_a_dropped_turn_is_not_trained_and_counted() -> None:
    transcript = Transcript()
    first = transcript.add(transcript.root, [1], said(11))
    transcript.drop(transcript.add(first, [2], said(12)), "length")
    (sample,) = segments(transcript)
    assert sample.tokens == [1, 11]
    assert transcript.counts == {"drop: length": 1}


def test_a_shortened_turn_keeps_its_head() -> None:
    transcript = Transcript()
    first = transcript.add(transcript.root, [1], said(11, 12, 13))
    transcript.shorten(first, 1)
    transcript.add(first, [9], said(14))
    (sample,) = segments(transcript)
    assert (sample.tokens, trained(sample)) == ([1, 11, 9, 14], [11, 14])
    assert sample.logprobs == [0.0, -0.011, 0.0, -0.014]
    assert transcript.counts == {"realigned tokens": 2}


def test_totals_count_for_all_rollouts() -> None:
    totals: Counter[str] = Counter()
    for _ in range(2):
        transcript = Transcript(totals)
        for cause in ("branch", "new conversation", "history rewritten"):
            node = transcript.add(transcript.root, [1], said(11, 12), cause)
        transcript.shorten(node, 1)
        transcript.drop(node, "length")
    assert as_metrics(totals) == {"forks": 4, "dropped_turns": 2, "realigned_tokens": 2}


def test_nothing_drawn_is_nothing_to_train() -> None:
    with pytest.raises(RolloutContractError, match=r"Await chat\.run"):
        Transcript().rollout(1.0, {})


def test_a_conversation_of_many_turns_keeps_what_it_had() -> None:
    transcript = Transcript()
    node, expected = transcript.root, []
    for turn in range(50):
        node = transcript.add(node, [turn], said(100 + turn))
        expected += [turn, 100 + turn]
        assert transcript.tokens_to(node) == expected
        assert transcript.length_to(node) == len(expected)
