"""Checkpoints in the words of the hosted cookbook, for training loops of your own.

    from asyncrl.recipes import resolve_resume, save_checkpoint

    trainer = TorchTrainer(config, total_steps=100, weights_format="tensors")
    found = resolve_resume(trainer, log_path)
    for step in range(found.step if found else 0, 100):
        ...
        save_checkpoint(trainer, f"step-{step + 1}", log_path, {"step": step + 1, "data_consumed": consumed})

They are folders like those of every run: storage/checkpoints.py.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from asyncrl.errors import ConfigError
from asyncrl.lives import Resume
from asyncrl.metrics.jsonl import JsonlFile, encode
from asyncrl.storage.checkpoints import Checkpoints, resolve, write_file


class Client(Protocol):
    """The verbs of a `TorchTrainer` that checkpoints need."""

    def save_state(self, folder: Path) -> None: ...

    def load_state_with_optimizer(self, folder: Path) -> int: ...

    def load_state(self, folder: Path) -> None: ...

    def save_model(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class ResumeInfo:
    """Where a loop goes on."""

    step: int
    """Optimizer steps behind it; 0 where only weights were taken over."""
    data_consumed: int
    """Rows behind it, as `save_checkpoint` was told."""
    source_job_id: str
    """The run folder that the weights are from."""
    loop_state: Mapping[str, Any]
    """All that `save_checkpoint` was told; empty where only weights were taken over."""


def save_checkpoint(
    client: Client,
    name: str,
    log_path: str | Path,
    loop_state: Mapping[str, Any],
    kind: Literal["state", "sampler", "both"] = "state",
) -> Path:
    """Write a checkpoint, add it to `checkpoints.jsonl`, and return its folder once it is on the disk.

    Args:
        client: The trainer.
        name: `step-12`.
        log_path: The run folder.
        loop_state: What `resolve_resume` gives back. JSON; `step` and `data_consumed` have a meaning.
        kind: `state` is what a run goes on from; `sampler` a model or adapter for inference, in `snapshots/`, that
            nothing goes on from; `both` the first with the second in its folder `model/`.

    Raises:
        ConfigError: another name, or it is not that of `loop_state["step"]`.
        OSError: the disk is full.
    """
    step = _step_of(name, loop_state)
    checkpoints = Checkpoints(Path(log_path))
    checkpoints.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    if kind == "sampler":
        snapshot = Path(log_path) / "snapshots" / f"step-{step:06d}"
        client.save_model(snapshot)
        with JsonlFile(checkpoints.listing) as listing:
            listing.write({"name": f"snapshots/{snapshot.name}", "step": step, "kind": kind, "time": time.time()})
        return snapshot
    unfinished = checkpoints.begin(step)
    try:
        client.save_state(unfinished / "trainer")
        write_file(unfinished / "state.json", encode({"recipe": "own", "loop_state": loop_state}).encode())
        if kind == "both":
            client.save_model(unfinished / "model")
    except BaseException:
        checkpoints.abandon(step)
        raise
    return checkpoints.commit(step, {"kind": kind}).folder


def resolve_resume(client: Client, log_path: str | Path, init_from_checkpoint: str | None = None) -> ResumeInfo | None:
    """Load the newest checkpoint of `log_path` with its optimizer, or the weights of `init_from_checkpoint`.

    None where there is neither: the client is left as it is.

    Raises:
        CheckpointError: it cannot be used: half-written, a sampler snapshot, of another model or LoRA rank.
    """
    latest = Checkpoints(Path(log_path)).latest()
    if latest is not None:
        client.load_state_with_optimizer(latest.trainer)
        told = latest.state().get("loop_state", {})
        return ResumeInfo(latest.step, int(told.get("data_consumed", 0)), str(latest.run), told)
    if init_from_checkpoint is None:
        return None
    source = resolve(init_from_checkpoint, Path(log_path).parent)
    client.load_state(source.trainer)
    return ResumeInfo(0, 0, str(source.run), {})


def wanted(resume: Resume | None, log_path: Path | None) -> Resume:
    """As the hosted recipes do, go on where `log_path` holds checkpoints, unless something else is asked for."""
    if resume is not None:
        return resume
    return log_path is not None and bool(Checkpoints(log_path).all())


def _step_of(name: str, loop_state: Mapping[str, Any]) -> int:
    match = re.fullmatch(r"step-(\d+)", name)
    if match is None:
        raise ConfigError(f"the name of a checkpoint is {name!r}. Expected step-N, with the optimizer steps behind it.")
    step = int(match[1])
    if loop_state.get("step", step) != step:
        raise ConfigError(f"the checkpoint is called {name!r}, but loop_state says step {loop_state['step']}.")
    return step
