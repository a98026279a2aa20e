"""`asyncrl sft|dpo|orpo CONFIG.toml [--resume [WHICH]] [--field VALUE ...]`, and `asyncrl resume` for their runs."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from asyncrl.cli.config import read_config
from asyncrl.errors import ConfigError
from asyncrl.recipes import dpo_loop, orpo_loop, sft_loop
from asyncrl.recipes.settings import SupervisedConfig
from asyncrl.storage.checkpoints import resolve

Config = TypeVar("Config", bound=SupervisedConfig)


@dataclass(frozen=True, slots=True)
class RecipeRun:
    """A run folder that a recipe made."""

    recipe: str
    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.toml"

    @property
    def settings(self) -> list[str]:
        """So that it goes on where it is now."""
        return ["--log_path", str(self.folder)]


def run_recipe(name: str, config_file: str | Path, overrides: Sequence[str], resume: str | None = None) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    again = resume or False
    match name:
        case "sft":
            sft_loop.main(_checked(read_config(sft_loop.Config, config_file, overrides)), resume=again)
        case "dpo":
            dpo_loop.main(_checked(read_config(dpo_loop.Config, config_file, overrides)), resume=again)
        case "orpo":
            orpo_loop.main(_checked(read_config(orpo_loop.Config, config_file, overrides)), resume=again)
    return 0


def recipe_of(target: str) -> RecipeRun | None:
    """The recipe behind `RUN[:WHICH]`. None: it is no run of one.

    Raises:
        CheckpointError: it is, and has no such checkpoint to go on from.
    """
    run = Path(target if Path(target).is_dir() else target.rpartition(":")[0])
    settings = run / "config.toml"
    if not settings.is_file() or "base_model" not in tomllib.loads(settings.read_text(encoding="utf-8")):
        return None
    checkpoint = resolve(target)
    return RecipeRun(checkpoint.state()["recipe"], checkpoint.run)


def _checked(config: Config) -> Config:
    """The same, if its datasets are there."""
    if config.dataset is None:
        raise ConfigError('dataset: this setting is needed. Name a JSONL file: dataset = "train.jsonl".')
    for setting in ("dataset", "evaluation_dataset"):
        path = getattr(config, setting)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{setting}: there is no file {path}. Paths in a config file are relative to that file.")
    return config
