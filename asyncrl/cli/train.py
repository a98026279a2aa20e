"""`asyncrl train CONFIG.toml [--section.field VALUE ...]`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncrl.cli.config import load_config
from asyncrl.cli.rollout_fn import load_rollout
from asyncrl.config import Config
from asyncrl.errors import ConfigError


def train(config_file: str, overrides: Sequence[str]) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    config = load_config(config_file, overrides)
    dataset = require_dataset(config)
    rollout = load_rollout(config.rollout_fn, Path(config_file).parent)
    from asyncrl.run import train as start

    start(rollout, dataset=dataset, config=config)
    return 0


def require_dataset(config: Config) -> str:
    """The path of the dataset. Raises `ConfigError` when there is none."""
    if config.dataset is None:
        raise ConfigError('dataset: this setting is needed. Name a JSONL file: dataset = "train.jsonl".')
    if not Path(config.dataset).is_file():
        raise ConfigError(
            f"dataset: there is no file {config.dataset}. Paths in a config file are relative to that file."
        )
    return config.dataset
