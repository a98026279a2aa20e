"""`asyncrl train CONFIG.toml [--resume [WHICH]] [--section.field VALUE ...]`, and `asyncrl resume RUN[:WHICH]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncrl.cli.config import load_config
from asyncrl.cli.rollout_fn import load_rollout
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.storage.folder import RunFolder


def train(config_file: str, overrides: Sequence[str], resume: str | None = None, *, quiet: bool = False) -> int:
    """Train, and return the exit code. What can be wrong with files is said before torch is loaded."""
    return _start(load_config(config_file, overrides), Path(config_file).parent, resume, quiet=quiet)


def resume(target: str, overrides: Sequence[str], *, quiet: bool = False) -> int:
    """Go on with the run in a folder, by the settings in it, and return the exit code."""
    run, colon, name = (target, "", "") if Path(target).is_dir() else target.rpartition(":")
    folder = RunFolder(Path(run))
    if not folder.exists():
        raise ConfigError(f"there is no run in {run or target!r}. Expected a run folder, such as runs/<time>.")
    config = load_config(folder.config, overrides).model_copy(update={"run_dir": folder.root})
    for setting in ("rollout_fn", "dataset"):
        if getattr(config, setting) is None:
            raise ConfigError(
                f"{folder.config} has no {setting}: this run was started from Python. Go on with it there, by "
                f"resume=True and run_dir={run!r}; or name it here: --{setting} ..."
            )
    return _start(config, Path.cwd(), name if colon else "latest", quiet=quiet)


def _start(config: Config, folder: Path, resume: str | None, *, quiet: bool) -> int:
    dataset = require_dataset(config.dataset)
    if config.evaluation.dataset is not None:
        require_dataset(config.evaluation.dataset, "evaluation.dataset")
    rollout = load_rollout(config.rollout_fn, folder)
    from asyncrl.run import train as start

    start(rollout, dataset=dataset, config=config, resume=resume or False, view="quiet" if quiet else "auto")
    return 0


def require_dataset(path: str | None, setting: str = "dataset") -> str:
    """`path`, which `setting` names. Raises `ConfigError` when there is none."""
    if path is None:
        raise ConfigError(f'{setting}: this setting is needed. Name a JSONL file: {setting} = "train.jsonl".')
    if not Path(path).is_file():
        raise ConfigError(f"{setting}: there is no file {path}. Paths in a config file are relative to that file.")
    return path
