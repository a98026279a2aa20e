"""`asyncrl train CONFIG.toml [--section.field VALUE ...]`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncrl.cli.config import load_config
from asyncrl.cli.rollout_fn import load_rollout
from asyncrl.errors import ConfigError


def train(config_file: str, overrides: Sequence[str]) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    config = load_config(config_file, overrides)
    dataset = require_dataset(config.dataset)
    if config.evaluation.dataset is not None:
        require_dataset(config.evaluation.dataset, "evaluation.dataset")
    rollout = load_rollout(config.rollout_fn, Path(config_file).parent)
    from asyncrl.run import train as start

    start(rollout, dataset=dataset, config=config)
    return 0


def require_dataset(path: str | None, setting: str = "dataset") -> str:
    """`path`, which `setting` names. Raises `ConfigError` when there is none."""
    if path is None:
        raise ConfigError(f'{setting}: this setting is needed. Name a JSONL file: {setting} = "train.jsonl".')
    if not Path(path).is_file():
        raise ConfigError(f"{setting}: there is no file {path}. Paths in a config file are relative to that file.")
    return path
