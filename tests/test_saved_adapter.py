"""What is read of a saved adapter's folder, and what is refused by name; `lora.warm_start` in a config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.saved_adapter import read_adapter

PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "base_model_name_or_path": "some/model",
    "bias": "none",
    "rank_pattern": {},
    "use_dora": False,
    "lora_dropout": 0.1,
    "init_lora_weights": True,
}


def adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    (folder / "adapter_model.safetensors").touch()
    return folder


def test_a_plain_adapter(tmp_path: Path) -> None:
    found = read_adapter(adapter(tmp_path))
    assert (found.rank, found.alpha, found.targets) == (4, 8.0, ("down_proj", "q_proj"))
    assert found.base == "some/model"


def test_the_scale_of_rslora(tmp_path: Path) -> None:
    """alpha / sqrt(r), written as the alpha of a plain adapter with that scale."""
    found = read_adapter(adapter(tmp_path, use_rslora=True, r=9, lora_alpha=6))
    assert found.alpha / found.rank == pytest.approx(6 / math.sqrt(9))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern={'q_proj': 8}"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern={'q_proj': 8}"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"something_of_next_year": {"on": True}}, "something_of_next_year"),
    ],
)
def test_what_is_not_plain_is_refused_by_name(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"is not plain LoRA: {named}.*merge it into its base"):
        read_adapter(adapter(tmp_path, **settings))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter in .*nowhere': no such folder\. Expected a folder on this"):
        read_adapter(tmp_path / "nowhere")


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ConfigError, match=r"adapter_config\.json and adapter_model\.safetensors not among \['model\.safetensors'\]"
    ):
        read_adapter(tmp_path)


def test_a_config_takes_rank_alpha_and_targets_from_the_adapter(tmp_path: Path) -> None:
    config = Config(model="m", lora={"warm_start": adapter(tmp_path)})
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 8.0, ("down_proj", "q_proj"))
    again = {"warm_start": str(tmp_path), "rank": 4, "alpha": 8, "targets": ["q_proj", "down_proj"]}
    assert Config(model="m", lora=again).lora == config.lora


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"rank": 16}, r"lora\.rank is 16, but the adapter .* has 4\. Leave lora\.rank out"),
        ({"rank": 0}, r"lora\.rank is 0, but"),
        ({"alpha": 32.0}, r"lora\.alpha is 32\.0, but the adapter .* has 8\.0"),
        ({"targets": "all-linear"}, r"lora\.targets is 'all-linear', but"),
    ],
)
def test_a_contradiction_is_refused(setting: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(model="m", lora={"warm_start": adapter(tmp_path), **setting})
