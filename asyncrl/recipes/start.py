"""Where a run without rollouts begins: a new folder, or the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from asyncrl.config import Config as EngineConfig
from asyncrl.data import Cursor, Rows
from asyncrl.errors import ConfigError
from asyncrl.lives import Resume, data_facts, find, refuse_other_data, refuse_other_recipe
from asyncrl.metrics.rewind import rewind
from asyncrl.recipes.mapping import in_these_words
from asyncrl.recipes.settings import SupervisedConfig
from asyncrl.storage.checkpoints import Checkpoint, Checkpoints, resolve
from asyncrl.storage.folder import RunFolder, full_disk_named


@dataclass(frozen=True, slots=True)
class Start:
    """What one life of a run has before it trains."""

    folder: RunFolder
    life: int
    """0 is the first."""
    data: Mapping[str, Any]
    """What tells its data from others."""
    checkpoint: Checkpoint | None
    """What it goes on from. None: its beginning."""
    state: Mapping[str, Any]
    """What stands in that; at the beginning, what would."""

    @property
    def step(self) -> int:
        """Optimizer steps behind it."""
        return self.checkpoint.step if self.checkpoint is not None else 0

    @property
    def cursor(self) -> Cursor:
        return Cursor(*self.state["cursor"])

    def first_weights(self) -> Checkpoint | None:
        """Where the weights of the very beginning are: `init_from_checkpoint` as it was resolved then. None: in the
        model's own folder. Raises `CheckpointError` when it is gone."""
        source = self.state["init_from"]
        return None if source is None else resolve(source)


@contextmanager
def open_run(
    recipe: str, config: SupervisedConfig, engine: EngineConfig, rows: Rows, resume: Resume
) -> Iterator[Start]:
    """The run folder, new or gone on with, and nobody else's while the block lasts.

    Raises:
        CheckpointError: there is no such checkpoint, or it was made by another recipe, or from other data.
        ConfigError: the folder cannot be used, or somebody uses it.
    """
    with ExitStack() as stack:
        try:
            start = _start(stack, recipe, config, engine, rows, resume)
        except ConfigError as error:
            raise ConfigError(in_these_words(str(error), config.fields())) from None
        yield start


def _start(
    stack: ExitStack, recipe: str, config: SupervisedConfig, engine: EngineConfig, rows: Rows, resume: Resume
) -> Start:
    checkpoint, root = find(engine, resume)
    data = data_facts(engine, rows)
    if checkpoint is not None:
        refuse_other_recipe(checkpoint, recipe)
        refuse_other_data(checkpoint, data)
        state = checkpoint.state()
    else:
        state = _beginning(engine)
    goes_on = bool(resume) and root is not None and RunFolder(root).exists()
    folder = RunFolder(root.absolute(), engine.export_name) if goes_on and root else RunFolder.create(engine, config)
    stack.enter_context(full_disk_named(folder.root))
    stack.enter_context(folder.lock())
    life = 0
    if goes_on:
        life = 1 + len(list(folder.logs.glob("environment.life-*.json")))
        folder.begin_life(config, life)
        Checkpoints(folder.root).go_on_from(checkpoint, life)
        rewind(folder.root, checkpoint.step if checkpoint is not None else None)
    return Start(folder, life, data, checkpoint, state)


def _beginning(engine: EngineConfig) -> dict[str, Any]:
    """The state before the first step."""
    source, beside = engine.checkpoint.init_from, engine.run_dir.parent if engine.run_dir is not None else None
    # As found now: the newest checkpoint of that run may be another one when this run is resumed.
    init_from = None if source is None else str(resolve(source, beside).folder.absolute())
    return {"init_from": init_from, "cursor": [0, 0], "elapsed_s": 0.0, "before": None}
