"""`asyncrl replay RUN`: train again from the recorded samples, and say whether the weights are those of the run."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncrl.errors import ConfigError
from asyncrl.rollout.batch import loss_versions
from asyncrl.storage.environment import environment
from asyncrl.storage.folder import RunFolder, existing_run
from asyncrl.storage.log import open_log
from asyncrl.storage.samples import Record, read_samples
from asyncrl.terminal import visible
from asyncrl.types import Group

if TYPE_CHECKING:
    from asyncrl.replay import ReplayedStep, ReplayResult

SAME, OTHER = 0, 1
"""Exit codes: whether the weights are those of the run."""
COLUMNS = ("chunk", "row", "epoch", "group", "version", "samples", "tokens", "trained", "stale", "rewards")


def replay_run(run: str, start: str | None, stop: int | None, out: str | None) -> int:
    """Print each step as it is taken again, then the verdict; returns the exit code. `out`: a folder for the model.

    Raises: as `asyncrl.replay.replay`.
    """
    root = existing_run(run)
    if out is not None and Path(out).exists():
        raise ConfigError(f"--out: {out} exists already. Name a folder that does not.")
    given_up = [record for record in read_samples(RunFolder(root).samples) if record.failed is not None]
    console = Console(highlight=False, emoji=False, markup=False)
    with open_log(Path(os.devnull)):
        from asyncrl.replay import replay

        result = replay(root, start=start, stop=stop, on_step=lambda step: _say_step(step, console))
        if out is not None:
            result.trainer.save_model(Path(out))
    taken = {step.step for step in result.steps}
    for line in _verdict(result, root, [record for record in given_up if record.step in taken]):
        console.print(line, soft_wrap=True)
    if out is not None:
        console.print(f"model: {out}")
    return OTHER if result.differences() else SAME


def show_step(run: str, number: int) -> int:
    """Print what optimizer step `number` was given; returns the exit code.

    Raises:
        ConfigError: there is no such run, or no such step in it.
        DataError: nothing is recorded of it, or the file is damaged.
    """
    root = existing_run(run)
    records = read_samples(RunFolder(root).samples)
    chosen = [record for record in records if record.step == number]
    if not chosen:
        raise ConfigError(f"--step: step {number} is not recorded. Steps {records[0].step} to {records[-1].step} are.")
    console = Console(highlight=False, emoji=False, markup=False)
    for record in chosen:
        console.print(Text(f"step {number} of {root}", "bold"), soft_wrap=True)
        if record.failed is not None:
            console.print(Text(f"given up: {visible(record.failed)}", "red"), soft_wrap=True)
        console.print(_table(record))
    return SAME


def _say_step(step: ReplayedStep, console: Console) -> None:
    numbers = f"step {step.step:5}   loss {step.metrics['loss']:+.6f}   grad_norm {step.metrics['grad_norm']:.6f}   "
    if not step.recorded:
        verdict = Text("not in metrics.jsonl", "yellow")
    elif differing := step.differences():
        verdict = Text(", ".join(differing), "red")
    else:
        verdict = Text("as it was", "green")
    console.print(Text(numbers).append(verdict), soft_wrap=True)


def _verdict(result: ReplayResult, root: Path, given_up: Sequence[Record]) -> Iterator[Text]:
    count = len(result.steps)
    yield Text(f"{count} step{'s' * (count > 1)} trained again in {result.seconds:.1f} s", "bold")
    for check in result.checks:
        kept = check.kept.relative_to(root)
        if check.differing:
            shown = ", ".join(check.differing[:3])
            yield Text(f"{kept}: other weights; {len(check.differing)} differ, such as {shown}", "red")
        else:
            yield Text(f"{kept}: the same, bit by bit", "green")
    if not result.checks:
        yield Text("weights: the run kept none of these steps to compare with", "yellow")
    for record in given_up:
        yield Text(f"step {record.step} was given up once, which is not tried again: --step {record.step} shows it")
    if result.differences() and (changes := list(_surroundings(root))):
        yield Text(f"the run was on another machine, or with other packages: {'; '.join(changes)}")


def _surroundings(root: Path) -> Iterator[str]:
    """What decides about the last bits, and is not as it was."""
    try:
        before = json.loads(RunFolder(root).environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    here = environment()
    for name in ("platform", "cpu_count"):
        if before.get(name) != here[name]:
            yield f"{name} {before.get(name)}, here {here[name]}"
    for name, version in here["packages"].items():
        if (found := before.get("packages", {}).get(name)) != version:
            yield f"{name} {found}, here {version}"


def _table(record: Record) -> Table:
    """One line per group, in the order of training."""
    table = Table(box=None, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "rewards" else "right")
    for chunk, groups in enumerate(record.chunks(), 1):
        for group in groups:
            table.add_row(str(chunk), *_cells(group, record.step))
    return table


def _cells(group: Group, step: int) -> Iterator[str]:
    samples = [sample for run in group.runs for sample in run.segments]
    versions = [version for sample in samples for version in loss_versions(sample)]
    yield from map(str, (group.row, group.epoch, group.sequence, group.version, len(samples)))
    yield str(sum(len(sample.tokens) for sample in samples))
    yield str(len(versions))
    youngest, oldest = step - 1 - max(versions), step - 1 - min(versions)
    yield str(oldest) if youngest == oldest else f"{youngest}-{oldest}"
    rewards = " ".join(f"{reward:.3g}" for reward in group.rewards)
    yield rewards if group.advantages else f"{rewards} (filtered)"
