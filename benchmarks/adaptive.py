"""A long tail comes in the middle of a run: does a bound that moves reach the reward as soon as the best that stays?

    python benchmarks/adaptive.py [--seeds 0 1 2]           every bound, and the adaptive one; 20 minutes
    python benchmarks/adaptive.py --seeds 0 --settings 4 adaptive

The task and the model are the demo's: two-step arithmetic with a calculator tool, 0.66 M parameters, 8 groups of 8 a
step, groups without signal replaced. Each optimizer step takes `PAUSE_S` longer than it has to, as that of a larger
model would, and a judge gives the rewards. For the first `SHORT_PROMPTS` problems the judge takes 0.1 to 0.3 s; later
one verdict in `LONG_SHARE` takes 6 to 8 s, so that two groups of three wait for one. While the tail is short a small
bound is as fast as a large one, and learns more from each step, since the policy moves quickly; once it is long, only a
large one keeps the trainer busy, and the policy has become slow.

Measured is the time to reward: when the last `RECENT` rollouts first had a mean reward of `TARGET`. A run ends there,
or after `LIMIT_S` of training, or after `STEPS`. All settings get the same problems in the same order. Results are kept
in `--out`, one JSON line per run, and a run that is there already is not done again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.demo.command import demo_config, demo_rows
from asyncrl.demo.model import WARM_STEPS, make_model
from asyncrl.demo.task import rollout
from asyncrl.training.thread import ThreadedTrainer
from asyncrl.types import StepResult

BOUNDS = (0, 1, 2, 4, 8, 16)
ADAPTIVE = {"min_staleness": 1, "max_staleness": 16}
GROUPS, STEPS = 8, 48
"""The learning rate, the demo's, falls to 0 at the last step."""
SHORT_PROMPTS = 96
SHORT_S, LONG_S = (0.1, 0.3), (6.0, 8.0)
PAUSE_S = 0.6
LONG_SHARE = 8
TARGET, RECENT = 0.96, 512
LIMIT_S = 50.0
IN_FLIGHT = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=[*map(str, BOUNDS), "adaptive"])
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "runs.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in options.seeds:
        for setting in options.settings:
            if not any((one["setting"], one["seed"]) == (setting, seed) for one in done):
                done.append(run(setting, seed, options.out))
                with kept.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    print_table([one for one in done if one["seed"] in options.seeds and one["setting"] in options.settings])


async def judged(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    """The demo's rollout, and a judge who becomes slow in the middle of the run."""
    sample = await rollout(prompt)
    long = prompt.index >= SHORT_PROMPTS and prompt.rng.randrange(LONG_SHARE) == 0
    await asyncio.sleep(prompt.rng.uniform(*(LONG_S if long else SHORT_S)))
    return sample


def run(setting: str, seed: int, out: Path) -> dict[str, Any]:
    """One training run from the seed's own clumsy agent, in a process that is ended when the reward is reached."""
    start = out / f"start-{seed}"
    if not start.exists():
        make_model(start, seed=seed, steps=WARM_STEPS)
    folder = out / f"{setting}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    child = multiprocessing.get_context("spawn").Process(target=train, args=(setting, seed, start, folder))
    child.start()
    records: list[dict[str, Any]] = []
    while child.is_alive() and not ended(records):
        time.sleep(0.5)
        records = read(folder / "metrics.jsonl")
    child.terminate()
    child.join()
    records = read(folder / "metrics.jsonl")
    if not records:
        raise SystemExit(f"{setting}, seed {seed}: the run took no step (exit code {child.exitcode}); see above")
    step = next((step for step in range(1, len(records) + 1) if recent_reward(records[:step]) >= TARGET), None)
    trained = records[:step]
    return {
        "setting": setting,
        "seed": seed,
        "reached_s": trained[-1]["time_s"] if step else None,
        "steps": len(trained),
        "step_s": trained[-1]["time_s"] / len(trained),
        "staleness": statistics.mean(record["staleness_mean"] for record in trained),
        "behavior_kl": max(record["behavior_kl"] for record in trained),
        "last_reward": recent_reward(trained),
    }


def train(setting: str, seed: int, start: Path, folder: Path) -> None:
    config = demo_config(start / "start-model", folder, seed=seed, steps=STEPS).model_dump()
    config |= {
        "data": {"shuffle": False},
        "prompt_groups_per_step": GROUPS,
        "on_filtered": "replace",
        "staleness": ADAPTIVE if setting == "adaptive" else {"max_staleness": int(setting)},
        "concurrency": {"min_window": IN_FLIGHT, "max_window": IN_FLIGHT},
        "checkpoint": {"interval": 0, "final": False},
        "save_model": False,
    }
    slow_down(ThreadedTrainer)
    rows = demo_rows(seed, 20_000, held_out=False)
    asyncrl.train(judged, dataset=rows, config=asyncrl.Config(**config), view="quiet")


def slow_down(trainer: type[ThreadedTrainer]) -> None:
    quick = trainer.optim_step

    async def slow(self: ThreadedTrainer, *given: Any) -> StepResult:
        await asyncio.sleep(PAUSE_S)
        return await quick(self, *given)

    trainer.optim_step = slow  # type: ignore[method-assign]


def read(path: Path) -> list[dict[str, Any]]:
    """The step records that are there already."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def ended(records: list[dict[str, Any]]) -> bool:
    return bool(records) and (records[-1]["time_s"] > LIMIT_S or recent_reward(records) >= TARGET)


def recent_reward(records: list[dict[str, Any]]) -> float:
    """Mean over the last `RECENT` rollouts; 0 as long as there are fewer."""
    rollouts, total = 0, 0.0
    for record in reversed(records):
        if record["rollouts_finished"]:
            rollouts += record["rollouts_finished"]
            total += record["rollouts_finished"] * record["reward_mean"]
        if rollouts >= RECENT:
            return total / rollouts
    return 0.0


def print_table(runs: list[dict[str, Any]]) -> None:
    """As markdown: the time to reward of each seed, and means over the seeds. A run that did not reach it counts with
    the limit."""

    def mean(name: str) -> Callable[[list[dict[str, Any]]], float]:
        return lambda found: statistics.mean(one[name] if one[name] is not None else LIMIT_S for one in found)

    def each(found: list[dict[str, Any]]) -> str:
        return " ".join("never" if one["reached_s"] is None else f"{one['reached_s']:.0f}" for one in found)

    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "s to reward, each seed": each,
        "mean": lambda found: f"{mean('reached_s')(found):.0f}",
        "steps": lambda found: f"{mean('steps')(found):.0f}",
        "s per step": lambda found: f"{mean('step_s')(found):.2f}",
        "staleness, mean": lambda found: f"{mean('staleness')(found):.1f}",
        "largest behavior_kl": lambda found: f"{mean('behavior_kl')(found):.2f}",
    }
    print(f"\n| bound | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for setting in dict.fromkeys(one["setting"] for one in runs):
        found = [one for one in runs if one["setting"] == setting]
        print(f"| {setting} | {' | '.join(column(found) for column in columns.values())} |")


if __name__ == "__main__":
    main()
