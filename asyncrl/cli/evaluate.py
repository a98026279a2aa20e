"""`asyncrl eval RUN_FOLDER|CONFIG.toml`"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from asyncrl.cli.config import load_config
from asyncrl.cli.rollout_fn import load_rollout
from asyncrl.cli.train import require_dataset
from asyncrl.errors import ConfigError
from asyncrl.storage.folder import RunFolder
from asyncrl.storage.log import open_log


def evaluate(
    target: str, dataset: str | None, samples: int | None, overrides: Sequence[str], *, quiet: bool = False
) -> int:
    """Print the mean reward and, of several rollouts of a row, pass@k, with their intervals; returns the exit code.

    A run folder is evaluated with its final model, a config file with the model that it names.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"--samples is {samples}, expected at least 1.")
    given = ["--evaluation.dataset", dataset] if dataset is not None else []
    given += ["--evaluation.samples", str(samples)] if samples is not None else []
    path = Path(target)
    if path.is_dir():
        given += ["--model", str(_final_model(path.absolute()))]
        path = RunFolder(path.absolute()).config
    config = load_config(path, [*given, *overrides])
    rows = require_dataset(config.dataset if config.evaluation.dataset is None else config.evaluation.dataset)
    rollout = load_rollout(config.rollout_fn, path.parent)
    from asyncrl.run import evaluate as measure

    if not quiet:
        print(f"model: {config.model}\nrows: {rows}", flush=True)
    with open_log(Path(os.devnull)):  # warnings are printed
        result = measure(rollout, dataset=rows, config=config)
    failed = f", {result.failed} more failed" if result.failed else ""
    print(f"mean reward {result.reward} (95%, {result.n} rollouts{failed})")
    for k, estimate in result.passes().items():
        print(f"pass@{k} {estimate}" + (" (a pass is a reward of at least 1)" if k == 1 else ""))
    return 0


def _final_model(root: Path) -> Path:
    if not RunFolder(root).config.is_file():
        raise ConfigError(
            f"{root} is not a run folder: it has no config.toml. A model or adapter is evaluated with the config that "
            f"names its rollout function: asyncrl eval CONFIG.toml --model {root}."
        )
    folder = RunFolder(root, load_config(root / "config.toml").export_name)
    if not folder.model.is_dir():
        raise ConfigError(
            f"{folder.root} has no final model: the run did not end, or is not over yet. "
            f"To evaluate the model that it started from, give its config: {folder.config}."
        )
    return folder.model
