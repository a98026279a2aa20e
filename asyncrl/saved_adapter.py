"""What the folder of a saved LoRA adapter says of it: rank, scale, where it sits, and of which model it is."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.errors import ConfigError

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

HARMLESS = frozenset(
    {
        # Who made it, of what, for what.
        *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type", "inference_mode"),
        # What is read below.
        *("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights"),
        # How it was trained; and which modules were left out, which the tensors show.
        *("lora_dropout", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # Set whether used or not; `fan_in_fan_out` follows from the kind of the layer.
        *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),
    }
)
"""Settings of `peft` that change nothing in W + scale B A. Any other one that is on makes an adapter that samplers
cannot reproduce: DoRA, ranks by pattern, biases, modules trained in full, and what is invented next year."""

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""The initialisations that leave the base model's weights as they are; PiSSA, OLoRA and others change them."""


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """A plain adapter: W + (alpha / rank) B A on some of its base model's linear layers."""

    folder: Path
    rank: int
    alpha: float
    """Of an adapter with rsLoRA, whose scale is its alpha / sqrt(rank): the plain alpha of the same scale."""
    targets: str | tuple[str, ...]
    """Modules that have it, as `peft` names them; a string is a pattern."""
    base: str
    """The model that it was trained on."""


def read_adapter(folder: Path) -> SavedAdapter:
    """Read the settings of the adapter in `folder`.

    Raises:
        ConfigError: there is none, or it is one that cannot be trained and sampled.
    """
    missing = [name for name in (SETTINGS, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else None
        raise ConfigError(
            f"there is no adapter in {str(folder)!r}: "
            + ("no such folder. " if found is None else f"{' and '.join(missing)} not among {found}. ")
            + f"Expected a folder on this machine with {SETTINGS} and {WEIGHTS}, as the save_pretrained of a `peft` "
            "model writes it."
        )
    settings: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if strange := _strange(settings):
        raise ConfigError(
            f"the adapter in {str(folder)!r} is not plain LoRA: {', '.join(strange)}. The samplers could not reproduce "
            "it. Train a plain one (rsLoRA is one too), or merge it into its base model and start from that."
        )
    rank, targets = int(settings["r"]), settings["target_modules"]
    return SavedAdapter(
        folder=folder,
        rank=rank,
        alpha=float(settings["lora_alpha"]) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        base=str(settings.get("base_model_name_or_path") or ""),
    )


def _strange(settings: dict[str, Any]) -> list[str]:
    """The settings that make it another thing than plain LoRA, each with its value."""
    on = {name: value for name, value in settings.items() if name not in HARMLESS and value and value != "none"}
    if settings.get("peft_type") != "LORA":
        on["peft_type"] = settings.get("peft_type")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        on["init_lora_weights"] = settings["init_lora_weights"]
    return [f"{name}={value!r}" for name, value in on.items()]
