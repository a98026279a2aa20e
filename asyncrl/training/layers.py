"""What may be done to the decoder layers of a model: computing them again in backward, compiling them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from asyncrl.errors import ConfigError


def enable_checkpointing(causal_lm: PreTrainedModel) -> None:
    """Layers compute their activations again in backward. They do so only in training mode, which is given to
    the layers alone and not to what is in them, so that dropout stays off."""
    if not causal_lm.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing is on, but {type(causal_lm).__name__} does not support it. Switch it off."
        )
    causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in _layers(causal_lm):
        layer.training = True


def compile_layers(causal_lm: PreTrainedModel) -> None:
    """Layers run through `torch.compile` from their next call on, for rows of any length.

    Layer by layer, since all of a model's layers share one compiled code; attention is left as it is.
    """
    layers = list(_layers(causal_lm))
    if not layers:
        raise ConfigError(
            f"trainer.compile is on, but {type(causal_lm).__name__} has no layers that can be compiled one by one. "
            "Switch it off."
        )
    for layer in layers:
        layer.compile(dynamic=True)


def _layers(causal_lm: PreTrainedModel) -> Iterator[nn.Module]:
    return (module for module in causal_lm.modules() if isinstance(module, GradientCheckpointingLayer))
