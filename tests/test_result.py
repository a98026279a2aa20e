from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import asyncrl
from asyncrl.result import TrainResult
from asyncrl.rollout.estimate import EvalResult
from asyncrl.rollout.evaluations import Evaluated
from asyncrl.types import RolloutSample
from tests.conftest import MakeConfig

LEDGER = {"admitted": 9, "trained": 8, "filtered": 1, "rejected": 0, "pending": 0, "requeued": 0}
RESULT = TrainResult(Path("run"), 2, 36, 1.4, 0, LEDGER, interrupted=False)


def test_last_words() -> None:
    assert RESULT.last_words(saved=True) == f"finished after 2 steps and 36 rollouts in 1 s; model: {Path('run/model')}"
    early = replace(RESULT, ended_early="only 0 of the last 9 groups carried signal", export_name="better")
    assert early.last_words(saved=True).startswith("ended early after 2 steps")
    assert f", because only 0 of the last 9 groups carried signal; model: {Path('run/better')}" in early.last_words(
        saved=True
    )
    assert replace(early, interrupted=True).last_words(saved=True).startswith("stopped cleanly after 2 steps")
    assert "the model was not saved (save_model)" in RESULT.last_words(saved=False)


def test_a_run_that_trained_nothing_says_why() -> None:
    assert RESULT.why_nothing_was_trained() is None
    nothing = replace(RESULT, steps=0, ledger={**LEDGER, "trained": 0, "filtered": 9})
    assert "Of 9 groups, 9 were filtered" in (nothing.why_nothing_was_trained() or "")
    assert "rejected" not in (nothing.why_nothing_was_trained() or "")
    assert replace(nothing, interrupted=True).why_nothing_was_trained() == nothing.why_nothing_was_trained()
    dropped = replace(nothing, ledger={**LEDGER, "trained": 0, "filtered": 0, "rejected": 9})
    assert "Of 9 groups, 9 were rejected" in (dropped.why_nothing_was_trained() or "")
    early = replace(nothing, interrupted=True, ledger={**LEDGER, "trained": 0, "filtered": 0, "pending": 9})
    assert early.why_nothing_was_trained() is None, "it was stopped before there was anything to say"


def test_a_run_with_fewer_steps_than_were_asked_for_says_why() -> None:
    assert RESULT.why_no_more(None) is RESULT.why_no_more(2) is None
    assert "the data ended after 2 steps, before max_steps=3" in (RESULT.why_no_more(3) or "")
    assert replace(RESULT, interrupted=True).why_no_more(3) is None
    again = replace(RESULT, resumed_from=2)
    assert "nothing was left to train" in (again.why_no_more(2) or "")
    assert "raise max_steps" in (again.why_no_more(2) or "")
    assert "raise data.epochs" in (again.why_no_more(None) or "")
    assert replace(RESULT, resumed_from=1).why_no_more(2) is None


def evaluated(version: int, reward: float) -> Evaluated:
    return Evaluated(version, version, 1.0, EvalResult({0: [reward], 1: [reward]}))


def test_an_earlier_model_that_was_better_is_named() -> None:
    first, best, last = evaluated(0, 0.25), evaluated(1, 0.75), evaluated(2, 0.5)
    assert RESULT.what_was_better() is None
    found = replace(RESULT, evaluations=(first, best, last), best=best, after=last.result)
    assert (found.what_was_better() or "").startswith("the best held-out reward was 0.750 [")
    assert (found.what_was_better() or "").endswith("], at step 1 of 2")
    assert replace(found, evaluations=(first, last, best)).what_was_better() is None
    assert replace(found, evaluations=(best, evaluated(2, 0.75))).what_was_better() is None
    summary = found.summary()
    assert (summary["reward_best"], summary["best_step"], summary["evaluations"]) == (0.75, 1, 3)


def test_a_run_without_signal_ends_early_and_says_why(make_config: MakeConfig) -> None:
    async def rollout(prompt: asyncrl.Prompt) -> RolloutSample:
        completion = await prompt.policy.generate([65, 66])
        return RolloutSample.from_completion([65, 66], completion, float(prompt.index < 4 and prompt.rollout_index))

    config = make_config(signal_patience_groups=8, data={"shuffle": False}, on_filtered="drop", export_name="better")
    result = asyncrl.train(rollout, dataset=[{"row": row} for row in range(400)], config=config, view="quiet")
    assert result.steps >= 1
    assert result.ledger["admitted"] < 60
    assert result.ended_early is not None
    assert result.ended_early.startswith("only 0 of the last 8 groups carried signal")
    assert json.loads((result.run_dir / "summary.json").read_text())["ended_early"] == result.ended_early
    assert (result.run_dir / "better" / "config.json").is_file()
