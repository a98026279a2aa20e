"""Which runs a sweep is made of: `staleness=0,2 seed=1,2` -> four trials, each a validated `Config`. Pure."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from pydantic import BaseModel

from asyncrl.config import Config
from asyncrl.errors import ConfigError

SHORT = {
    "staleness": "staleness.max_staleness",
    "lr": "optimizer.learning_rate",
    "batch": "prompt_groups_per_step",
    "group": "completions_per_prompt",
    "window": "concurrency.max_window",
}
"""Beside these the last part of a name will do, where no other setting ends in it: `kl_beta`, `temperature`."""
REPEATED = "seed"
"""Runs that differ in nothing else are repetitions of each other: their results are averaged."""
MOST_TRIALS = 1000
"""More are a slip of the keyboard."""
VALUE = re.compile(r"""((?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])*),""")
"""With the comma behind it."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One setting, and the values it takes."""

    name: str
    """As it was given."""
    setting: str
    """As `Config` has it."""
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of the sweep."""

    values: Mapping[str, str]
    """Axis -> value, both as they were given."""
    overrides: tuple[str, ...]
    """What the command line of its `asyncrl train` says behind the config file."""
    config: Config

    @property
    def folder(self) -> Path:
        """Its run folder."""
        assert self.config.run_dir is not None
        return self.config.run_dir

    @property
    def name(self) -> str:
        return label(self.values) or self.folder.name

    @property
    def group(self) -> str:
        """What it shares with its repetitions."""
        return label({name: value for name, value in self.values.items() if name != REPEATED}) or "all runs"


def label(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def parse_axis(text: str) -> Axis:
    """`staleness=0,1,2` -> an axis. A value with a comma stands in brackets or quotes. Raises `ConfigError`."""
    given, equals, values = text.partition("=")
    if not equals or not given:
        raise ConfigError(f"found {text!r} where an axis was expected: NAME=VALUE,VALUE, such as staleness=0,2,4.")
    parts = [part.strip() for part in VALUE.findall(f"{values},")]
    if not all(parts):
        raise ConfigError(f"{text!r}: {given} has no value, or an empty one. Write NAME=VALUE,VALUE.")
    if repeated := [value for value, times in Counter(parts).items() if times > 1]:
        raise ConfigError(f"{text!r}: {', '.join(repeated)} is there twice.")
    name = given.replace("-", "_")
    return Axis(given, setting_of(name), tuple(parts))


def setting_of(name: str) -> str:
    """The full name of the setting that `name` is short for. Raises `ConfigError`."""
    if name == "run_dir":
        raise ConfigError("run_dir cannot be swept: each run has a folder of its own, in that of the sweep (--out).")
    names = list(_settings(Config))
    if name in names or name in SHORT:
        return SHORT.get(name, name)
    ending = [full for full in names if full.rpartition(".")[2] == name]
    if len(ending) == 1:
        return ending[0]
    if ending:
        raise ConfigError(f"{name!r} could be {' or '.join(ending)}. Name one of them in full.")
    close = difflib.get_close_matches(name, [*names, *SHORT, *(full.rpartition(".")[2] for full in names)], 1, 0.6)
    hint = f"Did you mean {close[0]!r}?" if close else "docs/configuration.md lists them all."
    raise ConfigError(f"there is no setting {name!r} to sweep. {hint}")


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name}.")
        elif f"{prefix}{name}" != "run_dir":
            yield f"{prefix}{name}"


def make_trials(
    axes: Sequence[Axis], load: Callable[[Sequence[str]], Config], out: Path, overrides: Sequence[str] = ()
) -> list[Trial]:
    """All combinations, the last axis fastest, each validated.

    Args:
        load: From settings of a command line to a `Config`.
        out: The folder of the sweep; each trial has its run folder in it.
        overrides: Settings that all trials share.

    Raises:
        ConfigError: an axis is there twice, or combinations cannot be run: all of them are named.
    """
    for axis in axes:
        if [other.setting for other in axes].count(axis.setting) > 1:
            raise ConfigError(f"{axis.setting} is swept twice. Give all of its values at once.")
    combinations = list(product(*(axis.values for axis in axes)))
    if len(combinations) > MOST_TRIALS:
        raise ConfigError(f"that would be {len(combinations):,} runs; at most {MOST_TRIALS} make a sweep.")
    trials: list[Trial] = []
    faults: dict[str, list[str]] = {}
    for values in combinations:
        named = {axis.name: value for axis, value in zip(axes, values, strict=True)}
        folder = out.absolute() / folder_name(named)
        chosen = [word for axis, value in zip(axes, values, strict=True) for word in (f"--{axis.setting}", value)]
        given = (*overrides, *chosen, "--run_dir", str(folder))
        try:
            trials.append(Trial(named, given, load(given)))
        except ConfigError as error:
            faults.setdefault(str(error), []).append(label(named))
    if faults:
        told = (f"{names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1) for names in faults.values())
        raise ConfigError(
            "nothing was run, for a part of the sweep cannot be:\n"
            + "\n".join(f"{names}: {error}" for names, error in zip(told, faults, strict=True))
        )
    _refuse_twins(trials)
    return trials


def folder_name(values: Mapping[str, str]) -> str:
    """Of its settings, so that a person and a shell can read it: `staleness-4_lr-1e-4`."""
    parts = (f"{name.rpartition('.')[2]}-{value}" for name, value in values.items())
    return re.sub(r"[^\w.+-]+", "-", "_".join(parts)).strip("-.") or "run"


def _refuse_twins(trials: Sequence[Trial]) -> None:
    folders = Counter(trial.folder for trial in trials)
    alike = [trial.name for trial in trials if folders[trial.folder] > 1]
    if alike:
        raise ConfigError(
            f"{' and '.join(alike[:2])} would have the same run folder. Write their values so that letters and digits "
            "tell them apart."
        )
    different: dict[str, Trial] = {}
    for trial in trials:
        key = trial.config.model_copy(update={"run_dir": None}).model_dump_json()
        if key in different:
            raise ConfigError(f"{different[key].name} and {trial.name} are the same settings. Leave one out.")
        different[key] = trial
