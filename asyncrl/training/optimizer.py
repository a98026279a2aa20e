"""AdamW, its schedule, and one step of it over an accumulated gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from asyncrl.config import OptimizerConfig
from asyncrl.errors import ConfigError


def make_optimizer(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameters`; weight decay spares vectors (norms, biases)."""
    trained = list(parameters)
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=trained[0].device.type in ("cpu", "cuda", "mps"),
    )


def check_schedule(config: OptimizerConfig, total_steps: int | None) -> None:
    """Raises `ConfigError` for a schedule that has no end to fall to."""
    if config.schedule != "constant" and total_steps is None:
        raise ConfigError(
            f"optimizer.schedule is {config.schedule!r}, but the number of steps is not known. "
            "Set max_steps, or use optimizer.schedule='constant'."
        )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int | None) -> float:
    """The rate of optimizer step `step`, counted from 1.

    Warm-up rises evenly and reaches the full rate at step `warmup_steps`. The step after it has the full
    rate too; from there it falls, and would be 0 one step after the last: no step is wasted on a rate of 0.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    assert total_steps is not None
    decay_steps = max(total_steps - config.warmup_steps, 1)
    progress = min((step - 1 - config.warmup_steps) / decay_steps, 1.0)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * left


@torch.no_grad()
def normalize_and_clip(parameters: Iterable[Tensor], denominator: float, max_norm: float | None) -> float:
    """Divide the gradients by `denominator`, clip their global norm, and give that norm before clipping.

    A norm that is not finite comes back as it is, and the gradients are left alone.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not grads:
        return 0.0
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) / denominator
    if not math.isfinite(norm):
        return norm
    factor = 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))
    if factor != denominator:
        torch._foreach_mul_(grads, factor / denominator)
    return norm
