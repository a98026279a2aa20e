"""Low-rank adapters (arXiv:2106.09685) by `peft`: a fresh one or a saved one, and the model as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from asyncrl.config import LoraConfig
from asyncrl.errors import ConfigError, ModelError
from asyncrl.saved_adapter import WEIGHTS, SavedAdapter, read_adapter

log = structlog.get_logger(__name__)

PREFIX, DOWN = "base_model.model.", ".lora_A.weight"
"""What `peft` writes around the name of a module."""
BASE_LAYER, OWN = ".base_layer", ".lora_"
"""What it writes into the names of weights: around those of a module that has an adapter, and those of the adapter."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The adapter of a model: its weights are the only ones that train."""

    model: PeftModel
    start: tuple[Tensor, ...] | None = None
    """A copy of the weights of a warm start, in the order of `parameters`; None of a fresh one, which began as 0."""

    def tensors(self) -> dict[str, Tensor]:
        """Its weights under the names of `peft`."""
        tensors: dict[str, Tensor] = get_peft_model_state_dict(self.model, save_embedding_layers=False)
        return tensors

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def starting_here(self) -> Adapter:
        """The same adapter, begun with the weights that it has now."""
        return Adapter(self.model, tuple(parameter.detach().clone() for parameter in self.parameters()))

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """The model is within what it was before training. Only for forwards without gradient."""
        if self.start is None:
            with self.model.disable_adapter():
                yield
            return
        # The parameters stay the same objects: a graph that waits for its backward finds its own data again.
        parameters = self.parameters()
        trained = [parameter.data for parameter in parameters]
        try:
            _point(parameters, self.start)
            yield
        finally:
            _point(parameters, trained)


def attach(causal_lm: PreTrainedModel, config: LoraConfig, seed: int) -> Adapter:
    """Give `causal_lm` an adapter, in place: that of `config.warm_start`, or a fresh one.

    Of a fresh one A is drawn from `seed` and B is 0, so that nothing changes yet. Raises `ConfigError`.
    """
    if config.warm_start is not None:
        return _attach_saved(causal_lm, read_adapter(config.warm_start))
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    try:
        return _attach(causal_lm, config.rank, config.alpha, targets, seed)
    except ValueError as error:
        raise ConfigError(
            f"lora.targets={config.targets!r} does not fit {type(causal_lm).__name__}: {error} "
            "Use 'all-linear', or names of its linear layers."
        ) from error


def is_adapters(name: str) -> bool:
    """Whether a weight of that name belongs to an adapter, and not to its base model."""
    return OWN in name


def plain_name(name: str) -> str:
    """The name that a weight of the base model has without an adapter."""
    return name.replace(BASE_LAYER, "")


def merged_weights(causal_lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of the base model, one after the other, with its adapter (if it has one) laid into them.

    Each is added up in float32; the model itself stays as it is. Raises `ModelError` for an adapter on an embedding
    that is the output head too: the head goes without it, so one tensor cannot be both.
    """
    for name, weight in causal_lm.named_parameters():
        module, _, leaf = name.rpartition(".")
        if is_adapters(name):
            continue
        if leaf != "weight" or not module.endswith(BASE_LAYER):
            yield name, weight.detach()
            continue
        layer = causal_lm.get_submodule(module.removesuffix(BASE_LAYER))
        assert isinstance(layer, LoraLayer)
        if isinstance(layer, LoraEmbedding) and weight is causal_lm.get_output_embeddings().weight:
            raise ModelError(
                f"the adapter on {module.removesuffix(BASE_LAYER)} cannot be merged: {type(causal_lm).__name__} uses "
                "that weight as its output head too, without the adapter. Save the adapter, or leave the embedding out "
                "of lora.targets."
            )
        with torch.no_grad():
            delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            yield name, weight.float() + delta


def _attach(causal_lm: PreTrainedModel, rank: int, alpha: float, targets: str | list[str], seed: int) -> Adapter:
    settings = PeftLoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in causal_lm.modules()),  # the linear layers of GPT-2
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(causal_lm, settings)
    assert isinstance(model, PeftModel)
    return Adapter(model.eval())


def _attach_saved(causal_lm: PreTrainedModel, saved: SavedAdapter) -> Adapter:
    tensors = load_file(saved.folder / WEIGHTS)
    # The modules that have tensors, whatever patterns once chose them.
    modules = [name.removeprefix(PREFIX).removesuffix(DOWN) for name in tensors if name.endswith(DOWN)]
    try:
        adapter = _attach(causal_lm, saved.rank, saved.alpha, modules, seed=0)
    except ValueError as error:
        raise _does_not_fit(causal_lm, saved, str(error)) from error
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if different := sorted(expected.items() ^ found.items()):
        name = different[0][0]
        raise _does_not_fit(
            causal_lm,
            saved,
            f"{name} has the shape {found.get(name, 'of nothing')} in the adapter, and the model expects "
            f"{expected.get(name, 'none of that name')}.",
        )
    if not _same_model(saved.base, causal_lm.name_or_path):
        log.warning(
            "adapter_of_another_base", adapter=str(saved.folder), trained_on=saved.base, model=causal_lm.name_or_path
        )
    set_peft_model_state_dict(adapter.model, tensors)
    return adapter.starting_here()


def _does_not_fit(causal_lm: PreTrainedModel, saved: SavedAdapter, reason: str) -> ConfigError:
    return ConfigError(
        f"the adapter of lora.warm_start in {str(saved.folder)!r} does not fit the model {causal_lm.name_or_path!r}: "
        f"{reason} It was trained on {saved.base!r}: use that as `model`, or another adapter."
    )


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean the same model, as far as names say: a folder has many."""
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def _point(parameters: list[nn.Parameter], tensors: tuple[Tensor, ...] | list[Tensor]) -> None:
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
