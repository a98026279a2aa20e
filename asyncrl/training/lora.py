"""Low-rank adapters (arXiv:2106.09685) by `peft`: attaching one, and switching it off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.config import LoraConfig
from asyncrl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of a model: its weights are the only ones that train."""

    model: PeftModel

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under the names of `peft`."""
        tensors: dict[str, Tensor] = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return tensors

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model is its base within."""
        with self.model.disable_adapter():
            yield


def attach(causal_lm: PreTrainedModel, config: LoraConfig, seed: int) -> Adapter:
    """Give `causal_lm` a fresh adapter, in place: A is drawn from `seed`, B is 0, so that nothing changes yet."""
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = PeftLoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = get_peft_model(causal_lm, settings)
        except ValueError as error:
            raise ConfigError(
                f"lora.targets={config.targets!r} does not fit {type(causal_lm).__name__}: {error} "
                "Use 'all-linear', or names of its linear layers."
            ) from error
    assert isinstance(model, PeftModel)
    return Adapter(model.eval())
