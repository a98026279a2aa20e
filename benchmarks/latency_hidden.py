"""Real training with and without a slow verifier: what share of the samples per second is kept?

    python benchmarks/latency_hidden.py [--steps 60]

The verifier takes a lognormal delay of mean 0.5 s and sigma 1 in every rollout: the slowest of 64 takes about 3.5 s.
8 prompts x 8 rollouts a step, max_staleness 4. `pace` never waits for a straggler; `wait` keeps the bound hard.
"""

from __future__ import annotations

import argparse
import random

from loop import run_loop, samples_per_s

SIGMA = 1.0
MU = -0.6931471805599453 - SIGMA**2 / 2  # a mean of 0.5 s
WARM_UP = 10


def verifier_s(rng: random.Random) -> float:
    return rng.lognormvariate(MU, SIGMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    print("| policy | O | samples/s without | with the verifier | share kept | staleness mean | worst |")
    print("|---|---|---|---|---|---|---|")
    for policy, bound in (("pace", 4), ("wait", 4), ("wait", 16), ("wait", 0)):
        staleness = {"policy": policy, "max_staleness": bound}
        plain = samples_per_s(run_loop(steps, staleness=staleness), WARM_UP)
        records = run_loop(steps, verifier_s, staleness=staleness)
        slow = samples_per_s(records, WARM_UP)
        mean = sum(record["staleness_mean"] for record in records[WARM_UP:]) / len(records[WARM_UP:])
        worst = max(record["staleness_max"] for record in records)
        print(
            f"| {policy} | {bound} | {plain:,.0f} | {slow:,.0f} | {slow / plain:.2f} | {mean:.1f} | {worst:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
