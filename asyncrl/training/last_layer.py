"""The last layer of a model, spared the work that nobody reads.

T tokens of a row, R of them read. Only the outputs that predict a target are read, and what comes after the last
layer's attention is done token by token: there it is done for those tokens alone, and the others are 0. Before
that all tokens count, for their keys and values. Of a model with L layers this spares up to 0.7 / L of a step
where few tokens are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

PARTS = ("self_attn.o_proj", "mlp")
"""What comes after attention, under the names that nearly all models give it; others keep their part whole."""


@dataclass(slots=True)
class _Narrowed:
    """Owns which tokens are read, while the layer is in its forward (or in its second one, of checkpointing)."""

    read: Tensor | None = None
    tokens: int = 0

    def begin(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.read = kwargs.get("read")

    def end(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.read = None

    def select(self, part: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The input of a part: [1, T, H] -> [1, R, H]."""
        if self.read is None:
            return None
        self.tokens = args[0].shape[1]
        return (args[0].index_select(1, self.read), *args[1:])

    def spread(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Its output: [1, R, H] -> [1, T, H]."""
        if self.read is None:
            return None
        whole = output.new_zeros(1, self.tokens, output.shape[2])
        return whole.index_copy(1, self.read, output)


def narrow_last_layer(causal_lm: PreTrainedModel) -> list[RemovableHandle]:
    """From now on the keyword `read` ([R] places of the row) of the model's forward narrows its last layer.

    The handles undo it. There are none for a model without such a layer.
    """
    decoder = causal_lm.get_decoder()
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    known = dict(layers[-1].named_modules()) if layers else {}
    parts = [known[name] for name in PARTS if name in known]
    if not parts:
        return []
    narrowed = _Narrowed()
    handles = [
        layers[-1].register_forward_pre_hook(narrowed.begin, with_kwargs=True),
        layers[-1].register_forward_hook(narrowed.end),
    ]
    for part in parts:
        handles += [part.register_forward_pre_hook(narrowed.select), part.register_forward_hook(narrowed.spread)]
    return handles
