"""Records of the rollout side, by hand and through the real scheduler in virtual time."""

from __future__ import annotations

import asyncio
import math
from array import array
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.errors import RecoverableRolloutError
from asyncrl.metrics.producer import Producer, attempt_numbers
from asyncrl.metrics.rewind import rewind
from asyncrl.rollout.counts import Counts
from asyncrl.storage.timeline import (
    ATTEMPT,
    ATTEMPT_TYPE,
    CALL_TYPE,
    CUT_OFF,
    DONE,
    DROPPED,
    FAILED,
    TIMED_OUT,
    Timeline,
)
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import RolloutSample, SamplingParams


def attempts(*rows: dict[str, float]) -> np.ndarray:
    """Rows of a timeline; what is not given is 0."""
    return np.array([tuple(row.get(name, 0.0) for name in ATTEMPT) for row in rows], ATTEMPT_TYPE)


def calls(*rows: tuple[float, int]) -> np.ndarray:
    """Calls, each by the tokens it drew and their version."""
    return np.array([(0.0, 1.0, 10.0, drawn, version) for drawn, version in rows], CALL_TYPE)


NONE = calls()


class TestByHand:
    def test_rollouts_that_are_done(self) -> None:
        found = attempt_numbers(
            attempts(
                {"admitted": 0, "began": 1, "ended": 3, "reward": 0.0, "turns": 1, "model_s": 1, "tokens": 10},
                {"admitted": 0, "began": 3, "ended": 9, "reward": 1.0, "turns": 3, "model_s": 1, "tokens": 30},
                {"admitted": 0, "began": 50, "ended": 54, "reward": 0.5, "turns": 2, "model_s": 4, "attempt": 1},
            ),
            calls((4, 7), (1, 6), (1, 6), (2, 7), (3, 7), (1, 5)),
            step=8,
        )
        assert found["rollout_reward_mean"] == 0.5
        assert found["rollout_reward_std"] == pytest.approx(math.sqrt(1 / 6))
        assert (found["rollout_mean_s"], found["rollout_p50_s"], found["rollout_max_s"]) == (4, 4, 6)
        assert found["rollout_p95_s"] == pytest.approx(5.8)
        assert found["rollout_queue_s"] == 2, "that of an attempt after the first is a pause, and no queue"
        assert found["rollout_model_share"] == pytest.approx(0.5)
        assert (found["rollout_turns_mean"], found["rollout_turns_max"]) == (2, 3)
        assert (found["rollout_tokens_mean"], found["rollout_tokens_max"]) == (pytest.approx(40 / 3), 30)
        assert found["drawn_tokens"] == 12
        assert found["rollout_lag_mean"] == pytest.approx(8 - (9 * 7 + 2 * 6 + 5) / 12)

    def test_others_are_counted_and_measured_by_nothing(self) -> None:
        rows = [{"outcome": outcome, "ended": 100.0} for outcome in (DROPPED, FAILED, FAILED, TIMED_OUT, CUT_OFF)]
        found = attempt_numbers(attempts({"outcome": DONE, "ended": 1.0}, *rows), NONE, step=0)
        assert found["rollout_max_s"] == 1
        assert found["rollout_attempts_dropped"] == 1
        assert found["rollout_attempts_failed"] == 2
        assert found["rollout_attempts_timed_out"] == 1

    def test_evaluations_are_left_out_with_their_calls(self) -> None:
        found = attempt_numbers(
            attempts(
                {"turns": 2, "reward": 9.0, "evaluation": 1 + 3},
                {"turns": 1, "reward": 0.5},
                {"turns": 1, "outcome": CUT_OFF},
            ),
            calls((100, 3), (100, 3), (4, 5), (100, 3)),
            step=6,
        )
        assert found["rollout_reward_mean"] == 0.5
        assert found["drawn_tokens"] == 4
        assert found["rollout_lag_mean"] == 1

    def test_nothing_is_no_number(self) -> None:
        found = attempt_numbers(attempts({"outcome": FAILED}), NONE, step=3)
        assert found["rollout_attempts_failed"] == 1
        assert math.isnan(found["rollout_mean_s"])
        assert math.isnan(found["rollout_lag_mean"])


class TestWhenThereIsARecord:
    @staticmethod
    def producer(counts: Counts, written: list[Any], before: int = 0) -> Producer:
        """`before`: rollouts of an earlier life, four a second."""

        def gauges() -> dict[str, float]:
            standing = {"step": 2, "published": 1, "in_flight": 5, "queue_groups": 1}
            return {**standing, "rollouts_finished": before + counts.rollouts}

        return Producer(
            groups=4,
            counts=counts,
            gauges=gauges,
            elapsed_s=lambda: (before + counts.rollouts) / 4,
            write=written.append,
        )

    @staticmethod
    def ended(counts: Counts, groups: int, **more: int) -> tuple[bytearray, array[float]]:
        counts.groups += groups
        counts.rollouts += 2 * groups
        for name, number in more.items():
            setattr(counts, name, getattr(counts, name) + number)
        rows = attempts(*[{"ended": 1.0, "reward": 1.0}] * 2 * groups)
        return bytearray(rows.tobytes()), array("d")

    def test_groups_for_a_step_make_one(self) -> None:
        counts, written = Counts(), []
        producer = self.producer(counts, written)
        producer.take(*self.ended(counts, 3, filtered=1))
        assert written == []
        producer.take(*self.ended(counts, 2, filtered=1, rejected=1))
        (record,) = written
        assert record["rollout_groups"] == 5
        assert (record["rollout_groups_filtered"], record["rollout_groups_rejected"]) == (2, 1)
        assert (record["rollouts_ended"], record["rollout_step"], record["rollout_version"]) == (10, 3, 1)
        assert record["rollout_rate_per_s"] == pytest.approx(10 / 2.5)
        producer.take(*self.ended(counts, 4))
        assert written[1]["rollout_groups"] == 4
        assert written[1]["rollouts_ended"] == 18
        assert written[1]["rollout_rate_per_s"] == pytest.approx(8 / 2.0)

    def test_the_rest_comes_at_the_end_once(self) -> None:
        counts, written = Counts(), []
        producer = self.producer(counts, written)
        producer.take(*self.ended(counts, 2))
        producer.close()
        producer.close()
        assert [record["rollout_groups"] for record in written] == [2]

    def test_a_run_that_goes_on(self) -> None:
        """What earlier lives did is in the axis, and in no rate."""
        counts, written = Counts(), []
        self.producer(counts, written, before=640).take(*self.ended(counts, 4))
        assert (written[0]["rollouts_ended"], written[0]["rollout_time_s"]) == (648, 162.0)
        assert written[0]["rollout_rate_per_s"] == pytest.approx(4)

    def test_one_a_second_is_the_most(self) -> None:
        counts, written, elapsed = Counts(), [], iter([0.0, 0.5, 0.75, 1.0, 1.0])
        gauges = {"step": 0, "published": 0, "in_flight": 0, "queue_groups": 0, "rollouts_finished": 0}
        producer = Producer(
            groups=1, counts=counts, gauges=lambda: gauges, elapsed_s=lambda: next(elapsed), write=written.append
        )
        for _ in range(3):
            producer.take(*self.ended(counts, 1))
        assert [record["rollout_groups"] for record in written] == [3]

    def test_what_was_undone_is_taken_back(self, tmp_path: Path) -> None:
        """A record is of the step that was under way when it was made."""
        path = tmp_path / "producer.jsonl"
        lines = [f'{{"rollouts_ended": {32 * step}, "rollout_step": {step}}}\n' for step in (1, 2, 3)]
        path.write_text("".join(lines))
        rewind(tmp_path, 2)
        assert path.read_text() == "".join(lines[:2])


class TestCounts:
    def test_what_has_happened_since(self) -> None:
        counts = Counts(rollouts=5, reward_sum=2.5, reward_count=5)
        before = replace(counts)
        counts.rollouts += 2
        counts.reward_sum += 1.0
        assert counts.since(before) == Counts(rollouts=2, reward_sum=1.0)


def test_a_simulated_run(tmp_path: Path) -> None:
    """100 rollouts of a second each at a time, every tenth of which fails once: the records add up to the run."""
    config = Config(
        model="m",
        completions_per_prompt=5,
        prompt_groups_per_step=4,
        staleness={"max_staleness": 4},
        concurrency={"min_window": 100, "max_window": 100},
    )
    written: list[dict[str, float]] = []
    failed = set()

    async def rollout(prompt: Any) -> RolloutSample:
        drawn = await prompt.policy.generate([0], max_tokens=1)
        await asyncio.sleep(1.0)
        member = (prompt.index, prompt.rollout_index)
        if sum(member) % 10 == 0 and member not in failed:
            failed.add(member)
            raise RecoverableRolloutError("once")
        return RolloutSample(
            [0, *drawn.tokens], [0.0, *drawn.logprobs], [0, 1], prompt.rng.random(), [0, *drawn.versions]
        )

    async def run() -> Any:
        sampler = ScriptedSampler()
        context = PolicyContext(
            sampler, params=SamplingParams(max_tokens=1), max_seq_len=64, load_tokenizer=lambda: None
        )
        async with sampler, CountingTrainer(step_s=lambda: 0.2) as trainer:
            engine = assemble(
                config,
                rollout,
                [{"row": row} for row in range(200)],
                sampler=sampler,
                trainer=trainer,
                make_policy=lambda session, version: Policy(context, session, version),
                on_step=lambda record, batch: None,
                timeline=Timeline(None),
            )
            producer = Producer(
                groups=config.prompt_groups_per_step,
                counts=engine.scheduler.counts,
                gauges=engine.account.gauges,
                elapsed_s=engine.elapsed_s,
                write=written.append,
            )
            assert engine.timeline is not None
            engine.timeline.on_flush = producer.take
            await engine.run()
            engine.timeline.flush()
            producer.close()
            return engine

    engine = run_virtual(run())
    assert sum(record["rollout_groups"] for record in written) == 200
    assert sum(record["rollout_attempts_failed"] for record in written) == len(failed) > 0
    assert written[-1]["rollouts_ended"] == engine.scheduler.finished_rollouts == 1000
    times = [record["rollout_time_s"] for record in written]
    assert all(later - earlier >= 0.999 for earlier, later in pairwise(times[:-1]))
    assert [record["rollout_mean_s"] for record in written] == pytest.approx([1.0] * len(written))
    steps = [record["rollout_step"] for record in written]
    assert steps == sorted(steps)
    lags = [record["rollout_lag_mean"] for record in written]
    assert 0 <= min(lags) <= max(lags) <= 4 + 1, "trained at a staleness of 4, one step may have been taken since"
