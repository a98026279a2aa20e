"""The options of `asyncrl tune`. Light: every command's `--help` loads this."""

from __future__ import annotations

import argparse

ABOUT = "Say which staleness, window, batch and sync interval to take, before paying for it."
USAGE = "asyncrl tune RUN|CONFIG.toml [OPTIONS] [--section.field VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="RUN|CONFIG.toml",
        help="a run folder, whose durations are learned; or a config file, with --tokens or --rollout, and --step",
    )
    tried = parser.add_argument_group("what is tried (values separated by commas)")
    tried.add_argument("--max-staleness", metavar="N,...", help="optimizer steps (default: 0,1,2,4,8,16)")
    tried.add_argument("--policy", metavar="NAME,...", help="wait, pace, mask, requeue, drop (default: wait,pace,mask)")
    tried.add_argument(
        "--window", metavar="N,...", help="rollouts at once (default: the smallest that is as fast as any)"
    )
    tried.add_argument("--batch", metavar="N,...", help="groups a step (default: the config's)")
    tried.add_argument("--group", metavar="N,...", help="rollouts a group (default: the config's)")
    tried.add_argument(
        "--sync", metavar="N,...", help="steps between hot-loads (default: searched where they cost time)"
    )
    taken = parser.add_argument_group("what is recommended")
    taken.add_argument("--give", metavar="SHARE", help="rate that you give for fresher tokens (default: 10%%)")
    taken.add_argument("--worst", type=float, metavar="N", help="oldest token that you bear, in steps (default: 8)")
    said = parser.add_argument_group(
        "how long things take (2s, lognormal(median=30s, p95=2min), ...: docs/how_to/tune.md)"
    )
    said.add_argument("--rollout", metavar="TIME", help="a whole rollout, however many run; or describe it:")
    said.add_argument("--turns", metavar="COUNT", help="of a rollout (default: 1)")
    said.add_argument("--prompt", metavar="COUNT", help="tokens of the prompt (default: 500)")
    said.add_argument("--tokens", metavar="COUNT", help="drawn in a turn")
    said.add_argument("--tools", metavar="TIME", help="between two turns (default: 0s)")
    said.add_argument("--verifier", metavar="TIME", help="after the last turn (default: 0s)")
    said.add_argument(
        "--no-signal", metavar="SHARE", help="of the groups, all of whose rewards are equal (default: 0%%)"
    )
    said.add_argument("--step", metavar="TIME", help="one optimizer step: 2s, or '0.5s + 40us per token'")
    said.add_argument("--publish", metavar="TIME", help="from new weights until they are live (default: 1s)")
    said.add_argument(
        "--sampler", metavar="SPEED", help="of a replica (default: '60 tokens/s at 1, 3000 tokens/s at 128')"
    )
    said.add_argument("--replicas", type=int, metavar="N", help="of the sampler (default: the config's)")
    how = parser.add_argument_group("how it is done")
    how.add_argument("--steps", type=int, metavar="N", help="simulated for each setting (default: enough)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    how.add_argument("--out", metavar="FILE.html", help="the page (default: RUN/tune.html, or tune.html here)")
    how.add_argument("--json", action="store_true", help="print JSON, and write no page unless --out is given")
