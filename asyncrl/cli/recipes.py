"""`asyncrl sft|dpo|orpo CONFIG.toml [--resume [WHICH]] [--field VALUE ...]`, and `asyncrl resume` for their runs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from asyncrl.cli.config import read_config
from asyncrl.errors import ConfigError
from asyncrl.recipes import dpo_loop, orpo_loop, sft_loop
from asyncrl.recipes.settings import SupervisedConfig

LOOPS: Mapping[str, ModuleType] = {"sft": sft_loop, "dpo": dpo_loop, "orpo": orpo_loop}


def run_recipe(
    name: str, config_file: str | Path, overrides: Sequence[str], resume: str | None = None, *, quiet: bool = False
) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    loop = LOOPS[name]
    config = _checked(read_config(loop.Config, config_file, overrides))
    loop.main(config, resume=resume or False, view="quiet" if quiet else "auto")
    return 0


@dataclass(frozen=True, slots=True)
class RecipeRun:
    """A run folder that a recipe made, and what of it is meant."""

    recipe: str
    folder: Path
    which: str
    """Name of a checkpoint, or `latest`."""

    def resume(self, overrides: Sequence[str], *, quiet: bool = False) -> int:
        """Go on with it, where it is now and by the settings in it. The exit code."""
        here = [*overrides, "--log_path", str(self.folder)]
        return run_recipe(self.recipe, self.folder / "config.toml", here, self.which, quiet=quiet)


def recipe_run(target: str) -> RecipeRun | None:
    """What `RUN[:WHICH]` means. None: it is no run of a recipe."""
    run, colon, name = (target, "", "") if Path(target).is_dir() else target.rpartition(":")
    path = Path(run) / "config.toml"
    if not path.is_file():
        return None
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    # A run folder's settings are all there, and each recipe has one that no other has.
    recipes = [name for name, loop in LOOPS.items() if settings.keys() <= loop.Config.model_fields.keys()]
    return RecipeRun(recipes[0], Path(run), name if colon else "latest") if recipes else None


def _checked(config: SupervisedConfig) -> SupervisedConfig:
    """The same, if its datasets are there."""
    if config.dataset is None:
        raise ConfigError('dataset: this setting is needed. Name a JSONL file: dataset = "train.jsonl".')
    for setting in ("dataset", "evaluation_dataset"):
        path = getattr(config, setting)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"{setting}: there is no file {path}. Paths in a config file are relative to that file.")
    return config
