"""What the objectives make of the demo: its held-out accuracy, and how much staleness each of them bears.

    python benchmarks/objectives.py objectives [--seeds 0]       every objective at its defaults, the demo's staleness
    python benchmarks/objectives.py staleness [--seeds 0 1 2]    five settings, staleness 0 to 16: an hour on two cores

Each run is the demo (two-step arithmetic with a calculator tool, 0.66 M parameters, 16 groups of 8 rollouts a step)
with half of its steps, so that it shows speed of learning and not only where all of them end. Results are kept in
`--out` as one JSON line per run, and a run that is there already is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import asyncrl
from asyncrl.demo.command import demo_config, demo_rows
from asyncrl.demo.model import WARM_STEPS, make_model
from asyncrl.demo.task import rollout

STEPS = 40
HELD_OUT = 512
STALENESS = (0, 1, 2, 4, 8, 16)
OBJECTIVES = ("grpo", "importance_sampling", "reinforce", "dapo", "gspo", "gspo_token", "cispo", "dro")
SETTINGS: dict[str, dict[str, Any]] = {
    "no correction": {"policy_loss": "grpo", "loss": {"tis_cap": None}},
    "clip at the sampler": {"policy_loss": "grpo", "loss": {"anchor": "rollout"}},
    "decoupled, TIS": {"policy_loss": "grpo", "loss": {}},
    "cispo": {"policy_loss": "cispo", "loss": {"anchor": "rollout"}},
    "gspo": {"policy_loss": "gspo", "loss": {"anchor": "rollout"}},
}
"""`grpo` without any correction for staleness; with the ratio to the sampler, clipped; with the trainer's own anchor
and importance weights beside it (the default, the decoupled objective); and two that clip by other means."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("objectives", "staleness"))
    parser.add_argument("--seeds", type=int, nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.table == "objectives":
        seeds = options.seeds or [0]
        cells = [(name, 2, {"policy_loss": name}) for name in OBJECTIVES]
    else:
        seeds = options.seeds or [0, 1, 2]
        cells = [(name, bound, settings) for bound in STALENESS for name, settings in SETTINGS.items()]
    done = _read(options.out / "runs.jsonl")
    for seed in seeds:
        for name, bound, settings in cells:
            if (name, bound, seed) not in done:
                found = run(name, bound, seed, settings, options.out)
                done[name, bound, seed] = found
                with (options.out / "runs.jsonl").open("a") as file:
                    file.write(json.dumps(found) + "\n")
                print(json.dumps(found), flush=True)
    _print_table([(name, bound) for name, bound, _ in cells], [done[n, b, s] for n, b, _ in cells for s in seeds])


def run(name: str, bound: int, seed: int, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """One training run from the seed's own clumsy agent, and the accuracy it ends with."""
    start = _start_model(out, seed)
    base = demo_config(start, out / f"{name.replace(' ', '-')}-{bound}-{seed}".replace(",", ""), seed=seed, steps=STEPS)
    own = {**base.model_dump(), **settings, "staleness": {"max_staleness": bound}}
    own["loss"] = {"kl_beta": 0.0, **settings.get("loss", {})}
    result = asyncrl.train(
        rollout,
        dataset=demo_rows(seed, 20_000, held_out=False),
        config=asyncrl.Config(**own),
        evaluation=demo_rows(seed, HELD_OUT, held_out=True),
        view="quiet",
    )
    assert result.before is not None
    assert result.after is not None
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": name,
        "staleness": bound,
        "seed": seed,
        "before": result.before.mean,
        "after": result.after.mean,
        "wall_s": result.wall_s,
        "worst_staleness": result.worst_staleness,
        "mean_reward": statistics.mean(record["reward_mean"] for record in records),
        "behavior_kl": statistics.mean(record["behavior_kl"] for record in records),
    }


def _start_model(out: Path, seed: int) -> Path:
    """The demo's warm start, made once per seed."""
    folder = out / f"start-{seed}"
    return folder / "start-model" if folder.exists() else make_model(folder, seed=seed, steps=WARM_STEPS)


def _read(path: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(found["name"], found["staleness"], found["seed"]): found for found in map(json.loads, lines)}


def _print_table(cells: Iterable[tuple[str, int]], runs: list[dict[str, Any]]) -> None:
    """As markdown, with the spread over the seeds."""
    print("\n| objective | staleness | before | after (each seed) | mean | time, s | behaviour KL |")
    print("|---|---|---|---|---|---|---|")
    for name, bound in cells:
        found = [one for one in runs if one["name"] == name and one["staleness"] == bound]

        def mean(key: str, found: list[dict[str, Any]] = found) -> float:
            return statistics.mean(one[key] for one in found)

        each = " ".join(f"{one['after']:.3f}" for one in found)
        print(
            f"| {name} | {bound} | {mean('before'):.3f} | {each} | {mean('after'):.3f} | {mean('wall_s'):.0f} "
            f"| {mean('behavior_kl'):.2g} |"
        )


if __name__ == "__main__":
    main()
