"""What is known of the optimizer batch that is being accumulated, and what is reported of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from asyncrl.losses import Counts, MetricSums, Normalization, denominator
from asyncrl.training.batch import Batch


@dataclass(slots=True)
class Accumulator:
    """Sums over the microbatches since the last optimizer step. One per optimizer batch; the trainer writes it."""

    device: torch.device
    counts: Counts = field(default_factory=Counts)
    sequences: int = 0
    train_tokens: int = 0
    """Tokens of the sequences, what they share counted for each."""
    row_tokens: int = 0
    """Tokens that went through the model: shared ones once, and none that only ends a sequence."""
    shared_tokens: int = 0
    """Tokens that another sequence had brought already."""
    padded_tokens: int = 0
    """`row_tokens` and the padding beside them."""
    microbatches: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """Loss sum of each microbatch, without gradient."""
    metrics: MetricSums | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def add(
        self,
        batch: Batch,
        counts: Counts,
        loss: Tensor,
        metrics: MetricSums | None,
        padded_tokens: int,
    ) -> None:
        """Account for one microbatch."""
        self.counts += counts
        self.sequences += batch.sequences
        self.train_tokens += batch.train_tokens
        self.row_tokens += batch.tokens.layout.tokens
        self.shared_tokens += batch.shared_tokens
        self.microbatches += 1
        self.padded_tokens += padded_tokens
        self.losses.append(loss.detach())
        if metrics is not None:
            self.metrics = metrics if self.metrics is None else self.metrics + metrics

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the time within as `<phase>_s`; on a GPU, until its work is done."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def denominator(self, normalization: Normalization) -> float:
        """What the summed gradient is divided by."""
        return denominator(self.counts, normalization)

    def loss(self, normalization: Normalization) -> float:
        """The loss over the whole batch."""
        return float(torch.stack(self.losses).sum()) / self.denominator(normalization)

    def report(self, normalization: Normalization) -> dict[str, float]:
        """Metrics of the batch by name. It must hold something."""
        return {
            "loss": self.loss(normalization),
            "train_tokens": float(self.train_tokens),
            "row_tokens": float(self.row_tokens),
            "shared_tokens": float(self.shared_tokens),
            "loss_tokens": float(self.counts.loss_tokens),
            "sequences": float(self.sequences),
            "microbatches": float(self.microbatches),
            "pack_efficiency": self.row_tokens / self.padded_tokens,
            **{f"{phase}_s": seconds for phase, seconds in self.seconds.items()},
            **({} if self.metrics is None else self.metrics.means()),
        }
