"""The torch side of the engine: sequences in, weights out. Imported only where a model is trained."""

from __future__ import annotations

from asyncrl.training.thread import ThreadedTrainer
from asyncrl.training.trainer import TorchTrainer

__all__ = ["ThreadedTrainer", "TorchTrainer"]
