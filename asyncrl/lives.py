"""A run folder may be lived in several times: by the process that starts the run, and by each that resumes it.

A life begins where the checkpoint that it goes on from was taken. What the life before did after that is undone: kept
in the folder for the curious, and no part of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.config import Config
from asyncrl.data import Rows, fingerprint
from asyncrl.errors import CheckpointError, ConfigError
from asyncrl.metrics.rewind import rewind
from asyncrl.storage.checkpoints import NAME, Checkpoint, Checkpoints, resolve
from asyncrl.storage.folder import RunFolder, full_disk_named
from asyncrl.storage.ledger_file import Bounds, LedgerStore

Resume = bool | str | Path
"""False: a new run. True or "latest": the newest checkpoint of `config.run_dir`, or its start where there is none yet.
Else one checkpoint: its name in `config.run_dir`, a run folder, `RUN:step-000012`, or a path."""


@dataclass(frozen=True, slots=True)
class Life:
    """One process working on a run."""

    config: Config
    """That of the run: `checkpoint.init_from` is the checkpoint that it meant when the run began."""
    folder: RunFolder
    store: LedgerStore
    data: Mapping[str, Any]
    """What tells its data from others."""
    checkpoint: Checkpoint | None = None
    """What it goes on from. None: the start."""

    @property
    def number(self) -> int:
        """0 is the first."""
        return self.store.life

    @property
    def step(self) -> int:
        """Optimizer steps that earlier lives took."""
        return self.checkpoint.step if self.checkpoint is not None else 0


@contextmanager
def open_life(config: Config, rows: Rows, resume: Resume) -> Iterator[Life]:
    """The run folder, new or gone on with, and nobody else's while the block lasts.

    Raises:
        CheckpointError: there is no such checkpoint, or it was made from other data.
        ConfigError: the folder cannot be used, or somebody uses it.
    """
    data = data_facts(config, rows)
    checkpoint, root = find(config, resume)
    if checkpoint is not None:
        refuse_other_recipe(checkpoint, "train")
        refuse_other_data(checkpoint, data)
    config = _settled(config, checkpoint, root)
    goes_on = bool(resume) and root is not None and RunFolder(root).exists()
    folder = RunFolder(root.absolute(), config.export_name) if goes_on and root else RunFolder.create(config)
    with full_disk_named(folder.root), folder.lock():
        position = checkpoint.state()["loop"]["ledger"]["position"] if checkpoint is not None else 0
        store = LedgerStore.open(
            folder.ledger, resumed_at=position if goes_on else None, bounds=Bounds.of(config, len(rows))
        )
        try:
            life = Life(config, folder, store, data, checkpoint)
            if goes_on:
                folder.begin_life(config, life.number)
                Checkpoints(folder.root).go_on_from(checkpoint, life.number)
            rewind(folder.root, *_known(checkpoint))  # of a new run too: of one that failed here before its first step
            yield life
        finally:
            store.close()


def _settled(config: Config, checkpoint: Checkpoint | None, root: Path | None) -> Config:
    """`config` with what it leaves open: another run that it begins from may go on, and a KL refers to it all along."""
    first = config.checkpoint.init_from
    if checkpoint is not None:
        first = checkpoint.state()["init_from"]
    elif first is not None:
        first = str(resolve(first, root.absolute().parent if root is not None else None).folder.absolute())
    start = config.checkpoint.model_copy(update={"init_from": first})
    return config.model_copy(update={"run_dir": root, "checkpoint": start})


def _known(checkpoint: Checkpoint | None) -> tuple[int | None, list[int]]:
    """The last step, and the versions that were evaluated, as the run knows them that goes on from `checkpoint`."""
    if checkpoint is None:
        return None, []
    return checkpoint.step, [evaluated["versions"][0] for evaluated in checkpoint.state()["evaluations"]]


def find(config: Config, resume: Resume) -> tuple[Checkpoint | None, Path | None]:
    """The checkpoint to go on from (None: the start) and the run folder (None: a new one)."""
    if not resume:
        return None, config.run_dir
    if resume is True or resume == "latest":
        if config.run_dir is None:
            raise ConfigError(
                "resume: there is no run to go on with. Set run_dir, or name a run folder: resume='runs/...'."
            )
        return Checkpoints(config.run_dir).latest(), config.run_dir
    which = str(resume)
    if config.run_dir is not None and NAME.fullmatch(which):
        return Checkpoints(config.run_dir).named(which), config.run_dir
    checkpoint = resolve(which)
    if config.run_dir is not None and config.run_dir.absolute() != checkpoint.run.absolute():
        raise ConfigError(
            f"resume names {checkpoint.run}, but run_dir is {config.run_dir}. A run goes on in its own folder: leave "
            "run_dir out. To start another run from its weights, set checkpoint.init_from instead."
        )
    return checkpoint, checkpoint.run


def data_facts(config: Config, rows: Rows) -> dict[str, Any]:
    """What the order of the prompts follows from."""
    order = {"seed": config.seed, "shuffle": config.data.shuffle, "max_rows": config.data.max_rows}
    return {"rows": len(rows), "fingerprint": fingerprint(rows), **order}


def refuse_other_recipe(checkpoint: Checkpoint, recipe: str) -> None:
    """Raises `CheckpointError` where another way of training has made it."""
    found = checkpoint.state().get("recipe", "train")
    if found != recipe:
        raise CheckpointError(
            f"{checkpoint.folder} is of `asyncrl {found}`, and `asyncrl {recipe}` cannot go on from it. To start from "
            "its weights, name it in a new run: checkpoint.init_from (init_from_checkpoint of a recipe)."
        )


def refuse_other_data(checkpoint: Checkpoint, data: Mapping[str, Any]) -> None:
    """Raises `CheckpointError`, with what differs."""
    before = checkpoint.state()["data"]
    different = [f"{name} is {data[name]!r} and was {before[name]!r}" for name in data if data[name] != before[name]]
    if different:
        raise CheckpointError(
            f"{checkpoint.folder} cannot be gone on from: the data changed ({'; '.join(different)}), so which prompts "
            "it has seen already is not known. Resume with the data it had. To train its weights on other data, start "
            f"a new run with checkpoint.init_from='{checkpoint.folder}'."
        )
