"""A replica of vLLM is killed every few seconds through a run: what is lost, and does the agent still learn?

    python benchmarks/sampler_deaths.py [--every 10] [--replicas 2] [--lora] [--steps 80] [--out DIR]

The run is that of `asyncrl demo --sampler vllm`. Beside it a thread sends SIGKILL to the process group of a random
replica that answers, on a clock that knows nothing of the run. At the end `asyncrl audit` goes through the ledger.
`--every 0` kills none, for comparison.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

import psutil

import asyncrl
from asyncrl.config import SamplerConfig
from asyncrl.demo.command import demo_config, demo_rows
from asyncrl.demo.model import make_model
from asyncrl.demo.task import rollout
from asyncrl.sampling.server import GUARD

ROWS, HELD_OUT = 20_000, 256


class Killer(threading.Thread):
    """Kills from the moment on at which all have answered. Owns the count."""

    def __init__(self, every_s: float, replicas: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.kills = 0
        self._every_s = every_s
        self._replicas = replicas
        self._rng = random.Random(seed)
        self._done = threading.Event()

    def run(self) -> None:
        while len(serving()) < self._replicas:
            if self._done.wait(1.0):
                return
        while not self._done.wait(self._every_s):
            if alive := serving():
                os.killpg(self._rng.choice(alive).pid, signal.SIGKILL)
                self.kills += 1

    def stop(self) -> None:
        self._done.set()
        self.join()


def serving() -> list[psutil.Process]:
    """The leaders of the process groups in which servers of this process answer."""
    guards = [child for child in psutil.Process().children() if str(GUARD) in command(child)]
    return [guard for guard in guards if answers(guard)]


def command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def answers(guard: psutil.Process) -> bool:
    words = command(guard)
    if "--port" not in words:
        return False
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{words[words.index('--port') + 1]}/health", timeout=1):
            return True
    except OSError:
        return False


def learn(folder: Path, options: argparse.Namespace) -> tuple[asyncrl.TrainResult, int]:
    config = demo_config(
        make_model(folder, seed=options.seed),
        folder / "run",
        seed=options.seed,
        steps=options.steps,
        lora=options.lora,
        sampler="vllm",
    )
    sampler = SamplerConfig(kind="vllm", replicas=options.replicas)
    killer = Killer(options.every, options.replicas, options.seed) if options.every else None
    if killer:
        killer.start()
    try:
        result = asyncrl.train(
            rollout,
            dataset=demo_rows(options.seed, ROWS, held_out=False),
            config=config.model_copy(update={"sampler": sampler}),
            evaluation=demo_rows(options.seed, HELD_OUT, held_out=True),
        )
    finally:
        if killer:
            killer.stop()
    return result, killer.kills if killer else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=float, default=10.0, help="seconds from one kill to the next; 0: none")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, help="where to keep the run folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        result, kills = learn(folder, options)
        audit = subprocess.run([sys.executable, "-m", "asyncrl", "audit", str(folder / "run")], check=False)
    assert result.before is not None
    assert result.after is not None
    kept = " | ".join(str(result.ledger[end]) for end in ("trained", "filtered", "rejected", "pending"))
    print("| weights | kills | reward before | after | steps | trained | filtered | rejected | pending | s | audit |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {'LoRA' if options.lora else 'full'} | {kills} | {result.before.mean:.3f} | {result.after.mean:.3f} "
        f"| {result.steps} | {kept} | {result.wall_s:.0f} | {'clean' if audit.returncode == 0 else 'NOT CLEAN'} |"
    )


if __name__ == "__main__":
    main()
