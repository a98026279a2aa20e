"""The demo, start to end: make a clumsy tool-using agent, train it with the asynchronous loop, measure it."""

from __future__ import annotations

import json
import time
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
from asyncrl.storage.folder import RunFolder, make_folder

if TYPE_CHECKING:
    from asyncrl.run import TrainResult

SamplerKind = Literal["auto", "transformers", "vllm"]

STEPS = 80
"""Enough for all but the last few mistakes, in less than a minute on two cores."""


def run_demo(
    *,
    out: str | None = None,
    sampler: SamplerKind = "auto",
    seed: int = 0,
    lora: bool = False,
    quiet: bool = False,
    steps: int = STEPS,
    warm_steps: int = WARM_STEPS,
    train_rows: int = 20_000,
    held_out_rows: int = 256,
) -> int:
    """Run the demo in the folder `out`; returns the exit code."""
    began = time.monotonic()
    folder = RunFolder(Path(out or f"runs/demo-{datetime.now(UTC):%Y%m%d-%H%M%S}").absolute())
    if found := folder.holds():  # better said before the warm start than by `train` after it
        raise ConfigError(f"--out: {folder.root} already holds a run ({', '.join(found)}). Choose a new folder.")
    make_folder(folder.root, "--out")
    model = make_model(folder.root, seed=seed, steps=warm_steps, quiet=quiet)
    result = asyncrl.train(
        rollout,
        dataset=demo_rows(seed, train_rows, held_out=False),
        config=demo_config(model, folder.root, seed=seed, steps=steps, lora=lora, sampler=sampler),
        evaluation=demo_rows(seed, held_out_rows, held_out=True),
        view="quiet" if quiet else "auto",
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
