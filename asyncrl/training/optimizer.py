"""AdamW, its schedule, and one step of it over an accumulated gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from asyncrl.config import OptimizerConfig
from asyncrl.errors import ConfigError

EIGHT_BIT_DEVICES = ("cuda", "cpu")


def make_optimizer(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over `parameters`; weight decay spares vectors (norms, biases).

    Raises `ConfigError` for states of 8 bits without `bitsandbytes`, or on a device that it does not know.
    """
    trained = list(parameters)
    matrices = [parameter for parameter in trained if parameter.ndim >= 2]
    vectors = [parameter for parameter in trained if parameter.ndim < 2]
    everything = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in everything if group["params"]]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    kind = trained[0].device.type
    if config.state_bits == 8:
        return _adamw_8bit(kind)(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=kind in ("cpu", "cuda", "mps"))


def _adamw_8bit(device: str) -> type[torch.optim.Optimizer]:
    """AdamW whose two means are stored in blocks of 256 bytes with one scale each (arXiv:2110.02861)."""
    if device not in EIGHT_BIT_DEVICES:
        raise ConfigError(
            f"optimizer.state_bits is 8, which `bitsandbytes` does not have on {device}, only on "
            f"{' and '.join(EIGHT_BIT_DEVICES)}. Use 32."
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"optimizer.state_bits is 8, which needs `bitsandbytes`, and it cannot be imported: {error}. "
            "Install it with: pip install 'asyncrl[8bit]'"
        ) from error

    class MatricesIn8Bit(AdamW8bit):  # type: ignore[misc]
        def get_config(self, group_index: int, index: int, group: dict[str, Any]) -> dict[str, Any]:
            """The library's overrides of single parameters are global to the process and go by `id`; this is not."""
            found: dict[str, Any] = super().get_config(group_index, index, group)
            return found if group["params"][index].ndim >= 2 else {**found, "optim_bits": 32}

    return MatricesIn8Bit


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
    rate too; from there it falls, and would reach its lowest one step after the last: no step is wasted on a rate of 0.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    assert total_steps is not None
    decay_steps = max(total_steps - config.warmup_steps, 1)
    progress = min((step - 1 - config.warmup_steps) / decay_steps, 1.0)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.min_rate_ratio + (1 - config.min_rate_ratio) * left)


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


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """What the optimizer knows of each parameter. A plain count becomes a tensor, as all else is one."""
    return {
        name: {key: value if isinstance(value, Tensor) else torch.tensor(value) for key, value in state.items()}
        for name, parameter in parameters.items()
        if (state := optimizer.state.get(parameter))
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tree: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """The other way round. Settings, such as betas, stay those of the config."""
    optimizer.state.clear()
    for name, state in tree.items():
        device = parameters[name].device
        optimizer.state[parameters[name]] = {
            key: value.item() if value.dtype == torch.int64 and not value.ndim else value.to(device)
            for key, value in state.items()
        }
