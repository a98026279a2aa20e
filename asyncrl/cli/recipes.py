"""`asyncrl sft|dpo|orpo CONFIG.toml [--field VALUE ...]`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from asyncrl.cli.config import read_config
from asyncrl.errors import ConfigError
from asyncrl.recipes import dpo_loop, orpo_loop, sft_loop
from asyncrl.recipes.settings import SupervisedConfig

Config = TypeVar("Config", bound=SupervisedConfig)


def run_recipe(name: str, config_file: str, overrides: Sequence[str]) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    match name:
        case "sft":
            sft_loop.main(_checked(read_config(sft_loop.Config, config_file, overrides)))
        case "dpo":
            dpo_loop.main(_checked(read_config(dpo_loop.Config, config_file, overrides)))
        case "orpo":
            orpo_loop.main(_checked(read_config(orpo_loop.Config, config_file, overrides)))
    return 0


def _checked(config: Config) -> Config:
    """The same, if its datasets are there."""
    if config.dataset is None:
        raise ConfigError('dataset: this setting is needed. Name a JSONL file: dataset = "train.jsonl".')
    for setting in ("dataset", "evaluation_dataset"):
        path = getattr(config, setting)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{setting}: there is no file {path}. Paths in a config file are relative to that file.")
    return config
