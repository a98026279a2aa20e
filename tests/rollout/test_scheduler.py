"""What the engine does when rollouts fail, hang, and end in odd orders, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.errors import BreakerOpen, RecoverableRolloutError, RolloutFailed
from asyncrl.testing.simulation import Outcome, simulate
from asyncrl.types import RolloutRun, RolloutSample


def config(**settings: Any) -> Config:
    defaults: dict[str, Any] = {
        "model": "none",
        "completions_per_prompt": 4,
        "prompt_groups_per_step": 2,
        "staleness": {"max_staleness": 1},
        "rollout": {"timeout_s": 10.0},
        "concurrency": {"min_window": 8, "max_window": 8},
    }
    return Config(**(defaults | settings))


def sample(prompt: Prompt) -> RolloutSample:
    return RolloutSample([1, 2], [0.0, -1.0], [0, 1], float(prompt.rollout_index))


def run(work: Callable[[Prompt], Awaitable[Any]], rows: int = 8, **settings: Any) -> Outcome:
    return simulate(config(**settings), rows=rows, rollout=work, step_s=lambda: 0.1)


def total(outcome: Outcome, name: str) -> float:
    return sum(record[name] for record in outcome.records)


def test_a_failed_member_is_filled_in_again() -> None:
    calls: Counter[tuple[int, int]] = Counter()

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(1)
        calls[prompt.index, prompt.rollout_index] += 1
        if prompt.rollout_index == 2 and calls[prompt.index, 2] == 1:
            raise RecoverableRolloutError("first try")
        return sample(prompt)

    outcome = run(rollout)
    assert outcome.ledger["trained"] == 8
    assert total(outcome, "samples") == 32, "every group is whole"
    assert total(outcome, "members_retried") == 8
    assert calls[0, 2] == 2
    assert calls[0, 1] == 1, "its siblings are not drawn again"


@pytest.mark.parametrize(("min_group_size", "end"), [(3, "trained"), (4, "rejected")])
def test_a_group_goes_on_with_enough_survivors(min_group_size: int, end: str) -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(1)
        if prompt.rollout_index == 0:
            raise RecoverableRolloutError("always")
        return sample(prompt)

    outcome = run(rollout, rollout={"timeout_s": 10.0, "retries": 1, "min_group_size": min_group_size})
    assert outcome.ledger[end] == 8
    if end == "trained":
        assert total(outcome, "members_failed") == 8
        assert total(outcome, "samples") == 24


def test_a_dropped_draw_is_filled_in_and_trips_no_breaker() -> None:
    seen: Counter[tuple[int, int]] = Counter()

    async def rollout(prompt: Prompt) -> RolloutSample | None:
        seen[prompt.index, prompt.rollout_index] += 1
        await asyncio.sleep(0.1)
        return sample(prompt) if seen[prompt.index, prompt.rollout_index] > 1 else None

    outcome = run(rollout, rows=20)
    assert outcome.ledger["trained"] == 20
    assert total(outcome, "members_dropped") == 80


def test_a_rollout_that_hangs_is_cancelled_at_its_time_limit_and_drawn_again() -> None:
    cancelled_at: list[float] = []
    hung: set[int] = set()

    async def rollout(prompt: Prompt) -> RolloutSample:
        if prompt.rollout_index == 0 and prompt.index not in hung:
            hung.add(prompt.index)
            began = asyncio.get_running_loop().time()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled_at.append(asyncio.get_running_loop().time() - began)
                raise
        return sample(prompt)

    outcome = run(rollout)
    assert outcome.ledger["trained"] == 8
    assert cancelled_at == pytest.approx([10.0] * 8)


def test_the_pause_before_another_try_is_no_part_of_its_time() -> None:
    seen: set[tuple[int, int]] = set()

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(9.95)
        if (place := (prompt.index, prompt.rollout_index)) not in seen:
            seen.add(place)
            raise RecoverableRolloutError("first try")
        return sample(prompt)

    outcome = run(rollout, rows=2, rollout={"timeout_s": 10.0, "retries": 1})
    assert outcome.ledger["trained"] == 2
    assert total(outcome, "samples") == 8


def test_a_rollout_that_ignores_its_cancellation_is_left_behind() -> None:
    ignored = 0

    async def rollout(prompt: Prompt) -> RolloutSample:
        nonlocal ignored
        while prompt.index == 3 and prompt.rollout_index == 0:
            try:
                await asyncio.sleep(10_000)
            except asyncio.CancelledError:
                ignored += 1
                if ignored > 1:  # the time limit, then the end of the loop
                    raise
        return sample(prompt)

    outcome = run(rollout)
    assert outcome.ledger["trained"] == 8, "the group goes on without it"
    assert total(outcome, "members_failed") == 1


def test_one_that_was_left_behind_is_not_drawn_again() -> None:
    calls = 0

    async def rollout(prompt: Prompt) -> RolloutSample:
        nonlocal calls
        if prompt.index == 0 and prompt.rollout_index == 0:
            calls += 1
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(10_000)
            await asyncio.sleep(60)
            raise RecoverableRolloutError("too late")
        await asyncio.sleep(9)
        return sample(prompt)

    outcome = run(rollout, rows=40, data={"shuffle": False})
    assert outcome.ledger["trained"] == 40
    assert outcome.seconds > 100
    assert calls == 1


def test_rollouts_that_all_ignore_their_cancellation_are_an_outage() -> None:
    async def rollout(prompt: Prompt) -> None:
        for _ in range(2):  # the time limit; the end of the loop ends it
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1e6)

    with pytest.raises(BreakerOpen, match="it ignores its cancellation"):
        run(rollout, rows=100)


def test_an_unknown_exception_ends_the_run_with_the_prompt_and_the_users_traceback() -> None:
    def buggy_reward(text: str) -> float:
        return float(text)

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(prompt.index)
        buggy_reward("x" if prompt.index == 5 else "1")
        return sample(prompt)

    with pytest.raises(RolloutFailed) as caught:
        run(rollout)
    message = str(caught.value)
    assert "row 5 (epoch 0), rollout" in message
    assert "in buggy_reward" in message
    assert "ValueError: could not convert string to float: 'x'" in message
    assert "rollout.on_error='drop'" in message


@pytest.mark.parametrize("forgets", [True, False])
def test_a_function_that_returns_nothing_but_none_is_told_of(forgets: bool) -> None:
    async def rollout(prompt: Prompt) -> RolloutSample | None:
        await asyncio.sleep(0.1)
        return None if forgets or prompt.rollout_index else sample(prompt)

    with capture_logs() as logs:
        run(rollout, rows=40)
    assert [entry["event"] for entry in logs if "None" in entry["event"]] == [
        "the rollout function has returned None 50 times, and nothing else"
    ] * forgets


def test_what_the_function_asked_for_wrongly_comes_with_its_traceback_and_is_no_sample() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await prompt.policy.generate([])
        return sample(prompt)

    with pytest.raises(RolloutFailed, match="in rollout") as caught:
        run(rollout)
    assert "called with no tokens" in str(caught.value)
    assert "returned a sample" not in str(caught.value)


def test_unknown_exceptions_can_be_dropped_on_a_budget() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(0.1)
        if prompt.rng.random() < 0.1:
            raise ZeroDivisionError
        return sample(prompt)

    settings = {"timeout_s": 10.0, "on_error": "drop", "retries": 0}
    outcome = run(rollout, rows=30, rollout=settings)
    assert 0 < total(outcome, "members_failed") < 30
    with pytest.raises(RolloutFailed, match=r"rollout\.error_budget is used up"):
        run(rollout, rows=30, rollout={**settings, "error_budget": 2})


def test_garbage_ends_the_run_with_what_was_expected() -> None:
    async def rollout(prompt: Prompt) -> str:
        return "42"

    with pytest.raises(RolloutFailed, match=r"(?s)row \d.*returned a str. Expected a RolloutSample"):
        run(rollout)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()])
def test_what_a_rollout_should_not_raise_does_not_end_the_process(error: BaseException) -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(1)
        raise error

    with pytest.raises(RolloutFailed, match=r"SystemExit|nobody had cancelled it"):
        run(rollout)


def test_an_outage_opens_the_breaker() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(0.1)
        raise ConnectionRefusedError("port 8000")

    with pytest.raises(BreakerOpen, match=r"5 rollouts in a row failed.*ConnectionRefusedError: port 8000"):
        run(rollout)


def test_groups_are_trained_oldest_first_and_whole() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(5.0 if prompt.index == 0 else 0.5)
        return sample(prompt)

    for policy in ("wait", "pace"):
        outcome = run(
            rollout,
            rows=20,
            data={"shuffle": False},
            staleness={"policy": policy, "max_staleness": 3},
            concurrency={"min_window": 16, "max_window": 16},
        )
        assert outcome.ledger["trained"] == 20
        assert {record["samples"] for record in outcome.records} == {8.0}


def test_chunks_train_before_the_batch_is_full() -> None:
    """Two groups of 1 s, two of 3 s: with two chunks the first is trained at 1 s, while the others still roll out."""

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(1.0 if prompt.index < 2 else 3.0)
        return sample(prompt)

    def trained_at(chunks: int) -> list[float]:
        from asyncrl.testing import simulation

        times: list[float] = []

        class Watching(simulation.CountingTrainer):
            async def forward_backward(self, sequences: Any) -> None:
                times.append(asyncio.get_running_loop().time())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulation, "CountingTrainer", Watching)
            run(
                rollout,
                rows=4,
                data={"shuffle": False},
                prompt_groups_per_step=4,
                pipeline_chunks_per_step=chunks,
                concurrency={"min_window": 16, "max_window": 16},
            )
        return times

    assert trained_at(1) == [3.0]
    assert trained_at(2) == [1.0, 3.0]


def test_a_run_with_several_segments_is_one_member() -> None:
    async def rollout(prompt: Prompt) -> RolloutRun:
        one = sample(prompt)
        return RolloutRun([one, one, one])

    outcome = run(rollout, rows=4)
    assert total(outcome, "samples") == 4 * 4 * 3
    assert outcome.ledger["trained"] == 4


def test_the_last_partial_batch_is_trained() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        return sample(prompt)

    outcome = run(rollout, rows=5)
    assert (outcome.steps, outcome.ledger["trained"]) == (3, 5)
    assert outcome.records[-1]["groups_trained"] == 1


def test_max_steps_begins_no_group_that_could_not_be_trained() -> None:
    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(1)
        return sample(prompt)

    outcome = run(rollout, rows=100, max_steps=3)
    assert (outcome.steps, outcome.ledger) == (
        3,
        {"admitted": 6, "trained": 6, "filtered": 0, "rejected": 0, "pending": 0, "requeued": 0},
    )


def test_members_use_every_free_slot() -> None:
    """Slots are given out by member: 6 slots hold one and a half groups of 4."""

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(1)
        return sample(prompt)

    outcome = run(rollout, rows=6, concurrency={"min_window": 6, "max_window": 6}, staleness={"max_staleness": 8})
    assert outcome.peak_in_flight == 6
    assert outcome.seconds == pytest.approx(24 / 6 + 0.1, abs=0.35)
