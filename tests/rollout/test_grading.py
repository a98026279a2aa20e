"""Which groups are trained, with which advantages, and when a run gives up on its data."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

import asyncrl
from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import ConfigError, RolloutContractError
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.grading import SignalPatience, grader
from asyncrl.testing.simulation import Outcome, simulate
from asyncrl.types import RolloutRun, RolloutSample
from tests.conftest import MakeConfig


def run(reward: float, *advantages: list[float] | None) -> RolloutRun:
    """Segments of 3 tokens, the first masked."""
    return RolloutRun(
        [RolloutSample([1, 2, 3], [0.0, -1.0, -1.0], [0, 1, 1], reward, [0] * 3, advantages=a) for a in advantages]
    )


class TestSignal:
    def test_rewards_that_differ(self) -> None:
        by_mean = grader("dr_grpo", None, 2, 0.95)
        assert by_mean.grade([run(0.0, None), run(1.0, None)]) == [-0.5, 0.5]
        assert by_mean.grade([run(1.0, None), run(1.0, None)]) == []

    def test_a_group_of_one_cannot_differ_and_is_trained(self) -> None:
        assert grader("reinforce", None, 1, 0.95).grade([run(1.0, None)]) == [1.0]

    def test_advantages_of_its_own_are_signal_whatever_the_rewards(self) -> None:
        by_mean = grader("dr_grpo", None, 2, 0.95)
        assert by_mean.grade([run(1.0, [0.0, 0.5, 0.0]), run(1.0, None)]) == [0.0, 0.0]
        assert by_mean.grade([run(1.0, None, [0.0, 0.0, -2.0]), run(1.0, None)]) == [0.0, 0.0]

    def test_advantages_that_are_all_zero_are_none(self) -> None:
        by_mean = grader("dr_grpo", None, 2, 0.95)
        assert by_mean.grade([run(1.0, [0.0, 0.0, 0.0]), run(1.0, [0.0, 0.0, 0.0])]) == []
        assert by_mean.grade([run(1.0, [7.0, 0.0, 0.0]), run(1.0, [0.0, 0.0, 0.0])]) == [], "7 is masked"

    def test_rewards_that_nothing_is_trained_on_are_no_signal(self) -> None:
        silent = [0.0, 0.0, 0.0]
        assert grader("dr_grpo", None, 2, 0.95).grade([run(0.0, silent), run(1.0, silent)]) == []
        assert grader("dr_grpo", None, 2, 0.95).grade([run(0.0, silent), run(1.0, None)]) == [-0.5, 0.5]

    def test_a_filter_has_the_last_word(self) -> None:
        np = pytest.importorskip("numpy")
        hard_ones = grader("dr_grpo", lambda rewards: max(rewards) < 0.9, 2, 0.95)
        assert hard_ones.grade([run(0.5, None), run(0.5, None)]) == [0.0, 0.0]
        assert hard_ones.grade([run(0.0, None), run(1.0, None)]) == []
        spread = grader("dr_grpo", lambda rewards: np.std(rewards) > 0.1, 2, 0.95)
        assert spread.grade([run(0.0, None), run(1.0, None)]) == [-0.5, 0.5]

    def test_a_filter_cannot_change_the_rewards(self) -> None:
        def sorting(rewards: list[float]) -> bool:
            rewards.sort()
            return True

        assert grader("dr_grpo", sorting, 2, 0.95).grade([run(1.0, None), run(0.0, None)]) == [0.5, -0.5]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"group_filter": lambda rewards: 1 / 0}, r"(?s)`group_filter` failed for the rewards \[0.*ZeroDivision"),
            (
                {"group_filter": lambda rewards: None},
                r"group_filter returned None \(NoneType\) for the rewards \[0.*True",
            ),
            ({"group_filter": lambda rewards: 1}, r"group_filter returned 1 \(int\)"),
            ({"advantage": lambda rewards: rewards[9]}, r"(?s)`advantage` failed for the rewards \[0.*IndexError"),
            (
                {"group_filter": "filters:keep"},
                r"group_filter: there is no module 'filters'",
            ),
        ],
    )
    def test_functions_that_fail_end_the_run_by_name(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            simulate(config(**settings), rows=4)

    def test_a_filter_that_fails_on_a_group_whose_last_member_was_left_behind(self) -> None:
        """Then it is the watchman of the time limits who asks the filter, and he must live to tell."""

        async def rollout(prompt: Prompt) -> RolloutSample:
            if prompt.rollout_index == 0:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(10_000)
                await asyncio.sleep(10_000)
            return RolloutSample([1, 2], [0.0, -1.0], [0, 1], 1.0)

        with pytest.raises(ConfigError, match="`group_filter` failed"):
            simulate(
                config(group_filter=lambda rewards: 1 / 0, rollout={"timeout_s": 10.0, "retries": 0}),
                rows=4,
                rollout=rollout,
            )


def config(**settings: Any) -> Config:
    defaults: dict[str, Any] = {
        "model": "none",
        "completions_per_prompt": 2,
        "prompt_groups_per_step": 2,
        "data": {"shuffle": False},
        "staleness": {"max_staleness": 1},
        "concurrency": {"min_window": 8, "max_window": 8},
    }
    return Config(**(defaults | settings))


GOOD = RolloutSample([5, 6, 7], [0.0, -0.5, -1.0], [0, 1, 1], 1.0, [0, 0, 0])


class TestAdvantagesPerToken:
    def check(self, advantages: Any) -> list[float] | None:
        sample = RolloutSample(GOOD.tokens, GOOD.logprobs, GOOD.loss_mask, 1.0, advantages=advantages)
        found = Contract(10, 8).check(sample, oldest=0, newest=0).segments[0].advantages
        return None if found is None else list(found)

    def test_what_is_behind_the_mask_becomes_zero(self) -> None:
        assert self.check([math.nan, 0.5, -1]) == [0.0, 0.5, -1.0]
        assert self.check(None) is None

    @pytest.mark.parametrize(
        ("advantages", "message"),
        [
            (
                [0.0, math.nan, 1.0],
                r"advantages\[1\] is nan on a token that shall be trained. Expected a finite number",
            ),
            ([0.0, 1.0, math.inf], r"advantages\[2\] is inf"),
            ([0.0, math.inf, -math.inf], r"advantages\[1\] is inf"),
            ([1.0, 2.0], "advantages has 2 entries, but tokens has 3"),
            (0.5, r"advantages of a sample is 0.5 \(float\). Expected a sequence of numbers"),
            (["a", "b", "c"], "Expected a sequence of numbers"),
        ],
    )
    def test_violations(self, advantages: Any, message: str) -> None:
        with pytest.raises(RolloutContractError, match=message):
            self.check(advantages)

    def test_they_reach_the_trainer_and_mix_with_the_groups(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from asyncrl.testing import simulation

        seen: list[Any] = []

        class Listening(simulation.CountingTrainer):
            async def forward_backward(self, sequences: Any) -> None:
                seen.extend(sequence.advantage for sequence in sequences)

        monkeypatch.setattr(simulation, "CountingTrainer", Listening)

        async def rollout(prompt: Prompt) -> RolloutSample:
            own = [9.0, 0.25, -0.25] if prompt.rollout_index else None
            return RolloutSample([5, 6, 7], [0.0, -0.5, -1.0], [0, 1, 1], 1.0, advantages=own)

        outcome = simulate(config(advantage="dr_grpo"), rows=2, rollout=rollout)
        assert outcome.ledger["trained"] == 2
        assert seen == [0.0, [0.0, 0.25, -0.25]] * 2


def fading(rows: int = 400, **settings: Any) -> Outcome:
    """Rows from 40 on have equal rewards, but for one in 40."""

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(0.1 + prompt.rng.random())
        teaches = prompt.index < 40 or prompt.index % 40 == 0
        return RolloutSample([1, 2], [0.0, -1.0], [0, 1], float(prompt.rollout_index if teaches else 1))

    return simulate(config(**settings), rows=rows, rollout=rollout, step_s=lambda: 0.1)


class TestPatience:
    def test_the_share_is_counted_over_the_last_groups(self) -> None:
        patience = SignalPatience(20)
        assert [patience.finished(signal) for signal in [True, True, *[False] * 18]] == [None] * 20, "2 of 20"
        reason = patience.finished(False)
        assert reason == patience.lost
        assert reason is not None
        assert reason.startswith("only 1 of the last 20 groups carried signal, fewer than 10%")
        assert patience.finished(False) is None, "it is said once"

    def test_no_patience_is_endless(self) -> None:
        patience = SignalPatience(None)
        assert not any(patience.finished(False) for _ in range(100))
        assert patience.lost is None

    @pytest.mark.parametrize("on_filtered", ["replace", "drop"])
    def test_a_run_without_signal_ends_and_trains_what_is_under_way(self, on_filtered: str) -> None:
        outcome = fading(signal_patience_groups=30, on_filtered=on_filtered)
        ledger = outcome.ledger
        assert 40 <= ledger["trained"] <= 44
        assert 40 + 30 <= ledger["admitted"] < 90
        assert ledger["pending"] == 0
        assert sum(record["groups_trained"] for record in outcome.records) == ledger["trained"]

    def test_without_it_the_run_goes_to_the_end_of_its_data(self) -> None:
        assert fading(on_filtered="drop").ledger["admitted"] == 400

    @pytest.mark.parametrize(
        ("reward", "said"),
        [
            (lambda prompt: 1.0, ["32 were filtered, because all rollouts of the group had the same reward"]),
            (lambda prompt: None, ["32 were rejected, because too few of its rollouts gave a sample"]),
            (lambda prompt: float(prompt.index == 20 and prompt.rollout_index), []),
        ],
        ids=["equal rewards", "None", "one group teaches"],
    )
    def test_a_run_that_finds_no_signal_says_so_early(
        self, reward: Callable[[Prompt], float | None], said: list[str]
    ) -> None:
        async def rollout(prompt: Prompt) -> RolloutSample | None:
            earned = reward(prompt)
            return None if earned is None else RolloutSample([1, 2], [0.0, -1.0], [0, 1], earned)

        with capture_logs() as logs:
            simulate(config(data={"shuffle": False}), rows=80, rollout=rollout, step_s=lambda: 0.1)
        events = [entry["event"] for entry in logs if entry["event"].startswith("none of the first 32 groups")]
        assert events == [f"none of the first 32 groups can be trained: {why}" for why in said]

    def test_a_requeued_prompt_does_not_keep_the_run_alive(self) -> None:
        outcome = fading(
            signal_patience_groups=30, staleness={"policy": "pace", "max_staleness": 0, "on_stale": "requeue"}
        )
        assert outcome.ledger["admitted"] < 90


def test_advantages_per_token_teach_where_rewards_say_nothing(make_config: MakeConfig) -> None:
    """All rewards are equal; each token is judged by itself: those below 64 are good."""
    shares: list[float] = []

    async def rollout(prompt: Prompt) -> RolloutSample:
        drawn = await prompt.policy.generate([65, 66])
        shares.append(sum(token < 64 for token in drawn.tokens) / len(drawn.tokens))
        own = [math.nan, math.nan, *(1.0 if token < 64 else -0.5 for token in drawn.tokens)]
        return replace(RolloutSample.from_completion([65, 66], drawn, 1.0), advantages=own)

    result = asyncrl.train(rollout, dataset=[{}] * 100, config=make_config(log_rollouts=1, max_steps=20), view="quiet")
    assert result.steps == 20
    assert sum(shares[:32]) / 32 < 0.5
    assert sum(shares[-32:]) / 32 > 0.8
    logged = json.loads((result.run_dir / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert logged["advantages"] == [0.0] * 4
    assert all(-0.5 <= run["samples"][0]["advantage_mean"] <= 1.0 for run in logged["rollouts"])
