"""How long does it take to simulate a cluster that nobody has on a desk?

    python benchmarks/tune_cluster.py [--steps 10000] [--replicas 1000] [--turns 1]

Steps of 512 rollouts (64 groups of 8) on a thousand replicas of 64 requests each, a bound of 8 steps, a lognormal
number of tokens with a tail, tools between turns, 20 s a step and 5 s a hot-load: what `asyncrl tune` simulates for one
setting, by the real scheduler, queue, budget and loop.
"""

from __future__ import annotations

import argparse
import resource
import time

from asyncrl import Config
from asyncrl.planning.described import Description, described
from asyncrl.planning.runner import Question, Task, quiet, solve
from asyncrl.planning.setting import Setting

GROUPS, SIZE = 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=1)
    options = parser.parse_args()
    quiet()
    base = Config(
        model="none",
        completions_per_prompt=SIZE,
        prompt_groups_per_step=GROUPS,
        rollout={"timeout_s": 3600.0},
        stall_timeout_s=7200.0,
    )
    description = Description(
        tokens="lognormal(median=300, p95=1k)",
        turns=str(options.turns),
        tools="lognormal(median=1s, p95=10s)",
        verifier="lognormal(median=2s, p95=20s)",
        sampler="60 tokens/s at 1, 1500 tokens/s at 64",
        replicas=options.replicas,
        step="20s",
        publish="5s",
    )
    found = described(base, description, SIZE)
    began, began_cpu = time.perf_counter(), time.process_time()
    question = Question(base, found.machine, found.workload, steps=options.steps)
    setting = Setting("wait", 8, 9 * GROUPS * SIZE, GROUPS, SIZE, 1)
    answer = solve(question, Task(setting))
    took_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    if isinstance(answer, str):
        raise SystemExit(f"the simulated run ended early: {answer}")
    prediction = answer.prediction
    rollouts = prediction.rollouts_per_s * prediction.seconds
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("| steps | rollouts | replicas | turns | simulated | took, s | rollouts/s | CPU us a rollout | peak, MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {prediction.steps:,} | {rollouts:,.0f} | {options.replicas:,} | {options.turns} "
        f"| {prediction.seconds / 3600:.1f} h | {took_s:.0f} | {rollouts / took_s:,.0f} "
        f"| {cpu_s / rollouts * 1e6:.0f} | {peak_mb:,.0f} |"
    )
    print(
        f"\n{prediction.samples_per_s:.1f} samples/s, staleness {prediction.staleness_mean:.1f} on average and "
        f"{prediction.staleness_worst:.0f} at worst, the trainer waits {prediction.wait_share:.0%}."
    )


if __name__ == "__main__":
    main()
