"""The demo, start to end: make a clumsy tool-using agent, train it with the asynchronous loop, measure it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

import asyncrl
from asyncrl.config import (
    ConcurrencyConfig,
    Config,
    LoraConfig,
    LossConfig,
    OptimizerConfig,
    SamplerConfig,
    SamplingConfig,
    StalenessConfig,
)
from asyncrl.demo.model import WARM_STEPS, make_model
from asyncrl.demo.task import problems, rollout
from asyncrl.errors import ConfigError
from asyncrl.metrics.live import Mode
from asyncrl.storage.folder import RunFolder

if TYPE_CHECKING:
    from asyncrl.run import TrainResult

SamplerKind = Literal["auto", "transformers", "vllm"]

STEPS = 80
"""Enough for all but the last few mistakes, in less than a minute on two cores."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code."""
    began = time.monotonic()
    options = _parse(argv)
    folder = RunFolder(Path(options.out or f"runs/demo-{datetime.now(UTC):%Y%m%d-%H%M%S}").absolute())
    if found := folder.holds():  # better said before the warm start than by `train` after it
        raise ConfigError(f"--out: {folder.root} already holds a run ({', '.join(found)}). Choose a new folder.")
    view: Mode = "quiet" if options.quiet else "auto"
    model = make_model(folder.root, seed=options.seed, steps=options.warm_steps, quiet=options.quiet)
    result = asyncrl.train(
        rollout,
        dataset=demo_rows(options.seed, options.train_rows, held_out=False),
        config=demo_config(
            model, folder.root, seed=options.seed, steps=options.steps, lora=options.lora, sampler=options.sampler
        ),
        evaluation=demo_rows(options.seed, options.held_out_rows, held_out=True),
        view=view,
    )
    _conclude(folder, result, time.monotonic() - began)
    return 0


def demo_config(
    model: Path, run_dir: Path, *, seed: int, steps: int, lora: bool = False, sampler: SamplerKind = "auto"
) -> Config:
    """Every setting that is not a default."""
    return Config(
        model=str(model),
        run_dir=run_dir,
        seed=seed,
        max_steps=steps,
        completions_per_prompt=8,
        prompt_groups_per_step=16,
        on_filtered="drop",  # once nearly all groups are all right, filling their places would take ever longer
        max_seq_len=256,
        sampling=SamplingConfig(max_tokens=32),
        staleness=StalenessConfig(max_staleness=2),
        concurrency=ConcurrencyConfig(initial_window=64),
        loss=LossConfig(kl_beta=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3 if lora else 3e-4, schedule="linear", warmup_steps=3),
        lora=LoraConfig(rank=8 if lora else 0, alpha=16.0),
        sampler=SamplerConfig(kind=sampler),
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="asyncrl demo", description="Train a tiny tool-using agent, start to end.")
    parser.add_argument("--sampler", choices=("auto", "transformers", "vllm"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="train an adapter instead of the full model")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/demo-<time>)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps (default: {STEPS})")
    for name, default in (("--warm-steps", WARM_STEPS), ("--train-rows", 20_000), ("--held-out-rows", 256)):
        parser.add_argument(name, type=int, default=default, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def demo_rows(seed: int, count: int, *, held_out: bool) -> list[dict[str, Any]]:
    """Problems as dataset rows; held-out ones share no pair of first operands with the others."""
    return [problem.row for problem in islice(problems(seed, held_out=held_out), count)]


def _conclude(folder: RunFolder, result: TrainResult, wall_s: float) -> None:
    """Say and write what the demo is about: how much better the agent has become, and in what time."""
    assert result.before is not None
    assert result.after is not None
    before, after = result.before.mean, result.after.mean
    told = json.loads(folder.summary.read_text(encoding="utf-8"))
    demo = {"accuracy_before": before, "accuracy_after": after, "train_wall_s": result.wall_s, "wall_s": wall_s}
    folder.write_summary({**told, **demo})
    console = Console(highlight=False)
    console.print(f"held-out accuracy: {before:.3f} before, {after:.3f} after {result.steps} steps", style="bold")
    console.print(f"wall time: {wall_s:.0f} s, warm start and evaluation included")
    console.print(f"run folder: {folder.root}", soft_wrap=True)
