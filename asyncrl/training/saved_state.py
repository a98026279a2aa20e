"""A trainer's state on the disk (checkpoint.py), read back: refused where it is damaged, or of something else."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from asyncrl.errors import CheckpointError
from asyncrl.training.checkpoint import FACTS, FORMAT, checksum, sealed
from asyncrl.training.facts import Facts
from asyncrl.training.tensor_files import INDEX, Tree, leaves, read_index, read_tensors

SNAPSHOT_FILES = {"model": "config.json", "adapter": "adapter_config.json"}


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state on the disk, whole."""

    folder: Path
    step: int
    facts: Facts
    index: Metadata

    @classmethod
    def open(cls, folder: Path) -> SavedState:
        """Check that all of it is there as it was written.

        Raises:
            CheckpointError: `folder` is something else, or is damaged.
        """
        content = _read_facts(folder)
        for name, expected in content["files"].items():
            try:
                found = checksum(folder / name)
            except OSError as error:
                raise _damaged(folder, f"{name} cannot be read: {error.strerror}") from error
            if found["bytes"] != expected["bytes"]:
                raise _damaged(folder, f"{name} has {found['bytes']} bytes, expected {expected['bytes']}")
            if found != expected:
                raise _damaged(folder, f"the content of {name} is not what was written, by its checksum")
        facts = Facts(**{field.name: content[field.name] for field in fields(Facts)})
        try:
            index = read_index(folder)
        except Exception as error:  # bytes that were made up can fail in any way
            raise _damaged(folder, f"{INDEX} cannot be read: {error}") from error
        return cls(folder, content["step"], facts, index)

    def refuse_unless_for(self, here: Facts, *, optimizer: bool) -> None:
        """Raises `CheckpointError` where a trainer with the facts `here` cannot take it up."""
        if (reason := self.facts.why_not(here, optimizer=optimizer)) is not None:
            raise CheckpointError(f"the checkpoint in {self.folder} cannot be used: {reason}")

    def fill(self, tree: Tree) -> None:
        """Write its tensors over those of the same names in `tree`. Raises `CheckpointError`."""
        try:
            read_tensors(tree, self.folder, self.index)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # as above
            raise _damaged(self.folder, f"its tensors cannot be read: {error}") from error

    def read(self, part: str) -> Tree:
        """A part of it in new tensors on the host: "optimizer" or "randomness". Raises `CheckpointError`."""
        found: Tree = {}
        for name, entry in self.index.state_dict_metadata.items():
            first, *above, last = self.index.planner_data[name]
            if first == part:
                assert isinstance(entry, TensorStorageMetadata)
                inner = found
                for key in above:
                    inner = inner.setdefault(key, {})
                inner[last] = torch.empty(entry.size, dtype=entry.properties.dtype)
        if found:
            self.fill({part: found})
        return found

    def differences(self, tree: Tree) -> list[str]:
        """Names of the weights and optimizer states that differ from those of `tree` in any bit, or in their form."""
        found: list[str] = []
        for part in ("model", "optimizer"):
            saved, here = (dict(leaves(tree)) for tree in (self.read(part), tree.get(part, {})))
            found += [
                ".".join((part, *keys))
                for keys in sorted(saved.keys() | here.keys())
                if keys not in saved or keys not in here or not _identical(saved[keys], here[keys])
            ]
        return found


def _identical(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    bits = [tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(*bits)


def _read_facts(folder: Path) -> dict[str, Any]:
    for kind, file in SNAPSHOT_FILES.items():
        if (folder / file).is_file():
            setting = "lora.warm_start" if kind == "adapter" else "model"
            raise CheckpointError(
                f"{folder} is a sampler snapshot: an exported {kind}, with no optimizer state to go on from. Name a "
                f"checkpoint of a run (RUN/checkpoints/step-...), or start a new run with {setting}={str(folder)!r}."
            )
    try:
        content = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
        raise CheckpointError(
            f"{folder} is not the state of a trainer, or only half of one: expected {FACTS} in it, found {found}. Name "
            "another checkpoint."
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{FACTS} cannot be read: {error}") from error
    if not isinstance(content, dict) or content != sealed(content):
        raise _damaged(folder, f"the content of {FACTS} is not what was written, by its checksum")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint in {folder} has format {content.get('format')}, and this version of asyncrl reads "
            f"{FORMAT}. Use the version that wrote it."
        )
    if missing := {"step", "files", *(field.name for field in fields(Facts))} - set(content):
        raise _damaged(folder, f"{FACTS} lacks {', '.join(sorted(missing))}")
    return content


def _damaged(folder: Path, fault: str) -> CheckpointError:
    return CheckpointError(f"the checkpoint in {folder} is damaged: {fault}. Name another one.")
