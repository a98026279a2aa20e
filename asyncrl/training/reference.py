"""The reference model of a KL or a preference loss: the policy before it was trained. Forward only. N targets."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from asyncrl.config import TrainerConfig
from asyncrl.errors import ConfigError
from asyncrl.training.batch import Tokens
from asyncrl.training.model import PolicyModel, find_head


@dataclass(frozen=True, slots=True)
class Reference:
    """With LoRA the policy itself, its adapter as it began: a saved one with its first weights, a fresh one switched
    off. In a full fine-tune a frozen copy of it."""

    policy: PolicyModel
    model: PolicyModel
    """The same object as `policy` where an adapter is trained."""

    def token_logprobs(self, tokens: Tokens, temperature: float) -> Tensor:
        """Log-probs [N] of the targets, without gradient, on the device of the policy."""
        adapter = self.model.adapter
        with torch.no_grad(), contextlib.nullcontext() if adapter is None else adapter.at_start():
            found = self.model.token_logprobs(_moved(tokens, self.model.device), temperature).logprobs
        return found.to(self.policy.device)


def make_reference(policy: PolicyModel, config: TrainerConfig) -> Reference:
    """The reference of `policy` as it is now. A copy goes to `reference_device` in `reference_dtype`.

    Raises `ConfigError` for a device that is not there.
    """
    if policy.adapter is not None:
        return Reference(policy, policy)
    device = policy.device if config.reference_device is None else _find_device(config.reference_device)
    dtype = policy.compute_dtype if config.reference_dtype == "auto" else getattr(torch, config.reference_dtype)
    # Nothing is trained here, so weights may be kept in the dtype that is computed in: no float32 masters.
    causal_lm = copy.deepcopy(policy.causal_lm).requires_grad_(False).eval().to(device, dtype)
    model = replace(policy, causal_lm=causal_lm, head=find_head(causal_lm), device=device, compute_dtype=dtype)
    return Reference(policy, model)


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # what torch raises for a backend it was built without
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"trainer.reference_device is {name!r}, which torch {torch.__version__} cannot use: {reason} "
            "Use 'cpu', 'cuda:1', or None for the trainer's own device."
        ) from error
    return device


def _moved(value: Any, device: torch.device) -> Any:
    """The same on `device`: tensors, and whatever holds them."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value
