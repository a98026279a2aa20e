"""What the objectives make of the demo: its held-out accuracy, and how much staleness each of them bears.

    python benchmarks/objectives.py objectives [--seeds 0]      every objective at its defaults, at the demo's staleness
    python benchmarks/objectives.py staleness [--seeds 0 1 2]   five settings, each at staleness 0, 1, 2, 4, 8 and 16

The task and the model are the demo's: two-step arithmetic with a calculator tool, 0.66 M parameters. For `staleness` a
slow judge is added, 2 s (1.5 to 2.5) for every rollout, and a step is 8 groups of 8: about nine steps of training fit
into the wait for one verdict, so that a larger bound really is used, and saves real time. A run whose policy has
collapsed ends early: hardly any group has a signal then.

Results are kept in `--out`, one JSON line per run, and a run that is there already is not done again. Runs that mostly
wait can share a machine: `--bounds 0 1 --jobs 4`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.demo.command import demo_config, demo_rows
from asyncrl.demo.model import WARM_STEPS, make_model
from asyncrl.demo.task import rollout

HELD_OUT = 512
JUDGE_S = (1.5, 2.5)
IN_FLIGHT = 2048
BOUNDS = (0, 1, 2, 4, 8, 16)
SETTINGS: dict[str, dict[str, Any]] = {
    "no correction": {"policy_loss": "grpo", "loss": {"tis_cap": None}},
    "clip at the sampler": {"policy_loss": "grpo", "loss": {"anchor": "rollout"}},
    "decoupled, TIS": {"policy_loss": "grpo"},
    "cispo": {"policy_loss": "cispo", "loss": {"anchor": "rollout"}},
    "gspo": {"policy_loss": "gspo", "loss": {"anchor": "rollout"}},
}
"""`grpo` without any correction for staleness; with the ratio to the sampler, clipped; with the trainer's own anchor
and importance weights beside it (the default: the decoupled objective); and two that clip by other means."""
DEFAULTS = {
    name: {"policy_loss": name}
    for name in ("grpo", "importance_sampling", "reinforce", "dapo", "gspo", "gspo_token", "cispo", "dro")
}


@dataclass(frozen=True)
class Cell:
    table: str
    name: str
    bound: int
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("objectives", "staleness"))
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--bounds", type=int, nargs="+", default=BOUNDS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or ([0] if options.table == "objectives" else [0, 1, 2])
    if options.table == "objectives":
        rows = [(name, 2) for name in DEFAULTS]
    else:
        rows = [(name, bound) for bound in options.bounds for name in SETTINGS]
    done = _read(options.out / "runs.jsonl")
    cells = [Cell(options.table, name, bound, seed) for seed in seeds for name, bound in rows]
    for seed in seeds:
        _start_model(options.out, seed)
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        waited = [pool.submit(run, cell, options.out) for cell in cells if cell not in done]
        for future in as_completed(waited):
            found = future.result()
            done[_cell(found)] = found
            with (options.out / "runs.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), file=sys.stderr, flush=True)
    _print_table(rows, [done[cell] for cell in cells])


async def slowly_judged(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    """The demo's rollout, whose reward takes its time."""
    sample = await rollout(prompt)
    await asyncio.sleep(prompt.rng.uniform(*JUDGE_S))
    return sample


def run(cell: Cell, out: Path) -> dict[str, Any]:
    """One training run from the seed's own clumsy agent, and the accuracy it ends with."""
    slow = cell.table == "staleness"
    start = _start_model(out, cell.seed)
    folder = out / "-".join(word for word in f"{cell.table} {cell.name} {cell.bound} {cell.seed}".split())
    base = demo_config(start, folder, seed=cell.seed, steps=40)
    own = (SETTINGS if slow else DEFAULTS)[cell.name]
    settings = {
        **base.model_dump(),
        **own,
        "loss": {"kl_beta": 0.0, **own.get("loss", {})},
        "staleness": {"max_staleness": cell.bound},
    }
    if slow:
        settings |= {
            "prompt_groups_per_step": 8,
            "concurrency": {"min_window": IN_FLIGHT, "max_window": IN_FLIGHT},
            "signal_patience_groups": 64,  # a policy that has collapsed gives none any more
        }
    result = asyncrl.train(
        slowly_judged if slow else rollout,
        dataset=demo_rows(cell.seed, 20_000, held_out=False),
        config=asyncrl.Config(**settings),
        view="quiet",
    )
    found = asyncrl.evaluate(
        rollout,
        dataset=demo_rows(cell.seed, HELD_OUT, held_out=True),
        config=asyncrl.Config(**{**settings, "model": str(result.model_dir)}),
    )
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]

    def mean(name: str) -> float:
        return statistics.mean(record[name] for record in records)

    return {
        **asdict(cell),
        "after": found.mean,
        "steps": result.steps,
        "wall_s": result.wall_s,
        "staleness_mean": mean("staleness_mean"),
        "staleness_max": result.worst_staleness,
        "reward_mean": mean("reward_mean"),
        "lowest_ess": min(record.get("ess", 1.0) for record in records),
    }


def _start_model(out: Path, seed: int) -> Path:
    """The demo's warm start, made once per seed."""
    folder = out / f"start-{seed}"
    return folder / "start-model" if folder.exists() else make_model(folder, seed=seed, steps=WARM_STEPS)


def _cell(found: dict[str, Any]) -> Cell:
    return Cell(found["table"], found["name"], found["bound"], found["seed"])


def _read(path: Path) -> dict[Cell, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {_cell(found): found for found in map(json.loads, lines)}


def _print_table(rows: Iterable[tuple[str, int]], runs: list[dict[str, Any]]) -> None:
    """As markdown, with the spread over the seeds."""
    columns = "objective", "bound", "accuracy, each seed", "mean", "over the run", "staleness: mean, max", "steps", "s"
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, bound in rows:
        found = [one for one in runs if (one["name"], one["bound"]) == (name, bound)]

        def mean(key: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.mean(one[key] for one in found)

        each = " ".join(f"{one['after']:.3f}" for one in found)
        worst = max(one["staleness_max"] for one in found)
        print(
            f"| {name} | {bound} | {each} | {mean('after'):.3f} | {mean('reward_mean'):.3f} "
            f"| {mean('staleness_mean'):.1f}, {worst} | {mean('steps'):.0f} | {mean('wall_s'):.0f} |"
        )


if __name__ == "__main__":
    main()
