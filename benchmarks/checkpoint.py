"""What a checkpoint of the trainer costs: how long training stands still for it, and when it is on the disk.

    python benchmarks/checkpoint.py [--folder DIR] [--repeats 3] [--largest 200]

`--folder` is on the disk to measure. A state is weights, both means of AdamW, and randomness; of an adapter, the
adapter's. "stands still" is the copy in memory, after which training goes on; "without a copy" is how long it would
stand still if the state went to the disk at once. "on the disk" is from the beginning to the last fsync. Medians.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers.utils import logging as transformers_logging

from asyncrl.config import Config
from asyncrl.testing.models import tiny_model
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence


@dataclass(frozen=True)
class Case:
    """A model of about 12 x layers x hidden^2 weights."""

    hidden: int
    layers: int
    rank: int = 0

    @property
    def millions(self) -> float:
        return 12 * self.layers * self.hidden**2 / 1e6


CASES = (Case(128, 5), Case(384, 6), Case(768, 8), Case(1024, 16), Case(1024, 16, rank=16))


@dataclass(frozen=True)
class Cost:
    """Of one save, in seconds."""

    still: float
    on_disk: float
    at_once: float
    load: float


def make_trainer(case: Case, folder: Path) -> TorchTrainer:
    """One that has taken a step, so that it has an optimizer's state."""
    model = tiny_model(folder, hidden=case.hidden, layers=case.layers)
    lora: dict[str, Any] = {"rank": case.rank}
    trainer = TorchTrainer(
        Config(model=str(model), lora=lora, loss={"kl_beta": 0}), total_steps=None, weights_format="tensors"
    )
    tokens = list(range(8))
    trainer.forward_backward([TrainSequence(tokens, [-5.0] * 8, [0, 0, *[1] * 6], 1.0, 0)])
    trainer.optim_step()
    return trainer


def measure(trainer: TorchTrainer, folder: Path) -> Cost:
    start = time.perf_counter()
    written = trainer.begin_save_state(folder / "beside")
    still = time.perf_counter() - start
    written.result()
    on_disk = time.perf_counter() - start
    start = time.perf_counter()
    trainer.save_state(folder / "at-once")
    at_once = time.perf_counter() - start
    start = time.perf_counter()
    trainer.load_state_with_optimizer(folder / "at-once")
    return Cost(still, on_disk, at_once, time.perf_counter() - start)


def rows(folder: Path, repeats: int, largest: float) -> Iterator[str]:
    yield "| model | trained | on the disk | stands still | without a copy | on the disk after | load |"
    yield "|---|---|---|---|---|---|---|"
    for case in CASES:
        if case.millions > 1.05 * largest:
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            trainer = make_trainer(case, Path(place) / "model")
            costs = []
            for _ in range(repeats):
                costs.append(measure(trainer, Path(place)))
                size = sum(file.stat().st_size for file in (Path(place) / "at-once").iterdir())
                for name in ("beside", "at-once"):
                    shutil.rmtree(Path(place) / name)
            trained = sum(weight.numel() for weight in trainer.policy.trained_parameters())
        kind = f"LoRA rank {case.rank}" if case.rank else "full"
        seconds = [
            statistics.median(getattr(cost, name) for cost in costs) for name in ("still", "at_once", "on_disk", "load")
        ]
        shown = " | ".join(f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s" for value in seconds)
        yield f"| {case.millions:.0f} M, {kind} | {trained / 1e6:.1f} M | {size / 1e6:,.0f} MB | {shown} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--largest", type=float, default=200, help="of the models, in millions of weights")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    transformers_logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for row in rows(options.folder or Path(tempfile.gettempdir()), options.repeats, options.largest):
        print(row, flush=True)


if __name__ == "__main__":
    main()
