"""`asyncrl eval RUN_FOLDER|CONFIG.toml`"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from asyncrl.cli.config import load_config
from asyncrl.cli.rollout_fn import load_rollout
from asyncrl.cli.train import require_dataset
from asyncrl.errors import ConfigError
from asyncrl.rollout.evaluation import Estimate
from asyncrl.storage.folder import RunFolder


def evaluate(target: str, dataset: str | None, samples: int, overrides: Sequence[str]) -> int:
    """Print the mean reward and, of several rollouts of a row, pass@k, with their intervals; returns the exit code.

    A run folder is evaluated with its final model, a config file with the model that it names.
    """
    if samples < 1:
        raise ConfigError(f"--samples is {samples}, expected at least 1.")
    given = ["--dataset", dataset] if dataset is not None else []
    path = Path(target)
    if path.is_dir():
        given += ["--model", str(_final_model(path.absolute()))]
        path = RunFolder(path.absolute()).config
    config = load_config(path, [*given, *overrides])
    rows = require_dataset(config)
    rollout = load_rollout(config.rollout_fn, path.parent)
    from asyncrl.run import evaluate as measure

    result = measure(rollout, dataset=rows, config=config, samples=samples)
    print(f"mean reward {_told(result.reward)} (95%, {result.n} rollouts)")
    powers = [1 << power for power in range(samples.bit_length())]
    for k in powers if samples > 1 else []:
        print(
            f"pass@{k} {_told(result.pass_at(k))}" + (" (a pass is a reward of at least 1)" if k == powers[-1] else "")
        )
    return 0


def _told(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _final_model(root: Path) -> Path:
    if not RunFolder(root).config.is_file():
        raise ConfigError(f"{root} is not a run folder: it has no config.toml.")
    folder = RunFolder(root, load_config(root / "config.toml").export_name)
    if not folder.model.is_dir():
        raise ConfigError(
            f"{folder.root} has no final model: the run did not end, or is not over yet. "
            f"To evaluate the model that it started from, give its config: {folder.config}."
        )
    return folder.model
