"""Evaluations before, beside and after training, in virtual time: the engine is the real one, the ends are fakes."""

from __future__ import annotations

import asyncio
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from structlog.testing import capture_logs

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config
from asyncrl.data import Prompt
from asyncrl.engine import Engine
from asyncrl.errors import BreakerOpen, ConfigError, EvaluationFailed, RolloutFailed, SamplerError
from asyncrl.rollout.contract import Contract
from asyncrl.rollout.estimate import EvalResult
from asyncrl.rollout.evaluation import Evaluator
from asyncrl.rollout.evaluations import Evaluated, Evaluation, Evaluations, evaluation_function
from asyncrl.rollout.limited import call
from asyncrl.step_record import Record
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import RolloutSample, SamplingParams

ROWS = [{"row": row} for row in range(2000)]
HELD_OUT = ROWS[:12]
WINDOW = 32


@dataclass
class Scene:
    """A run with evaluations, and what was seen of it."""

    config: Config
    evaluation_s: float = 1.0
    keep_versions: int | None = 2
    fails: Callable[[Prompt], BaseException | None] = lambda prompt: None
    function: Any = None
    stop_after_s: float | None = None

    drawn: list[tuple[bool, int]] = field(default_factory=list)
    """(of an evaluation, version that drew it), turn by turn."""
    in_flight: list[tuple[int, int]] = field(default_factory=list)
    """(of training, of evaluation) whenever one begins."""
    records: list[Record] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    done: list[Evaluated] = field(default_factory=list)
    after: Evaluated | None = None
    seconds: float = 0.0
    running: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def run(self) -> Scene:
        run_virtual(self._run())
        return self

    async def rollout(self, prompt: Prompt) -> RolloutSample:
        """Three turns. An evaluation's outlives the versions that the sampler keeps."""
        self.running[prompt.evaluation] += 1
        self.in_flight.append((self.running[False], self.running[True]))
        try:
            error = self.fails(prompt)
            if error is not None:
                raise error
            tokens, versions = [0], [0]
            for _ in range(3):
                drawn = await prompt.policy.generate(tokens, max_tokens=1)
                await asyncio.sleep((self.evaluation_s if prompt.evaluation else 1.0) / 3)
                tokens += drawn.tokens
                versions += drawn.versions
                self.drawn.append((prompt.evaluation, drawn.versions[0]))
            return RolloutSample(tokens, [-math.log(2)] * 4, [0, 1, 1, 1], prompt.rng.random(), versions)
        finally:
            self.running[prompt.evaluation] -= 1

    async def _run(self) -> None:
        sampler = ScriptedSampler(keep_versions=self.keep_versions, publish_s=lambda: 0.01)
        context = PolicyContext(
            sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=lambda: None
        )

        def make_policy(session: str, version: int | None) -> Policy:
            return Policy(context, session, version)

        engine = assemble(
            self.config,
            self.rollout,
            ROWS,
            sampler=sampler,
            trainer=CountingTrainer(step_s=lambda: 0.2),
            make_policy=make_policy,
            on_step=lambda record, batch: self.records.append(record),
        )
        evaluations = self._evaluations(engine, make_policy, sampler)
        engine.on_published = evaluations.published
        if self.stop_after_s is not None:
            asyncio.get_running_loop().call_later(self.stop_after_s, lambda: (evaluations.cancel(), engine.stop()))
        try:
            async with evaluations:
                await evaluations.before()
                try:
                    await engine.run()
                finally:
                    evaluations.training_is_over()
                self.after = None if self.stop_after_s else await evaluations.after()
        finally:
            self.done, self.skipped, self.given_up = evaluations.done, evaluations.skipped, evaluations.given_up
            self.best = evaluations.best
            self.seconds = asyncio.get_running_loop().time()
            assert evaluations.gauges() == {}
            assert self.running == {True: 0, False: 0}

    def _evaluations(self, engine: Engine, make_policy: Any, sampler: ScriptedSampler) -> Evaluations:
        return Evaluations(
            function=self.function or evaluation_function(HELD_OUT, None, self.config.evaluation),
            evaluator=Evaluator(self.rollout, make_policy, Contract(), self.config.rollout, seed=0),
            sampler=sampler,
            guests=engine.scheduler.guests,
            interval=self.config.evaluation.interval,
            alone=16,
            limit_s=self.config.stall_timeout_s,
            on_result=lambda evaluated: self.said.append(str(evaluated)),
            report=self.said.append,
            fail=engine.scheduler.fail,
        )


def config(**settings: Any) -> Config:
    return Config(
        **{
            "model": "none",
            "max_steps": 40,
            "prompt_groups_per_step": 4,
            "concurrency": {"min_window": WINDOW, "max_window": WINDOW},
            "evaluation": {"interval": 10},
            "publish": {"canary": False},
        }
        | settings
    )


class TestBesideTraining:
    def test_each_evaluation_draws_from_one_version(self) -> None:
        """Rollouts of an evaluation take far longer than the sampler keeps a version that nobody holds."""
        scene = Scene(config(), evaluation_s=1.2).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 10, 20, 30, 40]
        assert all(evaluated.newest_version == evaluated.version for evaluated in scene.done)
        drawn = [version for evaluation, version in scene.drawn if evaluation]
        assert {version: drawn.count(version) for version in set(drawn)} == dict.fromkeys(
            [0, 10, 20, 30, 40], 3 * len(HELD_OUT)
        )
        assert (scene.skipped, scene.given_up) == (0, 0)
        assert all(evaluated.result is not None and evaluated.result.n == 12 for evaluated in scene.done)
        assert scene.after is scene.done[-1]

    def test_training_goes_on_at_nearly_its_pace(self) -> None:
        """An eighth of the window is what evaluations cost, and rollouts of both run at the same time."""
        without, beside = Scene(config(evaluation={})).run(), Scene(config()).run()
        assert [evaluated.version for evaluated in without.done] == [0, 40]
        assert len(beside.done) == 5
        assert beside.records[-1]["time_s"] < without.records[-1]["time_s"] * (1 + 1 / 8) * 1.05
        together = [pair for pair in beside.in_flight if all(pair)]
        assert together
        assert max(training + evaluation for training, evaluation in together) <= WINDOW
        assert max(evaluation for _, evaluation in together) == WINDOW // 8

    def test_concurrency_is_the_share(self) -> None:
        scene = Scene(config(evaluation={"interval": 10, "concurrency": 12})).run()
        assert max(evaluation for training, evaluation in scene.in_flight if training) == 12

    def test_a_window_of_one_is_shared_in_turns(self) -> None:
        one = config(concurrency={"min_window": 1, "max_window": 1}, max_steps=12)
        scene = Scene(one).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 10, 12]
        assert max(sum(pair) for pair in scene.in_flight if pair[0]) == 1

    def test_one_that_is_due_while_another_runs_is_skipped_and_said(self) -> None:
        scene = Scene(config(), evaluation_s=15.0).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 10, 40]
        assert scene.skipped == 3
        assert next(line for line in scene.said if "is not evaluated" in line).startswith("version 20 is not evaluated")
        assert sum("is not evaluated" in line for line in scene.said) == 1, "said once, counted always"

    def test_publications_further_apart_than_the_interval(self) -> None:
        rare = config(publish={"canary": False, "weight_sync_interval": 4}, evaluation={"interval": 3}, max_steps=16)
        scene = Scene(rare, evaluation_s=0.01).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 4, 8, 12, 16]

    def test_a_sampler_with_one_version_says_which_took_part(self) -> None:
        scene = Scene(config(), keep_versions=1).run()
        assert [evaluated.version for evaluated in scene.done][:2] == [0, 10]
        spans = [evaluated.newest_version - evaluated.version for evaluated in scene.done]
        assert spans[0] == spans[-1] == 0, "nothing is published before and after training"
        assert min(spans[1:-1]) > 0
        assert scene.done[1].record()["eval_version_newest"] == 10 + spans[1]
        assert any(f"steps 10 to {10 + spans[1]} (this sampler holds one version at a time)" in s for s in scene.said)

    def test_the_best_is_the_first_of_the_highest(self) -> None:
        scene = Scene(config()).run()
        means = [evaluated.result.mean for evaluated in scene.done if evaluated.result]
        assert scene.best is not None
        assert scene.best.reward is not None
        assert scene.best.reward.mean == max(means)


class TestEnds:
    def test_a_stop_ends_it(self) -> None:
        """Ctrl-C: an evaluation of an hour does not hold the run up."""
        patient = config(rollout={"timeout_s": 4000.0}, stall_timeout_s=5000.0, max_steps=400)
        scene = Scene(patient, evaluation_s=3600.0, stop_after_s=3600.0 + 60.0).run()
        assert [evaluated.version for evaluated in scene.done] == [0]
        assert 10 <= len(scene.records) < 400
        assert scene.seconds < 3600 + 70

    def test_training_that_fails_ends_it(self) -> None:
        def fails(prompt: Prompt) -> BaseException | None:
            return KeyError("tool") if not prompt.evaluation and len(scene.records) >= 15 else None

        scene = Scene(config(rollout={"timeout_s": 4000.0}, stall_timeout_s=5000.0), fails=fails, evaluation_s=30.0)
        with pytest.raises(RolloutFailed, match="KeyError: 'tool'"):
            scene.run()
        assert [evaluated.version for evaluated in scene.done] == [0]

    def test_what_runs_when_training_ends_is_awaited_with_the_sampler_for_itself(self) -> None:
        """All 12 rollouts fit beside each other then."""
        scene = Scene(config(max_steps=12), evaluation_s=5.0).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 10, 12]
        assert max(evaluation for training, evaluation in scene.in_flight if not training) == 12
        assert scene.done[1].seconds < 3 * 5.0, "in its share alone it takes three rounds"

    def test_the_version_that_training_ends_with_is_measured_once(self) -> None:
        scene = Scene(config(max_steps=20), evaluation_s=5.0).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 10, 20]


class TestFailures:
    def test_an_outage_is_reported_and_training_goes_on(self) -> None:
        def fails(prompt: Prompt) -> BaseException | None:
            return ConnectionError("judge") if prompt.evaluation and prompt.policy.version == 20 else None

        scene = Scene(config(), fails=fails).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 10, 30, 40]
        assert scene.given_up == 1
        assert any("training goes on: 5 rollouts in a row failed in the evaluation" in line for line in scene.said)
        assert len(scene.records) == 40

    def test_what_would_end_training_ends_the_run(self) -> None:
        def fails(prompt: Prompt) -> BaseException | None:
            return KeyError("answer") if prompt.evaluation and prompt.policy.version == 20 else None

        scene = Scene(config(), fails=fails)
        with pytest.raises(RolloutFailed, match=r"(?s)row \d+ of the evaluation failed.*KeyError: 'answer'"):
            scene.run()
        assert 20 <= len(scene.records) < 40
        forgiving = Scene(config(rollout={"on_error": "drop", "retries": 0}), fails=fails).run()
        assert len(forgiving.records) == 40
        assert forgiving.given_up == 1

    def test_a_failure_after_training_is_raised(self) -> None:
        def fails(prompt: Prompt) -> BaseException | None:
            return SamplerError("gone") if prompt.evaluation and prompt.policy.version == 12 else None

        scene = Scene(config(max_steps=12), fails=fails)
        with pytest.raises(SamplerError, match="gone"):
            scene.run()
        assert len(scene.records) == 12

    def test_failures_that_pass_are_drawn_again(self) -> None:
        tried: list[tuple[int, int]] = []

        def fails(prompt: Prompt) -> BaseException | None:
            if not prompt.evaluation:
                return None
            place = (prompt.policy.version, prompt.index)
            tried.append(place)
            return ConnectionError("once") if tried.count(place) == 1 and prompt.index % 4 == 0 else None

        scene = Scene(config(max_steps=10), fails=fails).run()
        assert [(e.result.n, e.result.failed) for e in scene.done if e.result] == [(12, 0), (12, 0)]


class TestFunctions:
    def test_a_function_of_ones_own(self) -> None:
        seen: list[int] = []

        async def measure(evaluation: Evaluation) -> Mapping[str, float]:
            few = await evaluation.rollouts(HELD_OUT[:3], samples=2)
            drawn = await evaluation.policy.generate([1, 2])
            assert set(drawn.versions) == {evaluation.version}
            seen.append(evaluation.version)
            return {"mean": few.mean, "rollouts_seen": evaluation.done}

        scene = Scene(config(), function=measure).run()
        assert seen == [0, 10, 20, 30, 40]
        assert scene.done[2].record()["eval_version"] == 20
        assert scene.done[2].record()["eval_rollouts_seen"] == 6
        assert scene.best is None
        assert scene.said[0].startswith("evaluation at step 0: mean 0.")

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda: 1 / 0, r"(?s)the evaluation function failed at version 10:.*ZeroDivisionError"),
            (lambda: sys.exit(3), r"(?s)the evaluation function failed at version 10:.*SystemExit: 3"),
            (lambda: [1, 2], r"the evaluation function returned \[1, 2\]. Expected"),
            (lambda: {"mean": "high"}, r"Expected .* a dict from names to numbers"),
        ],
    )
    def test_one_that_fails_beside_training_does_not_end_it(self, wrong: Callable[[], Any], message: str) -> None:
        async def measure(evaluation: Evaluation) -> Any:
            return wrong() if evaluation.version == 10 else {"mean": 1.0}

        scene = Scene(config(), function=measure).run()
        assert [evaluated.version for evaluated in scene.done] == [0, 20, 30, 40]
        assert scene.given_up == 1
        assert any(re.search(message, line) for line in scene.said)

    def test_one_that_fails_at_once_ends_the_run_before_it_begins(self) -> None:
        async def measure(evaluation: Evaluation) -> Any:
            raise KeyError("rows")

        scene = Scene(config(), function=measure)
        with pytest.raises(EvaluationFailed, match="KeyError: 'rows'"):
            scene.run()
        assert scene.records == []

    def test_one_that_hangs_has_a_limit_and_a_name(self) -> None:
        async def measure(evaluation: Evaluation) -> Any:
            if evaluation.version == 10:
                await evaluation.rollouts(HELD_OUT)
                await asyncio.Event().wait()
            return {"mean": 1.0}

        scene = Scene(config(rollout={"timeout_s": 5.0}, stall_timeout_s=8.0, max_steps=60), function=measure).run()
        assert 10 not in [evaluated.version for evaluated in scene.done]
        assert scene.done[-1].version == 60
        named = "the evaluation of version 10 has not moved for stall_timeout_s=8 s, after 12 rollouts"
        assert any(named in line for line in scene.said)

    def test_rollouts_that_are_drawn_again_are_no_standstill(self) -> None:
        """Each try has `rollout.timeout_s`, and `stall_timeout_s` is above that: not above all tries together."""
        scene = Scene(config(rollout={"timeout_s": 5.0}, stall_timeout_s=8.0, evaluation={}, max_steps=2))
        whole, begun = scene.rollout, []

        async def hangs(prompt: Prompt) -> RolloutSample:
            if prompt.evaluation and prompt.index == 3:
                begun.append(asyncio.get_running_loop().time())
                await asyncio.Event().wait()
            return await whole(prompt)

        scene.rollout = hangs  # type: ignore[method-assign]
        scene.function = evaluation_function(HELD_OUT, None, config().evaluation)
        scene.run()
        assert begun[:3] == pytest.approx([0.0, 5.1, 10.3])
        assert [evaluated.result.failed for evaluated in scene.done if evaluated.result is not None] == [1, 1]

    async def test_what_is_evaluated(self) -> None:
        nothing = config(evaluation={}).evaluation
        assert evaluation_function(None, None, nothing) is None
        with pytest.raises(ConfigError, match=r"evaluation\.interval is 10, but there is nothing to evaluate"):
            evaluation_function(None, None, config().evaluation)
        with pytest.raises(ConfigError, match="Expected rows, a JSONL file, or an async function"):
            evaluation_function(len, None, nothing)  # type: ignore[arg-type]


class TestEvaluator:
    """One rollout, and many, without training."""

    def evaluator(self, rollout: Any, **settings: Any) -> Evaluator:
        class Handle:
            closed = 0
            oldest_version = None

            def close(self) -> None:
                Handle.closed += 1

        self.handle = Handle
        return Evaluator(rollout, lambda session, version: Handle(), Contract(), config(rollout=settings).rollout, 0)

    def measure(self, rollout: Any, rows: int = 8, samples: int = 1, **settings: Any) -> EvalResult:
        async def run() -> EvalResult:
            result = await self.evaluator(rollout, **settings).run(ROWS[:rows], samples, room=asyncio.Semaphore(4))
            self.seconds = asyncio.get_running_loop().time()
            return result

        return run_virtual(run())

    def test_a_rollout_that_ignores_its_cancellation_is_left_behind(self) -> None:
        async def deaf(prompt: Prompt) -> RolloutSample:
            if prompt.index == 3:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    await asyncio.sleep(3600)
            return RolloutSample([0, 1], [0.0, -1.0], [0, 1], 1.0)

        result = self.measure(deaf, timeout_s=10.0, retries=0)
        assert (result.n, result.failed) == (7, 1)
        assert self.seconds < 60
        assert self.handle.closed == 8

    @pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError()], ids=repr)
    def test_what_must_not_reach_the_event_loop_is_a_failed_rollout(self, error: BaseException) -> None:
        async def rude(prompt: Prompt) -> RolloutSample:
            raise error

        with pytest.raises(RolloutFailed, match=r"row \d of the evaluation"):
            self.measure(rude)
        assert self.handle.closed >= 1

    def test_none_counts_as_failed(self) -> None:
        async def half(prompt: Prompt) -> RolloutSample | None:
            return None if prompt.index % 2 else RolloutSample([0, 1], [0.0, -1.0], [0, 1], 0.5)

        with capture_logs() as logs:
            result = self.measure(half, samples=3)
        assert (result.n, result.failed, result.mean) == (12, 12, 0.5)
        assert [entry["error"] for entry in logs] == ["the rollout function returned None"] * 12

    def test_a_sample_that_cannot_be_used(self) -> None:
        async def wrong(prompt: Prompt) -> Any:
            return RolloutSample([0, 1], [0.0], [0, 1], 0.5)

        with pytest.raises(RolloutFailed, match=r"(?s)row \d of the evaluation returned a sample.*logprobs"):
            self.measure(wrong)

    def test_an_outage(self) -> None:
        async def down(prompt: Prompt) -> Any:
            raise ConnectionError("no route")

        with pytest.raises(BreakerOpen, match=r"5 rollouts in a row failed in the evaluation.*no route"):
            self.measure(down)

    def test_a_cancelled_call_ends_its_rollout(self) -> None:
        ended: list[bool] = []

        async def slow(prompt: Prompt) -> Any:
            try:
                await asyncio.sleep(1000)
            finally:
                ended.append(True)

        async def run() -> None:
            task = asyncio.create_task(call(slow, Prompt({}, policy=None, index=0), "it", 100.0))
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

        run_virtual(run())
        assert ended == [True]
