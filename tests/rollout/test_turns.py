"""Advantages turn by turn: numbers worked by hand, what must not change them, and the way to the trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import ConfigError, RolloutContractError
from asyncrl.rollout.advantages import grpo
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.grading import Grader, grader
from asyncrl.rollout.turns import turns
from asyncrl.testing import simulation
from asyncrl.types import RolloutRun, RolloutSample

Rewards = Sequence[float | None] | None


def segment(reward: float, rewards: Rewards, *, shared: int = 0, turn_tokens: int = 2) -> RolloutSample:
    """One token of context before each turn. `shared` turns at the beginning are another segment's."""
    count = shared + (len(rewards) if rewards is not None else 2)
    mask = [bit for turn in range(count) for bit in (0, *[int(turn >= shared)] * turn_tokens)]
    size = len(mask)
    return RolloutSample(
        list(range(size)), [-1.0 * bit for bit in mask], mask, reward, [0] * size, turn_rewards=rewards
    )


def run(reward: float, *rewards: Rewards) -> RolloutRun:
    return RolloutRun([segment(reward, each) for each in rewards])


def by_turn(sample: RolloutSample) -> list[float]:
    """The advantage of each turn, which all its tokens must share; elsewhere there is none."""
    assert sample.advantages is not None
    places = turns(sample.loss_mask)
    inside = {token for start, end in places for token in range(start, end)}
    assert all(value == 0 for token, value in enumerate(sample.advantages) if token not in inside)
    assert all(len(set(sample.advantages[start:end])) == 1 for start, end in places)
    return [sample.advantages[start] for start, _ in places]


def graded(judge: Grader, runs: Sequence[RolloutRun]) -> list[list[list[float]]]:
    """For each run, for each segment, the advantage of each turn."""
    spread = judge.spread(runs, judge.grade(runs))
    return [[by_turn(sample) for sample in run.segments] for run in spread]


Z = 1 / (1 + 1e-6)
"""What a value one standard deviation above the mean becomes, when that deviation is 1."""
HALF = 0.5 / (0.5 + 1e-6)
"""The same, when it is 0.5."""


class TestByHand:
    def test_turns_are_the_stretches_of_ones(self) -> None:
        assert turns([0, 1, 1, 0, 0, 1]) == [(1, 3), (5, 6)]
        assert turns([0, 0]) == []
        assert turns([1]) == [(0, 1)]

    def test_gains_and_outcomes_are_compared_apart_and_discounted_backwards(self) -> None:
        # Gains 1 and 3: mean 2, deviation 1. Outcomes 0 and 1: mean 0.5, deviation 0.5.
        found = graded(grader("grpo", None, 2, 0.5), [run(0.0, [1.0, None]), run(1.0, [3.0, None])])
        assert found == [
            [pytest.approx([-Z - 0.5 * HALF, -HALF])],
            [pytest.approx([Z + 0.5 * HALF, HALF])],
        ]

    def test_a_reward_of_the_last_turn_is_added_to_the_outcome(self) -> None:
        # Turn rewards 0, 2, 4, 6: mean 3. Outcomes 0 and 4: mean 2.
        found = graded(grader("dr_grpo", None, 2, 0.5), [run(0.0, [0.0, 2.0]), run(4.0, [4.0, 6.0])])
        assert found == [[[-3 + 0.5 * (-1 - 2), -1 - 2]], [[1 + 0.5 * (3 + 2), 3 + 2]]]

    def test_rollouts_of_different_length(self) -> None:
        # One pool of gains: 1, 2, 3 of the first, none of the second, 6 of the third: mean 3.
        runs = [run(1.0, [1.0, 2.0, 3.0, None]), run(1.0, [None]), run(1.0, [6.0, None])]
        assert graded(grader("dr_grpo", None, 3, 1.0), runs) == [[[-3.0, -1.0, 0.0, 0.0]], [[0.0]], [[3.0, 0.0]]]

    def test_equal_outcomes_leave_the_gains_and_equal_gains_the_outcomes(self) -> None:
        judge = grader("grpo", None, 2, 0.5)
        gains = graded(judge, [run(1.0, [1.0, None]), run(1.0, [3.0, None])])
        assert gains == [[pytest.approx([-Z, 0.0])], [pytest.approx([Z, 0.0])]]
        outcomes = graded(judge, [run(0.0, [7.1, None]), run(1.0, [7.1, None])])
        assert outcomes == [[pytest.approx([-0.5 * HALF, -HALF])], [pytest.approx([0.5 * HALF, HALF])]]

    def test_a_group_with_signal_in_neither_is_filtered(self) -> None:
        judge = grader("grpo", None, 2, 0.95)
        runs = [run(1.0, [0.5, None]), run(1.0, [0.5, None])]
        assert judge.grade(runs) == []
        assert judge.spread(runs, []) is runs
        assert judge.grade([run(1.0, [None, None]), run(1.0, None)]) == []

    def test_each_segment_of_a_branched_run_ends_with_the_outcome(self) -> None:
        """Turn 0 is shared: it is trained in the first segment, on what became of that one."""
        branched = RolloutRun([segment(1.0, [4.0, 1.0]), segment(1.0, [-2.0, 1.0], shared=1)])
        single = run(0.0, [0.0, 2.0])  # the mean of 4, 1, -2, 1, 0, 2 is 1; the outcomes' is 0.5
        found = graded(grader("dr_grpo", None, 2, 0.5), [branched, single])
        assert found == [[[3 + 0.5 * 0.5, 0.5], [-3 + 0.5 * 0.5, 0.5]], [[-1 + 0.5 * 0.5, 0.5]]]

    def test_who_brings_no_turn_rewards_has_the_runs_advantage_as_ever(self) -> None:
        judge = grader("dr_grpo", None, 3, 0.5)
        own = replace(segment(1.0, None), advantages=[9.0] * 6)
        runs = [run(0.0, [1.0, None]), run(1.0, None), RolloutRun([own])]
        advantages = judge.grade(runs)
        assert advantages == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
        found = judge.spread(runs, advantages)
        assert [found[1].segments[0].advantages, found[2].segments[0]] == [None, own]

    def test_a_group_of_one_takes_rewards_as_they_are(self) -> None:
        assert graded(grader("reinforce", None, 1, 0.5), [run(2.0, [3.0, 1.0])]) == [[[3 + 0.5 * 3, 3.0]]]

    def test_a_function_of_the_users_compares_turns_too(self) -> None:
        def centred(rewards: list[float]) -> list[float]:
            seen.append(rewards)
            return [reward - 10 for reward in rewards]

        seen: list[list[float]] = []
        found = graded(grader(centred, None, 2, 0.0), [run(1.0, [2.0, 3.0]), run(2.0, [4.0, None])])
        assert found == [[[-8.0, -7.0 - 9.0]], [[-6.0, -8.0]]]
        assert seen == [[1.0, 2.0], [2.0, 3.0, 4.0]]
        failing = grader(lambda rewards: [0.0, 0.0], None, 2, 0.0)
        with pytest.raises(ConfigError, match=r"for the rewards \[2.0, 3.0, 4.0\]"):
            graded(failing, [run(1.0, [2.0, 3.0]), run(2.0, [4.0, None])])


finite = st.floats(-50, 50)
groups = st.lists(
    st.tuples(finite, st.lists(st.none() | finite, min_size=1, max_size=4)), min_size=2, max_size=6
)  # of (outcome, turn rewards)


def grade_group(
    group: Sequence[tuple[float, Sequence[float | None]]], discount: float, advantage: str = "grpo"
) -> list[list[float]]:
    judge = grader(advantage, lambda rewards: True, len(group), discount)
    return [found for (found,) in graded(judge, [run(outcome, rewards) for outcome, rewards in group])]


class TestProperties:
    @given(groups, st.sampled_from([0.0, 0.95, 1.0]), st.randoms())
    def test_the_order_of_members_does_not_matter(self, group: Any, discount: float, chance: Any) -> None:
        order = list(range(len(group)))
        chance.shuffle(order)
        before = grade_group(group, discount)
        after = grade_group([group[place] for place in order], discount)
        for place, found in zip(order, after, strict=True):
            assert found == pytest.approx(before[place], abs=1e-6)

    @given(groups)
    def test_without_discount_every_turn_bears_all_that_follows_and_with_none_of_it_only_itself(
        self, group: Any
    ) -> None:
        alone, together = grade_group(group, 0.0), grade_group(group, 1.0)
        for own, following in zip(alone, together, strict=True):
            assert following == pytest.approx([sum(own[turn:]) for turn in range(len(own))], abs=1e-6)

    @given(st.lists(st.tuples(finite, finite), min_size=2, max_size=6), st.sampled_from([0.0, 0.95, 1.0]))
    def test_rollouts_of_one_turn_are_plain_grpo(self, group: Any, discount: float) -> None:
        outcomes = [outcome for outcome, _ in group]
        plain = grade_group([(outcome, [None]) for outcome in outcomes], discount)
        assert [advantage for (advantage,) in plain] == grpo(outcomes)

    @given(groups)
    def test_turns_without_rewards_and_discount_are_plain_grpo(self, group: Any) -> None:
        silent = [(outcome, [None] * len(rewards)) for outcome, rewards in group]
        plain = grpo([outcome for outcome, _ in group])
        assert grade_group(silent, 1.0) == [
            [each] * len(rewards) for each, (_, rewards) in zip(plain, group, strict=True)
        ]

    @given(groups, finite)
    def test_what_all_turns_gain_alike_teaches_nothing(self, group: Any, more: float) -> None:
        raised = [(outcome, [None if r is None else r + more for r in rewards]) for outcome, rewards in group]
        for a, b in zip(grade_group(group, 0.95, "dr_grpo"), grade_group(raised, 0.95, "dr_grpo"), strict=True):
            assert a == pytest.approx(b, abs=1e-9)


class TestContract:
    def check(self, **given: Any) -> list[float | None] | None:
        sample = replace(segment(1.0, None), **given)
        found = Contract(10, 8).check(sample, oldest=0, newest=0).segments[0].turn_rewards
        return None if found is None else list(found)

    def test_they_become_plain_numbers(self) -> None:
        assert self.check(turn_rewards=(1, None)) == [1.0, None]
        assert self.check(turn_rewards=None) is None

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"turn_rewards": [1.0]}, r"turn_rewards has 1 entries, but the sample has 2 turns: stretches of ones"),
            ({"turn_rewards": [1.0] * 3}, r"turn_rewards has 3 entries, but the sample has 2 turns"),
            ({"turn_rewards": [1.0, math.nan]}, r"turn_rewards\[1\] is nan. Expected a finite number, or None"),
            ({"turn_rewards": [math.inf, None]}, r"turn_rewards\[0\] is inf"),
            ({"turn_rewards": 0.5}, r"turn_rewards of a sample is 0.5 \(float\). Expected a sequence of numbers"),
            ({"turn_rewards": ["a", "b"]}, "Expected a sequence of numbers"),
            ({"turn_rewards": [1.0, 2.0], "advantages": [0.0] * 6}, "both advantages and turn_rewards"),
        ],
    )
    def test_violations(self, given: Any, message: str) -> None:
        with pytest.raises(RolloutContractError, match=message):
            self.check(**given)


def test_they_reach_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Listening(simulation.CountingTrainer):
        async def forward_backward(self, sequences: Any) -> None:
            seen.extend(sequence.advantage for sequence in sequences)

    monkeypatch.setattr(simulation, "CountingTrainer", Listening)

    async def rollout(prompt: Prompt) -> RolloutSample:
        return segment(1.0, [2.0 * prompt.rollout_index, None], turn_tokens=1)

    settings: dict[str, Any] = {"completions_per_prompt": 2, "prompt_groups_per_step": 2, "turn_discount": 0.5}
    config = Config(model="none", advantage="dr_grpo", data={"shuffle": False}, **settings)
    outcome = simulation.simulate(config, rows=2, rollout=rollout)
    assert outcome.ledger["trained"] == 2
    assert seen == [[0.0, -1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]] * 2
