"""The states of torch's generators, kept and set again."""

from __future__ import annotations

import torch
from torch import Tensor


def randomness(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_randomness(device: torch.device, states: dict[str, Tensor]) -> None:
    """A state that was saved on another kind of device says nothing here."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
