"""What a saved state is of, and why it is not for another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.training.lora import is_adapters, plain_name
from asyncrl.training.model import PolicyModel

VALUES_PER_WEIGHT = 32


@dataclass(frozen=True, slots=True)
class Facts:
    """What must be the same where a state is taken up again."""

    model: str
    """`config.model`"""
    architecture: str
    shapes: str
    """Digest of the names and shapes of the model's weights, without an adapter's."""
    base: str
    """Digest of some values of each of them, as `model` has them. An adapter says nothing without its base."""
    reference: str | None
    """Digest of what a KL refers to, the weights of step 0: an adapter's if it began with some, else the model's. None:
    there is no KL."""
    lora: dict[str, Any] | None
    """rank, alpha and targets of the adapter that is trained. None: the full model is."""
    trained: str
    """Digest of the names and shapes of the weights that are trained."""
    optimizer: str
    dtype: str
    """Of the computation. May differ."""
    torch: str
    """Its version. May differ."""

    @classmethod
    def of(cls, policy: PolicyModel, config: Config) -> Facts:
        """Those of a model that was just loaded."""
        named = dict(policy.causal_lm.named_parameters())
        base = {plain_name(name): weight for name, weight in named.items() if not is_adapters(name)}
        adapter = config.lora.model_dump(mode="json", include={"rank", "alpha", "targets"})
        return cls(
            model=config.model,
            architecture=type(policy.causal_lm).__name__,
            shapes=_digest_of_shapes(base),
            base=digest_of_values(base.values()),
            reference=None,
            lora=adapter if policy.adapter is not None else None,
            trained=_digest_of_shapes({name: weight for name, weight in named.items() if weight.requires_grad}),
            optimizer=f"AdamW in {config.optimizer.state_bits} bits",
            dtype=str(policy.compute_dtype).removeprefix("torch."),
            torch=torch.__version__,
        )

    def why_not(self, here: Facts, *, optimizer: bool) -> str | None:
        """Why this state cannot be taken up by a trainer with the facts `here`; None: it can.

        `optimizer`: whether its optimizer is wanted too, or the weights alone.
        """
        if (self.architecture, self.shapes) != (here.architecture, here.shapes):
            return self._of_another_model(here, "the weights have other names or shapes")
        if _scale(self.lora) != _scale(here.lora) or self.trained != here.trained:
            return (
                f"it is of {_trained(self.lora)}, and this run trains {_trained(here.lora)}. Set "
                f"{_settings(self.lora)}, or name a checkpoint of the same kind."
            )
        # Of a full model none of its first weights stay, and weights alone are a new start.
        if self.base != here.base and (optimizer or self.lora is not None):
            return self._of_another_model(here, "the shapes are the same, but not the values that training began from")
        if optimizer and None not in (self.reference, here.reference) and self.reference != here.reference:
            return (
                "the weights that it began from, which its KL refers to, are not those that this run begins from. Set "
                "lora.warm_start or checkpoint.init_from as it was."
            )
        if optimizer and self.optimizer != here.optimizer:
            return (
                f"its optimizer is {self.optimizer}, and that of this run {here.optimizer}. Set optimizer.state_bits "
                "as it was, or start from its weights alone with checkpoint.init_from."
            )
        return None

    def _of_another_model(self, here: Facts, difference: str) -> str:
        return (
            f"it is of another model: made from {self.model!r} ({self.architecture}), where this run trains "
            f"{here.model!r} ({here.architecture}); {difference}. Set model={self.model!r}, or name a checkpoint of "
            "this model."
        )


def _scale(lora: Mapping[str, Any] | None) -> tuple[Any, Any] | None:
    return None if lora is None else (lora["rank"], lora["alpha"])


def _trained(lora: Mapping[str, Any] | None) -> str:
    if lora is None:
        return "a full model"
    return f"an adapter of LoRA rank {lora['rank']} (alpha {lora['alpha']:g}, on {_names(lora['targets'])})"


def _settings(lora: Mapping[str, Any] | None) -> str:
    if lora is None:
        return "lora.rank=0"
    targets = lora["targets"] if isinstance(lora["targets"], str) else json.dumps(lora["targets"])
    return f"lora.rank={lora['rank']}, lora.alpha={lora['alpha']:g} and lora.targets={targets}"


def _names(targets: str | Iterable[str]) -> str:
    return targets if isinstance(targets, str) else ", ".join(targets)


def _digest_of_shapes(named: Mapping[str, Tensor]) -> str:
    return _digest(json.dumps(sorted((name, list(weight.shape)) for name, weight in named.items())).encode())


def digest_of_values(weights: Iterable[Tensor]) -> str:
    """Of values spread over each tensor. In bfloat16: a frozen base may be kept in that, or in float32."""
    parts = []
    for weight in weights:
        flat = weight.detach().reshape(-1)
        parts.append(flat[:: max(1, flat.numel() // VALUES_PER_WEIGHT)][:VALUES_PER_WEIGHT].to(torch.bfloat16))
    return _digest(torch.cat(parts).cpu().view(torch.int16).numpy().tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
