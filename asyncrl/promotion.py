"""From what a run keeps to a model for everybody: a checkpoint, or an adapter, becomes a folder that `transformers`,
`peft` and vLLM open. On the CPU, so that it can be done beside a run.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

from asyncrl.config import Config
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.saved_adapter import SETTINGS, read_adapter
from asyncrl.storage.checkpoints import SNAPSHOT_FILES, Checkpoint, Checkpoints, resolve
from asyncrl.training.model import quiet_progress
from asyncrl.training.saved_state import SavedState
from asyncrl.training.trainer import TorchTrainer


def promote(which: str, out: Path, *, merge: bool = False, base_model: str | None = None) -> Checkpoint | Path:
    """Write the model of a run to `out`, and return where it was: a checkpoint, or the folder of an exported model.

    Args:
        which: `RUN:step-000012` or the folder of a checkpoint; a run folder (its newest checkpoint, or else the model
            that it ended with); or an exported model or adapter.
        out: A folder that does not exist yet.
        merge: Lay a LoRA adapter into its base model, so that a full model is written.
        base_model: Where that is now. None: where it was.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
        ConfigError: `out` exists, there is nothing to merge, or the adapter cannot be read.
        ModelError: the base model is not there.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already. Name a folder that does not: nothing is overwritten.")
    source = _find(which)
    with quiet_progress():
        _write(source, out, merge=merge, base_model=base_model)
    return source


def _write(source: Checkpoint | Path, out: Path, *, merge: bool, base_model: str | None) -> None:
    if isinstance(source, Checkpoint):
        _promote_checkpoint(source, out, merge=merge, base_model=base_model)
    else:
        _promote_exported(source, out, merge=merge, base_model=base_model)


def _find(which: str) -> Checkpoint | Path:
    folder = Path(which)
    if _is_exported(folder):
        return folder
    if (folder / "config.toml").is_file() and not Checkpoints(folder).all():
        settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        model = folder / str(settings.get("export_name", settings.get("output_model_id", "model")))
        if _is_exported(model):
            return model
        raise CheckpointError(f"{folder} has neither a checkpoint nor a model: its run ended before its first step.")
    return resolve(which)


def _is_exported(folder: Path) -> bool:
    return any((folder / file).is_file() for file in SNAPSHOT_FILES)


def _promote_checkpoint(checkpoint: Checkpoint, out: Path, *, merge: bool, base_model: str | None) -> None:
    facts = SavedState.open(checkpoint.trainer).facts
    if merge and facts.lora is None:
        raise _nothing_to_merge(checkpoint.folder)
    trainer = _trainer(base_model or facts.model, facts.lora or {})
    trainer.load_state(checkpoint.trainer)
    trainer.save_model(out, merge=merge)


def _promote_exported(model: Path, out: Path, *, merge: bool, base_model: str | None) -> None:
    if not merge:
        shutil.copytree(model, out)
        return
    if not (model / SETTINGS).is_file():
        raise _nothing_to_merge(model)
    base = base_model or read_adapter(model).base
    _trainer(base, {"warm_start": model}).save_model(out, merge=True)


def _trainer(model: str, lora: dict[str, Any]) -> TorchTrainer:
    config = Config(model=model, lora=lora, trainer={"device": "cpu"})
    return TorchTrainer(config, total_steps=None, weights_format="tensors", reference=False)


def _nothing_to_merge(folder: Path) -> ConfigError:
    return ConfigError(f"there is nothing to merge: {folder} holds a full model, not an adapter. Leave --merge out.")
