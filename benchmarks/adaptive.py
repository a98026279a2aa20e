"""A long tail that comes in the middle of a run: does a bound that moves reach the reward as soon as the best that stays?

    python benchmarks/adaptive.py [--seeds 0 1 2]           every bound, and the adaptive one; about 6 minutes a seed
    python benchmarks/adaptive.py --seeds 0 --settings 4 adaptive

The task and the model are the demo's: two-step arithmetic with a calculator tool, 0.66 M parameters, 8 groups of 8 a
step. A judge gives the rewards. At first it takes 0.1 to 0.3 s; from step `SWITCH` on, one verdict in `LONG_SHARE` takes
3 to 4 s, so that nearly every group waits for one. While the tail is short a small bound is as fast as a large one, and
learns more from each step; once it is long, only a large one keeps the trainer busy.

Measured is the time to reward: when the last `RECENT` rollouts first had a mean reward of `TARGET`. All settings get the
same problems in the same order, with the same verdicts' times. Results are kept in `--out`, one JSON line per run, and a
run that is there already is not done again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.demo.command import demo_config, demo_rows
from asyncrl.demo.model import WARM_STEPS, make_model
from asyncrl.demo.task import rollout

BOUNDS = (0, 1, 2, 4, 8)
ADAPTIVE = {"min_staleness": 0, "max_staleness": 8}
GROUPS = 8
STEPS, SWITCH = 60, 20
SHORT_S, LONG_S = (0.1, 0.3), (3.0, 4.0)
LONG_SHARE = 8
TARGET, RECENT = 0.93, 512
IN_FLIGHT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=[*map(str, BOUNDS), "adaptive"])
    parser.add_argument("--rate", type=float, default=3e-4, help="learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "runs.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for seed in options.seeds:
        for setting in options.settings:
            if not any((one["setting"], one["seed"]) == (setting, seed) for one in done):
                done.append(run(setting, seed, options.rate, options.out))
                with kept.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
                print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    print_table([one for one in done if one["seed"] in options.seeds and one["setting"] in options.settings])


async def judged(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    """The demo's rollout, and a judge who becomes slow in the middle of the run."""
    sample = await rollout(prompt)
    long = prompt.index >= SWITCH * GROUPS and prompt.rng.randrange(LONG_SHARE) == 0
    await asyncio.sleep(prompt.rng.uniform(*(LONG_S if long else SHORT_S)))
    return sample


def run(setting: str, seed: int, rate: float, out: Path) -> dict[str, Any]:
    """One training run from the seed's own clumsy agent."""
    start = out / f"start-{seed}"
    model = start / "start-model" if start.exists() else make_model(start, seed=seed, steps=WARM_STEPS)
    config = asyncrl.Config(
        **{
            **demo_config(model, out / f"{setting}-{seed}", seed=seed, steps=STEPS).model_dump(),
            "data": {"shuffle": False},
            "prompt_groups_per_step": GROUPS,
            "optimizer": {"learning_rate": rate, "warmup_steps": 3},
            "staleness": ADAPTIVE if setting == "adaptive" else {"max_staleness": int(setting)},
            "concurrency": {"min_window": IN_FLIGHT, "max_window": IN_FLIGHT},
        }
    )
    result = asyncrl.train(judged, dataset=demo_rows(seed, 20_000, held_out=False), config=config, view="quiet")
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    reached = next((step for step in range(len(records)) if recent_reward(records[: step + 1]) >= TARGET), None)
    return {
        "setting": setting,
        "seed": seed,
        "reached_s": None if reached is None else records[reached]["time_s"],
        "reached_step": None if reached is None else reached + 1,
        "first_s": records[SWITCH - 1]["time_s"],
        "second_s": records[-1]["time_s"] - records[SWITCH - 1]["time_s"],
        "staleness_first": mean(records[:SWITCH], "staleness_mean"),
        "staleness_second": mean(records[SWITCH:], "staleness_mean"),
        "last_reward": recent_reward(records),
    }


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


def mean(records: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(record[name] for record in records)


def print_table(runs: list[dict[str, Any]]) -> None:
    """As markdown: means over the seeds, and the time to reward of each of them."""
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "s to reward, each seed": lambda found: " ".join(seconds(one["reached_s"]) for one in found),
        "mean": lambda found: (
            "-" if any(one["reached_s"] is None for one in found) else seconds(mean(found, "reached_s"))
        ),
        "short tail, s": lambda found: seconds(mean(found, "first_s")),
        "long tail, s": lambda found: seconds(mean(found, "second_s")),
        "staleness, short": lambda found: f"{mean(found, 'staleness_first'):.1f}",
        "staleness, long": lambda found: f"{mean(found, 'staleness_second'):.1f}",
        "last reward": lambda found: f"{mean(found, 'last_reward'):.3f}",
    }
    print(f"| bound | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for setting in dict.fromkeys(one["setting"] for one in runs):
        found = [one for one in runs if one["setting"] == setting]
        print(f"| {setting} | {' | '.join(column(found) for column in columns.values())} |")


def seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
