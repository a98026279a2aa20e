"""`asyncrl sft|dpo|orpo CONFIG.toml [--resume [WHICH]] [--field VALUE ...]`, and `asyncrl resume` for their runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from asyncrl.cli.config import read_config, read_toml
from asyncrl.cli.train import require_dataset
from asyncrl.recipes import dpo_loop, orpo_loop, sft_loop

LOOPS: Mapping[str, ModuleType] = {"sft": sft_loop, "dpo": dpo_loop, "orpo": orpo_loop}


def run_recipe(
    name: str, config_file: str | Path, overrides: Sequence[str], resume: str | None = None, *, quiet: bool = False
) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    loop = LOOPS[name]
    config = read_config(loop.Config, config_file, overrides)
    require_dataset(config.dataset)
    if config.evaluation_dataset is not None:
        require_dataset(config.evaluation_dataset, "evaluation_dataset")
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
    settings = read_toml(path)
    # A run folder's settings are all there, and each recipe has one that no other has.
    recipes = [name for name, loop in LOOPS.items() if settings.keys() <= loop.Config.model_fields.keys()]
    return RecipeRun(recipes[0], Path(run), name if colon else "latest") if recipes else None
