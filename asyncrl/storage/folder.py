"""The run folder: everything that one run leaves behind, in files that other tools open.

config.toml        the settings as used; `asyncrl train` takes it again
environment.json   machine, versions, git commit, command line
metrics.jsonl      one record per optimizer step (docs/metrics.md)
evaluations.jsonl  one record per evaluation
producer.jsonl     records of the rollout side
rollouts.jsonl     some rollouts of each step, readable
ledger.db          what became of every prompt (`asyncrl audit`)
timeline/          when everything began and ended (`asyncrl trace`)
samples/           what was trained on (`asyncrl replay`)
diagnosis/         what optimizer steps were given that could not be taken
checkpoints/       what a resume goes on from; checkpoints.jsonl lists them
logs/              asyncrl.jsonl, and the log of each server
model/             the final model or adapter (`export_name`)
summary.json       how it ended
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
import tomli_w
from pydantic import BaseModel

from asyncrl.config import Config
from asyncrl.errors import ConfigError, EngineError
from asyncrl.metrics.jsonl import encode
from asyncrl.private import hide_secrets, private, write_private
from asyncrl.storage.environment import environment
from asyncrl.types import Group

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
OFF = "none"
"""TOML has no null: this word stands for None where None is not the default."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The paths of one run. Only the user who started it can read what it creates."""

    root: Path
    export_name: str = "model"

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.root / "evaluations.jsonl"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.db"

    @property
    def samples(self) -> Path:
        """A folder: what was trained on, for a replay."""
        return self.root / "samples"

    @property
    def timeline(self) -> Path:
        """A folder: when every rollout and every step began and ended."""
        return self.root / "timeline"

    @property
    def logs(self) -> Path:
        """A folder."""
        return self.root / "logs"

    @property
    def log(self) -> Path:
        return self.logs / "asyncrl.jsonl"

    @property
    def model(self) -> Path:
        """A folder, as `transformers`, `peft` and vLLM open it."""
        return self.root / self.export_name

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @classmethod
    def create(cls, config: Config, settings: BaseModel | None = None) -> RunFolder:
        """Make the folder of `config.run_dir`, or `runs/<UTC time>-<4 hex>`, and write what is known at the start.

        `settings` go into config.toml where they are not `config` itself, but a recipe's that it was made from.
        Raises `ConfigError` when the folder already holds a run, or cannot be made.
        """
        folder = cls((config.run_dir or _new_name()).absolute(), config.export_name)
        if found := folder.holds():
            raise ConfigError(
                f"run_dir: {folder.root} already holds a run ({', '.join(found)}). "
                f"Resume it to go on with it (asyncrl resume {folder.root}, or resume=True). For another run choose a "
                "new folder, or leave run_dir out to get one each time."
            )
        try:
            folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.logs.mkdir(mode=0o700, exist_ok=True)
            with folder.lock():
                write_private(folder.config, config_toml(settings or config))
                write_json(folder.environment, environment())
        except OSError as error:
            raise ConfigError(
                f"run_dir: {folder.root} cannot be used: {error.strerror}. Choose a folder that you may write to."
            ) from error
        return folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else works on the run while the block lasts. The system lifts the lock of a process that was killed.

        Raises:
            ConfigError: another process works on it; with its number.
        """
        if sys.platform == "win32":  # it has no flock
            yield
            return
        import fcntl

        with open(self.root / ".lock", "a+", opener=private) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise ConfigError(
                    f"run_dir: {file.read().strip() or 'another process'} is working on {self.root}. Wait until it has "
                    "ended, or end it; or choose another folder."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                log.warning("the disk of the run folder knows no locks: start no second run in it", folder=self.root)
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}\n")
            file.flush()
            yield

    def exists(self) -> bool:
        """Whether a run has begun here."""
        return self.config.is_file() and self.environment.is_file()

    def begin_life(self, settings: BaseModel, number: int) -> None:
        """The run goes on. Settings, environment and summary of the life before are kept in `logs/`.

        At every moment the folder is that of a run, so that whoever is killed here can go on too.
        """
        self.logs.mkdir(mode=0o700, exist_ok=True)
        for path in (self.config, self.environment, self.summary):
            if path.exists():
                shutil.copy2(path, self.logs / f"{path.stem}.life-{number - 1}{path.suffix}")
        write_private(self.config, config_toml(settings))
        write_json(self.environment, environment())
        self.summary.unlink(missing_ok=True)

    def holds(self) -> list[str]:
        """The names of the files that a new run must not overwrite.

        Results, and a config that is not ours; what a run leaves that failed before its first step may go.
        """
        files = [self.metrics, self.rollouts, self.evaluations, self.summary, self.model]
        if not self.environment.exists():
            files.insert(0, self.config)
        return [file.name for file in files if file.exists() and file.stat().st_size]

    def write_diagnosis(self, step: int, error: str, groups: Sequence[Group]) -> None:
        """What an optimizer step was given that could not be taken."""
        path = self.root / "diagnosis" / f"step-{step:06d}.json"
        path.parent.mkdir(mode=0o700, exist_ok=True)
        given = [
            {
                "row": group.row,
                "epoch": group.epoch,
                "version": group.version,
                "rewards": group.rewards,
                "advantages": group.advantages,
                "tokens": [[len(sample.tokens) for sample in run.segments] for run in group.runs],
                "lowest_logprob": [min(min(sample.logprobs) for sample in run.segments) for run in group.runs],
            }
            for group in groups
        ]
        write_json(path, {"step": step, "error": error, "groups": given})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        write_json(self.summary, summary)


def existing_run(run: str | Path) -> Path:
    """The folder that somebody named. Raises `ConfigError` where there is none."""
    root = Path(run)
    if not root.is_dir():
        raise ConfigError(f"there is no run folder {root}. Runs are in runs/, one folder each, unless run_dir is set.")
    return root


@contextmanager
def full_disk_named(root: Path) -> Iterator[None]:
    """Say which folder cannot be written, where that is what ends the block. The user's own `OSError`s have become
    `RolloutFailed` before.

    Raises:
        EngineError: in place of an `OSError` of a disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise EngineError(
            f"the run folder {root} cannot be written: {error.strerror}. Make room, or set run_dir to another disk; "
            "what the folder holds up to here can be used."
        ) from error


def config_toml(config: BaseModel) -> str:
    """The settings as TOML that `asyncrl.cli.config.load_config` reads back to an equal `Config`."""
    return tomli_w.dumps(_without_null(config, config.model_dump(mode="json")))


def _without_null(section: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a None that is the default; write `OFF` for one that is not."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        inner = getattr(section, name)
        if isinstance(inner, BaseModel):
            kept[name] = _without_null(inner, value)
        elif value is not None:
            kept[name] = value
        elif type(section).model_fields[name].default is not None:
            kept[name] = OFF
    return kept


def _new_name() -> Path:
    return Path("runs") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def make_folder(folder: Path, setting: str) -> None:
    """Raises `ConfigError`, which names the setting, where it cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{setting}: {folder} cannot be used: {error.strerror}. Name a folder of your own.") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Indented for readers. NaN becomes null."""
    write_private(path, hide_secrets(json.dumps(json.loads(encode(value)), indent=2, ensure_ascii=False)) + "\n")
