"""How much of the ideal rate each staleness bound and policy keeps when rollouts have a long tail.

    python benchmarks/overlap.py [--seeds 5]

64 slots, 8 groups of 8 a step, rollouts of lognormal(-2, 1) seconds, longer ones than 5 s
drawn again (a tail 37 times the median), 0.1 s
a training step, 1,000 rows, in virtual time with the real scheduler, queue and loop. The ideal has every slot busy
all the time. `worst` is the staleness of the oldest token that was really trained.
"""

from __future__ import annotations

import argparse
import random
import statistics

from asyncrl import Config
from asyncrl.testing.simulation import Outcome, simulate

SLOTS = 64
DESIGN = {  # docs/staleness.md: what a first simulation promised, for waiting in admission order
    "pace": {0: 0.14, 1: 0.43, 2: 0.67, 4: 0.90, 8: 0.90, 16: 0.90},
    "wait": {0: 0.14, 1: 0.26, 2: 0.35, 4: 0.51, 8: 0.75, 16: 0.89},
}


def duration_s(rng: random.Random) -> float:
    while (seconds := rng.lognormvariate(-2, 1)) > 5.0:
        pass
    return seconds


def run(policy: str, bound: int, seed: int) -> Outcome:
    config = Config(
        model="none",
        seed=seed,
        completions_per_prompt=8,
        prompt_groups_per_step=8,
        staleness={"policy": policy, "max_staleness": bound},
        concurrency={"min_window": SLOTS, "max_window": SLOTS},
    )
    return simulate(config, rows=1000, duration_s=duration_s, step_s=lambda: 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    print("| policy | O | of the ideal rate (mean) | lowest | highest | worst staleness | design's table |")
    print("|---|---|---|---|---|---|---|")
    for policy, table in DESIGN.items():
        for bound, promised in table.items():
            outcomes = [run(policy, bound, seed) for seed in range(seeds)]
            shares = [outcome.busy_s / SLOTS / outcome.seconds for outcome in outcomes]
            worst = max(outcome.worst_staleness for outcome in outcomes)
            print(
                f"| {policy} | {bound} | {statistics.mean(shares):.2f} | {min(shares):.2f} | {max(shares):.2f} "
                f"| {worst} | {promised:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
