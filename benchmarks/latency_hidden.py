"""Real training with and without a slow verifier: what share of the samples per second is kept?

    python benchmarks/latency_hidden.py [--steps 40]

The verifier takes a lognormal delay of mean 0.5 s and sigma 1 in every rollout: the slowest of 8 takes about 1.3 s, the
slowest of 64 about 3.5 s. 8 prompts x 8 rollouts a step. `pace` never waits for a straggler; `wait` keeps the bound
hard. What can be hidden is a matter of arithmetic: a bound of O lets (O + 1) steps' worth of groups be under way, so
a group may take O + 1 steps' time on average from its beginning until its weights are live. With 24 + 6
tokens a step is short against the delay, with 64 + 32 it is not.
"""

from __future__ import annotations

import argparse
import random

from loop import run_loop, samples_per_s

SIGMA = 1.0
MU = -0.6931471805599453 - SIGMA**2 / 2  # a mean of 0.5 s
WARM_UP = 10
CASES = (
    ((64, 32), "pace", 4),
    ((64, 32), "wait", 4),
    ((24, 6), "pace", 4),
    ((24, 6), "wait", 4),
    ((24, 6), "pace", 8),
    ((24, 6), "wait", 16),
)


def verifier_s(rng: random.Random) -> float:
    return rng.lognormvariate(MU, SIGMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    print("| tokens | policy | O | samples/s without | with the verifier | share kept | staleness mean | worst |")
    print("|---|---|---|---|---|---|---|---|")
    for sizes, policy, bound in CASES:
        staleness = {"policy": policy, "max_staleness": bound}
        plain = samples_per_s(run_loop(steps, sizes=sizes, staleness=staleness), WARM_UP)
        records = run_loop(steps, verifier_s, sizes=sizes, staleness=staleness)
        slow = samples_per_s(records, WARM_UP)
        mean = sum(record["staleness_mean"] for record in records[WARM_UP:]) / len(records[WARM_UP:])
        worst = max(record["staleness_max"] for record in records)
        print(
            f"| {sizes[0]} + {sizes[1]} | {policy} | {bound} | {plain:,.0f} | {slow:,.0f} | {slow / plain:.2f} "
            f"| {mean:.1f} | {worst:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
