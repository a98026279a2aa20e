"""Is `asyncrl tune` right? One run is recorded, other settings are predicted from it, and then really run.

    python benchmarks/tune_truth.py [--vllm] [--seconds 40] [--width 160]

Two turns of a small model (1.7 M parameters) with a tool in between and a verifier after, both with a long tail, and
rows that are hard in all of their rollouts; the default is the embedded sampler. Every setting runs for about
`--seconds`, and is compared where it is under way: without its first steps, and without the last, for which no new
rollouts begin. On two cores the sampler and the trainer slow each other down, which is a part of what is predicted.

The last two columns are the errors of a prediction whose durations are those of the very run that it is compared with:
a machine that was slower in one run than in the other is at fault where they are small and the others are not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loop import prompt_tokens

from asyncrl import Config, Prompt, RolloutSample, train
from asyncrl.planning.predict import Machine, Prediction, predict
from asyncrl.planning.recorded import workload_of
from asyncrl.planning.workload import Workload
from asyncrl.reports.run_data import RunData, load_run

WINDOW = 96
RECORDED: dict[str, Any] = {"staleness": {"max_staleness": 2}}
"""The setting that the others are predicted from."""
SETTINGS: dict[str, dict[str, Any]] = {
    "wait, O = 0": {"staleness": {"max_staleness": 0}},
    "wait, O = 1": {"staleness": {"max_staleness": 1}},
    "wait, O = 4": {"staleness": {"max_staleness": 4}},
    "wait, O = 8": {"staleness": {"max_staleness": 8}},
    "pace, O = 2": {"staleness": {"policy": "pace", "max_staleness": 2}},
    "mask, O = 1": {"staleness": {"policy": "pace", "max_staleness": 1, "on_stale": "mask"}},
    "24 slots, O = 4": {
        "staleness": {"max_staleness": 4},
        "concurrency": {"min_window": 24, "max_window": 24},
    },
    "16 groups of 4, O = 2": {
        "staleness": {"max_staleness": 2},
        "completions_per_prompt": 4,
        "prompt_groups_per_step": 16,
    },
    "4 groups, O = 4": {"staleness": {"max_staleness": 4}, "prompt_groups_per_step": 4},
    "every 2nd step, O = 4": {"staleness": {"max_staleness": 4}, "publish": {"weight_sync_interval": 2}},
}
WARM_UP = 12
"""Steps, before anything is measured."""
RECORDED_STEPS = 120
FEWEST, MOST = 20, 400
"""Steps that are measured."""
BAR = 0.10


async def rollout(prompt: Prompt) -> RolloutSample:
    rng = prompt.rng
    hard = random.Random(prompt.index).lognormvariate(0.0, 0.4)
    tokens = prompt_tokens(prompt.index)
    logprobs, mask, versions = [0.0] * len(tokens), [0] * len(tokens), [0] * len(tokens)
    for turn in range(2):
        most = min(32, max(4, round(hard * rng.lognormvariate(2.4, 0.4))))
        drawn = await prompt.policy.generate(tokens, max_tokens=most, stop_token_ids=[])
        tokens, logprobs = [*tokens, *drawn.tokens], [*logprobs, *drawn.logprobs]
        mask, versions = [*mask, *[1] * len(drawn.tokens)], [*versions, *drawn.versions]
        await asyncio.sleep(hard * rng.lognormvariate(-1.5, 0.8))  # the tool, then the verifier
        if turn == 0:
            answer = rng.choices(range(200), k=8)
            tokens, logprobs = [*tokens, *answer], [*logprobs, *[0.0] * len(answer)]
            mask, versions = [*mask, *[0] * len(answer)], [*versions, *[0] * len(answer)]
    return RolloutSample(tokens, logprobs, mask, rng.random(), versions)


def config_of(model: Path, run_dir: Path, steps: int, kind: str, settings: Mapping[str, Any]) -> Config:
    base: dict[str, Any] = {
        "model": str(model),
        "run_dir": run_dir,
        "completions_per_prompt": 8,
        "prompt_groups_per_step": 8,
        "concurrency": {"min_window": WINDOW, "max_window": WINDOW},
        "max_steps": steps,
        "data": {"shuffle": False},
        "loss": {"kl_beta": 0.0},
        "optimizer": {"learning_rate": 1e-6},
        "sampler": {"kind": kind},
        "checkpoint": {"interval": 0, "final": False},
        "log_rollouts": 0,
        "record_samples": False,
        "save_model": False,
    }
    return Config(**{**base, **settings})


class InOrder(Workload):
    """Rows as they were recorded: a row takes the same time in every run here, so chance weighs on both sides alike."""

    def order(self, seed: int, count: int = 1 << 16) -> list[int]:
        return [place % len(self.rows) for place in range(count)]


def run(config: Config) -> RunData:
    assert config.max_steps is not None
    rows = [{"row": row} for row in range(config.prompt_groups_per_step * config.max_steps)]
    return load_run(train(rollout, dataset=rows, config=config, view="quiet").run_dir)


def drain(config: Config) -> int:
    """Steps at the end for which no rollouts begin."""
    return config.staleness.max_staleness + 2


@dataclass(frozen=True, slots=True)
class Measured:
    """What a real run did while it was under way."""

    samples_per_s: float
    staleness_mean: float
    staleness_worst: float


def measured(found: RunData, config: Config) -> Measured:
    part = slice(WARM_UP, len(found.steps) - drain(config))
    time, samples = found.steps["time_s"][WARM_UP - 1 : part.stop], found.steps["samples"][part]
    tokens = found.steps["loss_tokens"][part]
    return Measured(
        float(samples.sum() / (time[-1] - time[0])),
        float((found.steps["staleness_mean"][part] * tokens).sum() / tokens.sum()),
        float(found.steps["staleness_max"][part].max()),
    )


def predicted_by_itself(found: RunData, config: Config, steps: int) -> Prediction:
    """The run, from its own durations."""
    workload = InOrder(workload_of(found).rows)
    return predict(config, Machine.of_run(found, workload), workload, steps=steps, warm_up=WARM_UP)


def errors_of(guess: Prediction, real: Measured) -> tuple[float, float]:
    """Of the rate and of the mean staleness, as shares of what was real; on-policy there is nothing to share."""
    ages = guess.staleness_mean, real.staleness_mean
    return guess.samples_per_s / real.samples_per_s - 1, ages[0] / ages[1] - 1 if ages[1] else ages[0]


def main() -> None:
    from asyncrl.testing.models import tiny_model  # loads torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM instead of the embedded sampler")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each run, about")
    parser.add_argument("--width", type=int, default=160, help="of the model; less on a machine that others use too")
    parser.add_argument("--only", help="settings whose name has this regular expression")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    kind = "vllm" if arguments.vllm else "transformers"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = tiny_model(root / "model", hidden=arguments.width, layers=5, max_seq_len=128)
        recorded = run(config_of(model, root / "recorded", RECORDED_STEPS, kind, RECORDED))
        workload = InOrder(workload_of(recorded).rows)
        machine = Machine.of_run(recorded, workload)
        print(f"sampler: {machine.sampler}\ntrainer: {machine.trainer}\n")
        print(
            "| setting | samples/s predicted | real | error | staleness predicted | real | error | worst | real "
            "| error of the rate, by its own durations | of the staleness |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        errors = list[float]()
        for number, (name, settings) in enumerate(SETTINGS.items()):
            if arguments.only and not re.search(arguments.only, name):
                continue
            about = predict(config_of(model, root, 1, kind, settings), machine, workload, steps=100)
            steps = min(MOST, max(FEWEST, round(arguments.seconds * about.steps_per_s)))
            config = config_of(model, root / str(number), steps, kind, settings)
            config = config.model_copy(update={"max_steps": WARM_UP + steps + drain(config)})
            guess = predict(config, machine, workload, steps=steps, warm_up=WARM_UP)
            found = run(config)
            real, own = measured(found, config), predicted_by_itself(found, config, steps)
            errors += (error := errors_of(guess, real))
            itself = errors_of(own, real)
            print(
                f"| {name} | {guess.samples_per_s:.1f} | {real.samples_per_s:.1f} | {error[0]:+.1%} "
                f"| {guess.staleness_mean:.2f} | {real.staleness_mean:.2f} | {error[1]:+.1%} "
                f"| {guess.staleness_worst:.0f} | {real.staleness_worst:.0f} | {itself[0]:+.1%} | {itself[1]:+.1%} |",
                flush=True,
            )
        inside = sum(abs(error) <= BAR for error in errors)
        print(f"{inside} of {len(errors)} numbers within {BAR:.0%}; the largest error is {max(map(abs, errors)):.1%}")


if __name__ == "__main__":
    main()
