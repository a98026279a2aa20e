"""Weights on their way out: a snapshot in memory, or a folder that `transformers`, `peft` and vLLM open."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from asyncrl.model_facts import NO_CODE
from asyncrl.training.lora import merged_weights, plain_name
from asyncrl.training.model import PolicyModel, quiet_progress

log = structlog.get_logger(__name__)


def snapshot(policy: PolicyModel) -> dict[str, Tensor]:
    """A copy of all weights under their state-dict names (tied ones once), or of the adapter's."""
    if policy.adapter is not None:
        return {name: tensor.detach().clone() for name, tensor in policy.adapter.tensors().items()}
    return {name: parameter.detach().clone() for name, parameter in policy.causal_lm.named_parameters()}


def write_folder(policy: PolicyModel, folder: Path, dtype: torch.dtype, merge: bool = False) -> None:
    """Write the model in `dtype`, or the adapter, to `folder`: beside it first, then renamed, so that whoever
    sees `folder` sees all of it. An older folder of that name is replaced.

    `merge` writes the model that an adapter makes of its base. Raises `ModelError` where there is no such model, and
    `OSError` where the disk is full.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with quiet_progress(), _disk_errors(unfinished):
        if policy.adapter is not None and not merge:
            # "auto" would look the base model up on the hub to see whether its embedding had been resized.
            policy.adapter.model.save_pretrained(str(unfinished), save_embedding_layers=False)
        else:
            _write_full(policy, unfinished, dtype)
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


@contextmanager
def _disk_errors(unfinished: Path) -> Iterator[None]:
    """The folder goes where it cannot be finished: half a model fills the rest of a full disk."""
    try:
        yield
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except SafetensorError as error:  # it hides the system's error in its text: "... (os error 28)"
        shutil.rmtree(unfinished, ignore_errors=True)
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(unfinished)) from None


def prune(folder: Path, newest: int, keep: int) -> None:
    """Remove the folders `policy-v*` of all versions up to `newest` but the last `keep`."""
    versions = sorted(int(path.name.removeprefix("policy-v")) for path in folder.glob("policy-v*"))
    for old in [version for version in versions if version <= newest][:-keep]:
        shutil.rmtree(folder / f"policy-v{old}")


def write_model(policy: PolicyModel, folder: Path, source: str, merge: bool = False) -> None:
    """As `write_folder` in the dtype of the source checkpoint, with the tokenizer of `source` beside it."""
    write_folder(policy, folder, policy.source_dtype, merge)
    # From a folder without a tokenizer, `transformers` would make an empty one.
    if Path(source).is_dir() and not any(Path(source).glob("*token*")):
        log.warning("tokenizer_not_saved", model=source, because="there is none in the model's folder")
        return
    AutoTokenizer.from_pretrained(source, **NO_CODE).save_pretrained(folder)


def _write_full(policy: PolicyModel, folder: Path, dtype: torch.dtype) -> None:
    causal_lm = policy.causal_lm
    parameters = {plain_name(name): weight.to(dtype) for name, weight in merged_weights(causal_lm)}
    state = causal_lm.state_dict().items()
    buffers = {plain_name(name): buffer for name, buffer in state if _is_buffer(causal_lm, name)}
    causal_lm.save_pretrained(folder, state_dict={**parameters, **buffers})
    # `save_pretrained` writes the dtype of the model in memory, not that of the tensors it was given.
    path = folder / "config.json"
    settings: dict[str, Any] = json.loads(path.read_text())
    settings["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _is_buffer(module: torch.nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf in module.get_submodule(owner)._buffers
