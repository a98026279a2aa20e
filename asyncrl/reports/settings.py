"""The settings of runs: those that are no defaults, and those in which runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asyncrl.config import Config
from asyncrl.reports.run_data import RunData, flat

PLACES = ("run_dir", "wandb.run_name", "checkpoint.init_from", "export_name")
"""Where a run is kept says nothing about it."""
LONGEST = 60
"""Characters of a value."""


def changed(run: RunData) -> dict[str, Any]:
    """The settings that whoever started the run chose: the model, and what is no default."""
    defaults = dict(flat(Config(model="").model_dump(mode="json")))
    return {
        name: value
        for name, value in run.settings.items()
        if name not in PLACES and (name not in defaults or value != defaults[name])
    }


def differing(runs: Sequence[RunData]) -> list[str]:
    """Names of the settings that are not the same in all runs, the places of files aside."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in PLACES)
    return [name for name in names if len({repr(run.settings.get(name)) for run in runs}) > 1]


def labels(runs: Sequence[RunData], *, without: Sequence[str] = ()) -> list[str]:
    """What to call each run beside the others: the settings that tell it from them, but for `without`; or else its
    folder.
    """
    names = [name for name in differing(runs) if name not in without]
    short = {name: name.rpartition(".")[2] for name in names}
    called = {name: (short[name] if list(short.values()).count(short[name]) == 1 else name) for name in names}
    told = [" · ".join(f"{called[name]} {said(run.settings.get(name))}" for name in names) for run in runs]
    folders = [run.name for run in runs]
    if len(set(folders)) < len(folders):
        folders = [str(run.root) for run in runs]
    return [
        label if label and len(label) <= LONGEST and told.count(label) == 1 else folder
        for folder, label in zip(folders, told, strict=True)
    ]


def said(value: Any) -> str:
    """A value as a reader takes it in."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def by_seed(runs: Sequence[RunData]) -> dict[str, list[str]]:
    """Groups of runs that differ in their seed alone: what to call a group -> the folders of its runs."""
    names = [name for name in differing(runs) if name != "seed"]
    groups: dict[tuple[str, ...], list[RunData]] = {}
    for run in runs:
        groups.setdefault(tuple(repr(run.settings.get(name)) for name in names), []).append(run)
    heads = labels([members[0] for members in groups.values()], without=("seed",))
    return {label: [str(run.root) for run in members] for label, members in zip(heads, groups.values(), strict=True)}
