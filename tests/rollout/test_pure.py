"""Advantages, failures, breaker, chunks: the small pure parts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import RolloutConfig
from asyncrl.errors import (
    ConfigError,
    RecoverableRolloutError,
    RolloutContractError,
    RolloutTimeout,
    SamplerError,
    SamplerRequestError,
)
from asyncrl.rollout.advantages import ADVANTAGES, advantage_function, has_signal
from asyncrl.rollout.batch import chunk_sizes
from asyncrl.rollout.failures import Breaker, FailurePolicy, Verdict, is_recoverable

rewards_lists = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


class TestAdvantages:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            # mean 2, population standard deviation sqrt(2)
            ("grpo", [-2 / (math.sqrt(2) + 1e-6), 0.0, 0.0, 2 / (math.sqrt(2) + 1e-6)]),
            ("dr_grpo", [-2.0, 0.0, 0.0, 2.0]),
            ("rloo", [-8 / 3, 0.0, 0.0, 8 / 3]),
            ("reinforce", [0.0, 2.0, 2.0, 4.0]),
        ],
    )
    def test_numbers_worked_by_hand(self, name: str, expected: list[float]) -> None:
        assert advantage_function(name)([0.0, 2.0, 2.0, 4.0]) == pytest.approx(expected)

    @given(rewards_lists)
    def test_a_baseline_takes_the_mean_away(self, rewards: list[float]) -> None:
        for name in ("grpo", "dr_grpo", "rloo"):
            assert sum(ADVANTAGES[name](rewards)) == pytest.approx(0.0, abs=1e-6)

    def test_rloo_of_one_is_nothing(self) -> None:
        assert ADVANTAGES["rloo"]([3.0]) == [0.0]

    def test_unknown_names_and_bad_functions(self) -> None:
        with pytest.raises(ConfigError, match="Expected one of grpo, dr_grpo, rloo, reinforce"):
            advantage_function("gae")
        with pytest.raises(ConfigError, match="one finite number for each reward"):
            advantage_function(lambda rewards: [1.0])([1.0, 2.0])
        with pytest.raises(ConfigError, match="one finite number for each reward"):
            advantage_function(lambda rewards: [math.nan, 0.0])([1.0, 2.0])

    def test_signal(self) -> None:
        assert has_signal([0.0, 1.0])
        assert not has_signal([1.0, 1.0, 1.0])


class Response:
    status_code = 503


class APIStatusError(Exception):
    """As the openai and httpx packages raise it."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


class APIConnectionError(Exception):
    pass


class TestFailures:
    @pytest.mark.parametrize(
        "error",
        [
            RecoverableRolloutError("again"),
            RolloutTimeout("slow"),
            TimeoutError(),
            ConnectionResetError(),
            APIConnectionError(),
            APIStatusError(408),
            APIStatusError(429),
            APIStatusError(500),
            APIStatusError(599),
            SamplerRequestError("lost"),
        ],
    )
    def test_what_asking_again_can_mend(self, error: Exception) -> None:
        assert is_recoverable(error)
        assert FailurePolicy(RolloutConfig()).judge(error) is Verdict.RETRY

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("bug"),
            APIStatusError(400),
            APIStatusError(404),
            SamplerRequestError("too long", status=400, recoverable=False),
            RolloutContractError("nan"),
        ],
    )
    def test_what_is_fatal_unless_dropped_on_a_budget(self, error: Exception) -> None:
        assert FailurePolicy(RolloutConfig()).judge(error) is Verdict.FATAL
        dropping = FailurePolicy(RolloutConfig(on_error="drop", error_budget=2))
        assert [dropping.judge(error) for _ in range(3)] == [Verdict.RETRY, Verdict.RETRY, Verdict.FATAL]
        assert dropping.budget_spent

    def test_the_end_of_the_engine_is_never_dropped(self) -> None:
        assert FailurePolicy(RolloutConfig(on_error="drop")).judge(SamplerError("died")) is Verdict.FATAL

    def test_the_status_of_a_response_counts(self) -> None:
        error = ValueError("requests keeps it there")
        error.response = Response()  # type: ignore[attr-defined]
        assert is_recoverable(error)

    def test_backoff_doubles_and_ends_at_five_seconds(self) -> None:
        assert [FailurePolicy.backoff_s(attempt) for attempt in (1, 2, 3, 20)] == pytest.approx([0.1, 0.2, 0.4, 5.0])


class TestBreaker:
    def test_five_in_a_row(self) -> None:
        breaker = Breaker()
        assert [breaker.lost() for _ in range(4)] == [None] * 4
        breaker.succeeded()
        assert [breaker.lost() for _ in range(4)] == [None] * 4
        assert breaker.lost() == "5 rollouts in a row failed"

    def test_half_of_the_last_twenty(self) -> None:
        breaker = Breaker()
        outcomes = []
        for _ in range(10):
            breaker.succeeded()
            outcomes.append(breaker.lost())
        assert outcomes == [None] * 9 + ["10 of the last 20 rollouts failed"]


@given(st.integers(1, 50), st.integers(1, 50))
def test_chunks_are_balanced(groups: int, chunks: int) -> None:
    sizes = chunk_sizes(groups, chunks)
    assert sum(sizes) == groups
    assert max(sizes) - min(sizes) <= 1


def test_chunks_worked_by_hand() -> None:
    assert chunk_sizes(10, 4) == [3, 3, 2, 2]
