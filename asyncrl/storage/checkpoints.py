"""The checkpoints of a run, as folders. A folder is a whole checkpoint or it is not there.

    RUN/checkpoints/step-000012/
        trainer/        model, optimizer, randomness: the trainer's own
        groups.bin      finished groups that wait to be trained
        state.json      the loop
        manifest.json   every file and its size
    RUN/checkpoints.jsonl   one line per checkpoint that was ever complete

It is written under a name that nobody picks, brought to the disk, and then renamed. A resume from an earlier one sets
those of later steps aside (`step-000020.life-0`): they are not part of the run any more, and can still be named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from asyncrl.errors import CheckpointError
from asyncrl.metrics.jsonl import encode
from asyncrl.private import private

NAME = re.compile(r"step-(\d{6,})(\.life-\d+)?")
SNAPSHOT_FILES = ("config.json", "adapter_config.json")
"""An exported model or adapter has one of them."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is whole."""

    folder: Path

    @property
    def step(self) -> int:
        match = NAME.fullmatch(self.folder.name)
        assert match is not None
        return int(match[1])

    @property
    def trainer(self) -> Path:
        """A folder for `Trainer.load_state_with_optimizer`."""
        return self.folder / "trainer"

    @property
    def groups(self) -> Path:
        return self.folder / "groups.bin"

    @property
    def run(self) -> Path:
        """The run folder that it belongs to."""
        return self.folder.parent.parent

    def state(self) -> dict[str, Any]:
        """What the loop wrote."""
        try:
            found = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder} cannot be read: {error}. Name another one.") from None
        assert isinstance(found, dict)
        return found

    def fault(self) -> str | None:
        """What is missing from it, by its manifest. None: it is whole."""
        try:
            sizes = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"its manifest cannot be read ({error})"
        for name, size in sizes.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
        return None


class Checkpoints:
    """Those of one run folder. Every method blocks on the disk."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.folder = run / "checkpoints"
        self.listing = run / "checkpoints.jsonl"

    def all(self) -> list[Checkpoint]:
        """Those of the run's lineage, oldest first."""
        found = [path for path in self._entries() if (match := NAME.fullmatch(path.name)) and match[2] is None]
        return sorted((Checkpoint(path) for path in found), key=lambda checkpoint: checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest that is whole. None: there is none."""
        for checkpoint in reversed(self.all()):
            if (fault := checkpoint.fault()) is None:
                return checkpoint
            log.warning("a checkpoint is not whole and is passed over", checkpoint=str(checkpoint.folder), fault=fault)
        return None

    def named(self, name: str) -> Checkpoint:
        """Raises `CheckpointError` where there is none of that name, or it is not whole."""
        folder = self.folder / name
        if not NAME.fullmatch(name) or not folder.is_dir():
            there = ", ".join(path.name for path in self._entries()) or "none"
            raise CheckpointError(f"there is no checkpoint {name!r} in {self.run}. There are: {there}.")
        checkpoint = Checkpoint(folder)
        if (fault := checkpoint.fault()) is not None:
            raise CheckpointError(f"the checkpoint {folder} is not whole: {fault}. Name another one.")
        return checkpoint

    def begin(self, step: int) -> Path:
        """A new folder to write the checkpoint of `step` into."""
        unfinished = self.folder / f".step-{step:06d}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        unfinished.mkdir(mode=0o700)
        return unfinished

    def commit(self, step: int, entry: Mapping[str, Any]) -> Checkpoint:
        """What was written since `begin(step)` is whole: bring it to the disk, give it its name, list it."""
        folder = self.folder / f"step-{step:06d}"
        unfinished = self.folder / f".{folder.name}.unfinished"
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        sizes = {str(path.relative_to(unfinished)): path.stat().st_size for path in files}
        write_file(unfinished / "manifest.json", json.dumps(sizes, indent=2).encode())
        for path in unfinished.rglob("*"):
            sync(path)
        sync(unfinished)
        replaced = folder.with_name(f".{folder.name}.removed")
        if folder.exists():  # of the same step, with fewer finished groups
            folder.rename(replaced)
        try:
            unfinished.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        sync(self.folder)
        with open(self.listing, "a", encoding="utf-8", opener=private) as listing:
            listing.write(encode({"name": folder.name, "step": step, **entry, "time": round(time.time(), 3)}) + "\n")
            listing.flush()
            os.fsync(listing.fileno())
        return Checkpoint(folder)

    def abandon(self, step: int) -> None:
        """It could not be written: nothing of it stays."""
        shutil.rmtree(self.folder / f".step-{step:06d}.unfinished", ignore_errors=True)

    def prune(self, keep_last: int, keep_every: int | None) -> None:
        """Remove all but the newest, and those whose step is a multiple of `keep_every`."""
        for checkpoint in self.all()[:-keep_last]:
            if keep_every is None or checkpoint.step % keep_every:
                # Under a name that nobody picks first: what is half removed must not look whole.
                doomed = checkpoint.folder.rename(checkpoint.folder.with_name(f".{checkpoint.folder.name}.removed"))
                shutil.rmtree(doomed, ignore_errors=True)

    def go_on_from(self, checkpoint: Checkpoint | None, life: int) -> None:
        """A new life begins at `checkpoint` (None: at the start): set later ones aside, clear what is unfinished."""
        for path in self.folder.glob(".step-*") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)
        for later in self.all():
            if checkpoint is None or later.step > checkpoint.step:
                later.folder.rename(later.folder.with_name(f"{later.folder.name}.life-{life - 1}"))
        if self.folder.is_dir():
            sync(self.folder)

    def _entries(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from sorted(path for path in self.folder.iterdir() if NAME.fullmatch(path.name))


def resolve(which: str, beside: Path | None = None) -> Checkpoint:
    """The checkpoint that `which` names: its folder, a run folder (its newest), or `RUN:step-000012`.

    A run that is named without its path is looked for `beside` another one, or in `runs/`.

    Raises:
        CheckpointError: there is none, it is not whole, or it is an exported model.
    """
    path = Path(which)
    if NAME.fullmatch(path.name) and path.parent.name == "checkpoints" and path.is_dir():
        return Checkpoints(path.parent.parent).named(path.name)
    job, colon, name = which.rpartition(":")
    if not colon:
        job, name = which, ""
    run = _run_folder(job, beside)
    if run is None:
        raise CheckpointError(
            f"there is no run folder {job!r}. Expected a run folder, RUN:step-000012, or the folder of a checkpoint."
        )
    if any((run / file).is_file() for file in SNAPSHOT_FILES):
        raise CheckpointError(
            f"{run} is an exported model: a sampler snapshot, without optimizer state. It cannot be gone on from. Name "
            "a checkpoint of its run, or start a new run from its weights: model='...', or lora.warm_start='...' for "
            "an adapter."
        )
    checkpoints = Checkpoints(run)
    if name and name != "latest":
        return checkpoints.named(name)
    latest = checkpoints.latest()
    if latest is None:
        raise CheckpointError(f"{run} has no checkpoint. Its run set checkpoint.interval=0, or ended before the first.")
    return latest


def _run_folder(job: str, beside: Path | None) -> Path | None:
    places = [Path(job), Path("runs") / job] + ([beside / job] if beside is not None else [])
    return next((place for place in places if place.is_dir()), None)


def write_file(path: Path, data: bytes) -> None:
    """Write, and bring it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
