"""Weights by version: modules that share what they can with the base model.

A version is a copy of the base model's module tree. Tensors that the version does not bring are the base model's
own, so that an adapter costs no more memory than the modules it touches, and nothing at all in bfloat16.

- Full weights: the published tensors become the parameters as they are, without a copy when dtype and device fit.
- LoRA in float32: merged, W + scale B A, which decodes at the speed of the base model.
- LoRA in less: beside W, because W + scale B A would round small updates away (arXiv 2106.09685 for the notation).

`prepare`, `hold` and `release` may be called on any thread while the others are decoded; `add` and `retire` belong to
the worker.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from asyncrl.errors import ModelError, SamplerError
from asyncrl.model_facts import DATA_ALONE, NO_CODE, why_unusable
from asyncrl.sampling.embedded.attention import use_grouped_attention
from asyncrl.types import Weights

_LORA = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class LiveModel:
    """A module that can be drawn from, and how it wants to be called."""

    module: nn.Module
    version: int
    layers: int
    vocabulary: int
    device: torch.device
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of every decoding forward, as far as this architecture knows them."""
    takes_positions: bool = True

    def last_logits(self, ids: Tensor, *, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        """`ids` [n, Q] after the cached columns -> logits [n, V] of the last column."""
        more = {"position_ids": positions} if self.takes_positions else {}
        output = self.module(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more, **self.options
        )
        logits: Tensor = output.logits
        return logits[:, -1]

    def logprobs(self, ids: Tensor, start: int, cache: Cache | None = None, seen: int = 0) -> Tensor:
        """`ids` [N] -> [N - start] float32 log-probs of those from `start` on, at temperature 1.

        `cache` has the keys and values of the first `seen` tokens, fewer than `start`.
        """
        last = len(ids) - start + 1
        options = {**self.options, "logits_to_keep": last} if "logits_to_keep" in self.options else {**self.options}
        if self.takes_positions:
            options["position_ids"] = torch.arange(seen, len(ids), device=ids.device)[None]
        output = self.module(input_ids=ids[None, seen:], past_key_values=cache, use_cache=cache is not None, **options)
        logits: Tensor = output.logits[0, -last:-1]
        return logits.float().log_softmax(-1).gather(-1, ids[start:, None])[:, 0]  # from logits [N - start, V]


def load_base(model: str, *, device: torch.device, dtype: torch.dtype) -> LiveModel:
    """Version 0, from a folder or the hub.

    Raises:
        ModelError: nothing usable is there, or the model keeps its past in something else than keys and values.
    """
    try:
        config = AutoConfig.from_pretrained(model, **NO_CODE)
        with _no_progress_bars():
            module = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=dtype, **DATA_ALONE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_what_is_there(model, error)) from error
    layers = DynamicCache(config=config).layers
    strange = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, DynamicLayer)})
    if strange:
        raise ModelError(
            f"model {model!r} ({config.model_type}) keeps its past in {', '.join(strange)}; the embedded sampler needs "
            "ordinary attention layers. Use sampler.kind='vllm', or another model."
        )
    module.to(device).eval().requires_grad_(False)
    use_grouped_attention(module)
    known = inspect.signature(module.forward).parameters
    return LiveModel(
        module=module,
        version=0,
        layers=len(layers) or config.get_text_config(decoder=True).num_hidden_layers,
        vocabulary=module.get_output_embeddings().weight.shape[0],
        device=device,
        options={"logits_to_keep": 1} if "logits_to_keep" in known else {},
        takes_positions="position_ids" in known,
    )


class ModelVersions:
    """Owns the live models. Version 0 is the base model from disk."""

    def __init__(self, base: LiveModel, *, keep: int, lora_scale: float | None) -> None:
        self.base = base
        self.newest = base.version
        self._keep = keep
        self._lora_scale = lora_scale
        self._live = {base.version: base}
        self._held: Counter[int] = Counter()
        self._lock = Lock()  # between what is held and what is retired

    def get(self, version: int) -> LiveModel | None:
        return self._live.get(version)

    def models(self) -> set[LiveModel]:
        """All that are live."""
        return set(self._live.values())

    def loaded(self) -> list[int]:
        """Versions that can be asked for, oldest first."""
        return sorted(self._live)

    @torch.no_grad()
    def prepare(self, weights: Weights) -> LiveModel:
        """A model of `weights`, not live yet.

        Raises:
            SamplerError: the tensors are not those of this model.
        """
        if weights.tensors is None:
            raise SamplerError(
                f"version {weights.version} came without tensors; the embedded sampler takes no files. "
                "Export the weights in the form that `sampler.wants` names."
            )
        module = _shared_copy(self.base.module)
        if weights.adapter:
            if self._lora_scale is None:
                raise SamplerError(f"version {weights.version} is an adapter, but lora.rank is 0. Set lora.rank.")
            _adapt(module, weights.tensors, self._lora_scale)
        else:
            _replace(module, weights.tensors)
        base = self.base
        return LiveModel(
            module, weights.version, base.layers, base.vocabulary, base.device, base.options, base.takes_positions
        )

    def add(self, model: LiveModel) -> None:
        self._live[model.version] = model
        self.newest = model.version

    def hold(self) -> int:
        """The newest version, which stays until `release`."""
        with self._lock:
            self._held[self.newest] += 1
            return self.newest

    def release(self, version: int) -> None:
        """It goes when versions are retired the next time."""
        with self._lock:
            self._held[version] -= 1

    def retire(self, in_use: set[int]) -> None:
        """Let go of all but the newest `keep` versions, those in use and those that are held."""
        with self._lock:
            self._held = +self._held
            kept = {*self.loaded()[-self._keep :], self.newest, *in_use, *self._held}
            self._live = {version: model for version, model in self._live.items() if version in kept}


def _shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors and the same config."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    for part in module.modules():
        config = getattr(part, "config", None)
        memo[id(config)] = config
    return copy.deepcopy(module, memo)


def _replace(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put full weights into `module`. Tied parameters may come under one or all of their names."""
    names_of: dict[int, list[str]] = {}
    own = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
    for name, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(name)
    strange = sorted(tensors.keys() - own.keys())
    missing = []
    for names in names_of.values():
        found = next((tensors[name] for name in names if name in tensors), None)
        old = own[names[0]]
        if found is None:
            missing += names[:1] if isinstance(old, nn.Parameter) else []  # buffers that no checkpoint holds
            continue
        if found.shape != old.shape:
            raise SamplerError(f"{names[0]}: published as {tuple(found.shape)}, the model has {tuple(old.shape)}.")
        new = found.detach().to(old.device, old.dtype)
        new = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for name in names:
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, new)
    if strange or missing:
        raise SamplerError(
            f"the published tensors are not those of the model: {len(missing)} are missing {missing[:3]}, "
            f"{len(strange)} are unknown {strange[:3]}. Trainer and sampler must load the same model."
        )


def _adapt(module: nn.Module, tensors: Mapping[str, Tensor], scale: float) -> None:
    """Put a LoRA adapter on `module`."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LORA.fullmatch(name)
        if match is None:
            raise SamplerError(f"adapter tensor {name!r} is not a lora_A or lora_B weight, which is all that is known.")
        pairs.setdefault(match["module"], {})[match["side"]] = tensor.detach()
    for path, sides in pairs.items():
        try:
            target = module.get_submodule(path)
        except AttributeError as error:
            raise SamplerError(f"the adapter has a part for {path!r}, which the model does not have.") from error
        if sides.keys() != {"A", "B"} or not isinstance(target, nn.Linear | Conv1D):
            raise SamplerError(
                f"{path}: an adapter needs lora_A and lora_B of a linear layer; found lora_{', lora_'.join(sides)} for "
                f"{type(target).__name__}. Choose lora.targets among linear layers."
            )
        down, up = (sides[side].to(target.weight.device, torch.float32) for side in "AB")  # [r, in], [out, r]
        if target.weight.dtype == torch.float32:
            delta = scale * (up @ down)  # [out, in]
            target.weight = nn.Parameter(target.weight + (delta.T if isinstance(target, Conv1D) else delta), False)
        else:
            parent, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(parent), leaf, _AdaptedLinear(target, down, up, scale))


class _AdaptedLinear(nn.Module):
    """base(x) + scale B A x, in the base's dtype."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> None:
        super().__init__()
        dtype = next(base.parameters()).dtype
        self.base = base
        self.scale = scale
        self.register_buffer("down", down.T.to(dtype).contiguous())  # [in, r]
        self.register_buffer("up", up.T.to(dtype).contiguous())  # [r, out]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + (x @ self.get_buffer("down") @ self.get_buffer("up")) * self.scale
        return out


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _what_is_there(model: str, error: Exception) -> str:
    folder = Path(model)
    if folder.is_dir():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        found = f"the folder {model!r} holds {found}"
    else:
        found = f"{model!r} is no folder, and the Hugging Face hub gave no such model"
    reason = str(error).strip().splitlines()[0]
    return (
        f"cannot load the model: {found} ({type(error).__name__}: {reason}). Expected a folder with config.json and "
        "safetensors, or the name of a causal language model on the hub. Check `model`."
        f"{why_unusable(model)}"
    )
