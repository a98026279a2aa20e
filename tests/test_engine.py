"""The loop's own failures: publication, canary, stalls, stops. Virtual time, fake ends."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from typing import Any

import pytest

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.engine import Engine
from asyncrl.errors import CanaryError, EngineError, SamplerError, SamplerRequestError, StallError, TrainerError
from asyncrl.rollout.scheduler import RolloutFn
from asyncrl.step_record import Record
from asyncrl.storage.ledger import Entry, Ledger
from asyncrl.testing.clock import Deadlock, run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import Load, RolloutSample, SampleRequest, SamplingParams, StepResult, TrainSequence, Weights


async def rollout(prompt: Prompt) -> RolloutSample:
    completion = await prompt.policy.generate([1], max_tokens=2)
    return RolloutSample.from_completion([1], completion, reward=float(prompt.rollout_index))


def engine_of(
    sampler: ScriptedSampler, trainer: CountingTrainer, rows: int = 40, work: RolloutFn = rollout, **settings: Any
) -> Engine:
    defaults: dict[str, Any] = {
        "model": "none",
        "completions_per_prompt": 2,
        "prompt_groups_per_step": 2,
        "staleness": {"max_staleness": 1},
        "concurrency": {"min_window": 8, "max_window": 8},
    }
    config = Config(**(defaults | settings))
    context = PolicyContext(sampler, params=SamplingParams(4), max_seq_len=64, load_tokenizer=lambda: None)
    return assemble(
        config,
        work,
        [{"row": row} for row in range(rows)],
        sampler=sampler,
        trainer=trainer,
        make_policy=lambda session, version: Policy(context, session, version),
        on_step=lambda record, batch: None,
        canary_tolerance=1e-3,
    )


def slow(request: object) -> float:
    return 1.0


def test_every_step_is_published_and_overlaps_with_the_next() -> None:
    sampler = ScriptedSampler(latency_s=slow, publish_s=lambda: 2.0)
    trainer = CountingTrainer(step_s=lambda: 2.0)

    async def main() -> float:
        engine = engine_of(sampler, trainer, rows=16, staleness={"max_staleness": 4})
        await engine.run()
        return asyncio.get_running_loop().time()

    seconds = run_virtual(main())
    assert sampler.published == list(range(1, 9))
    assert seconds < 8 * 2 + 2 + 2, "8 steps of 2 s, and one rollout and one hot-load that nothing hides"


def test_the_interval_is_kept_and_the_last_step_is_published_too() -> None:
    sampler = ScriptedSampler(latency_s=slow)
    run_virtual(engine_of(sampler, CountingTrainer(), rows=14, publish={"weight_sync_interval": 2}).run())
    assert sampler.published == [2, 4, 6, 7]


def test_an_interval_of_zero_never_publishes() -> None:
    sampler = ScriptedSampler(latency_s=slow)
    trainer = CountingTrainer()
    run_virtual(
        engine_of(
            sampler, trainer, publish={"weight_sync_interval": 0}, staleness={"policy": "pace", "max_staleness": 2}
        ).run()
    )
    assert sampler.published == []
    assert trainer.step == 20


class Drifting(ScriptedSampler):
    """Its weights do not arrive: from version 3 on it scores as if it had others."""

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        return [-math.log(2.0) - (0.5 if version >= 3 else 0.0)] * (len(token_ids) - start)


def test_the_canary_stops_a_run_whose_weights_did_not_arrive() -> None:
    trainer = CountingTrainer(probe=True)
    with pytest.raises(CanaryError, match=r"disagree about version 3: .*-1.19315 in the sampler and -0.69315 in the"):
        run_virtual(engine_of(Drifting(latency_s=slow), trainer).run())
    assert trainer.step <= 5


class Unloadable(ScriptedSampler):
    async def publish(self, weights: Weights) -> None:
        raise SamplerError("replica 0 died with exit code 9")


def test_a_failed_hot_load_ends_the_run_at_once() -> None:
    with pytest.raises(SamplerError, match="replica 0 died"):
        run_virtual(engine_of(Unloadable(latency_s=slow), CountingTrainer(), staleness={"max_staleness": 9}).run())


def test_a_hot_load_that_hangs_ends_at_its_limit() -> None:
    sampler = ScriptedSampler(latency_s=slow, publish_s=lambda: 1e9)
    with pytest.raises(EngineError, match=r"version 1 took longer than publish\.timeout_s=600 s"):
        run_virtual(engine_of(sampler, CountingTrainer()).run())


class Exploding(CountingTrainer):
    async def optim_step(self) -> StepResult:
        if self.step == 2:
            raise TrainerError("out of memory")
        return await super().optim_step()


def test_a_trainer_error_comes_out_as_it_is() -> None:
    with pytest.raises(TrainerError, match="out of memory"):
        run_virtual(engine_of(ScriptedSampler(latency_s=slow), Exploding()).run())


class Deaf(ScriptedSampler):
    """Has no metrics to give."""

    async def load(self) -> Load:
        raise SamplerRequestError("metrics are off")


def test_without_metrics_a_run_goes_on_and_its_window_does_not_grow() -> None:
    engine = engine_of(
        Deaf(latency_s=slow),
        CountingTrainer(),
        concurrency={"initial_window": 3},
        staleness={"max_staleness": 9},
    )
    run_virtual(engine.run())
    assert engine.slots.window_size == 3
    assert engine.ledger.ends["trained"] == 40


class Stuck(CountingTrainer):
    async def forward_backward(self, sequences: Sequence[TrainSequence]) -> None:
        await asyncio.sleep(math.inf if self.step == 3 else 0.1)


def test_a_stall_names_who_waits_for_what() -> None:
    with pytest.raises(StallError) as caught:
        run_virtual(engine_of(ScriptedSampler(latency_s=slow), Stuck()).run())
    message = str(caught.value)
    assert "nothing has moved for stall_timeout_s=1800 s" in message
    assert "engine: training step 4: 4 sequences forward and backward, for 18" in message
    assert "staleness budget: 0 of 4 groups free" in message


def test_rollouts_that_are_drawn_again_are_no_standstill() -> None:
    """Each try has `rollout.timeout_s`, and `stall_timeout_s` is above that: not above all tries together."""

    async def hangs(prompt: Prompt) -> None:
        await asyncio.sleep(1e6)

    engine = engine_of(
        ScriptedSampler(),
        CountingTrainer(),
        rows=1,
        work=hangs,
        rollout={"timeout_s": 10.0, "retries": 3},
        stall_timeout_s=15.0,
    )
    run_virtual(engine.run())
    assert engine.ledger.ends["rejected"] == 1


def test_a_stop_during_training_ends_cleanly() -> None:
    sampler, trainer = ScriptedSampler(latency_s=slow), CountingTrainer(step_s=lambda: 3.0)

    async def main() -> Engine:
        engine = engine_of(sampler, trainer, rows=400)
        asyncio.get_running_loop().call_later(10.0, engine.stop)
        await engine.run()
        return engine

    engine = run_virtual(main())
    assert 0 < engine.step < 10
    assert sampler.published[-1] == engine.step, "what was trained is published"
    engine.ledger.close()
    assert engine.ledger.ends["trained"] == 2 * engine.step


def test_a_true_deadlock_is_seen_in_virtual_time() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        run_virtual(main())


async def nobody_is_better(prompt: Prompt) -> RolloutSample:
    completion = await prompt.policy.generate([1], max_tokens=2)
    return RolloutSample.from_completion([1], completion, reward=float(prompt.index > 20 and prompt.rollout_index))


def test_a_batch_without_signal_is_no_step_and_leaves_no_record() -> None:
    steps: list[float] = []
    trainer = CountingTrainer()
    engine = engine_of(
        ScriptedSampler(latency_s=slow),
        trainer,
        work=nobody_is_better,
        on_filtered="drop",
        data={"shuffle": False},
    )
    engine.on_step = lambda record, batch: steps.append(record["step"])
    run_virtual(engine.run())
    assert steps == list(range(1, trainer.step + 1))
    assert engine.ledger.summary()["filtered"] == 21
    assert engine.ledger.summary()["trained"] == 19


def test_what_was_drawn_before_training_is_of_no_step() -> None:
    """An evaluation before training, or another run on the same servers."""
    records: list[Record] = []

    async def work() -> None:
        sampler = ScriptedSampler(latency_s=slow)
        for _ in range(20):
            await sampler.generate(SampleRequest([1], SamplingParams(4)))
        engine = engine_of(sampler, CountingTrainer(), rows=8)
        engine.on_step = lambda record, batch: records.append(record)
        await engine.run()

    run_virtual(work())
    assert sum(record["tokens_generated"] for record in records) <= 8 * 2 * 2
    assert records[0]["tokens_generated"] > 0


class Full:
    """The store of a ledger whose disk takes admissions and nothing else."""

    position = life = 0

    def write(self, entry: Entry) -> None:
        if entry[6] != "admitted":
            raise EngineError("the ledger cannot be written")

    async def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


def test_a_ledger_that_fails_while_a_rollout_is_left_behind_ends_the_run() -> None:
    """The last rollout of its group ignores its cancellation: nobody but the sweeper hears of it."""

    async def stubborn(prompt: Prompt) -> None:
        for _ in range(2):  # the time limit; the end of the loop ends it
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1e6)

    engine = engine_of(ScriptedSampler(), CountingTrainer(), rows=1, work=stubborn, rollout={"timeout_s": 10.0})
    engine.ledger = engine.scheduler.ledger = Ledger(Full())
    with pytest.raises(EngineError, match="the ledger cannot be written"):
        run_virtual(engine.run())
