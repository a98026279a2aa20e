"""`asyncrl tune RUN|CONFIG.toml`: simulates a grid of settings, prints the frontier, and recommends one of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from rich.console import Console

from asyncrl.cli.config import load_config
from asyncrl.cli.tune_print import print_plan
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.planning.advice import GIVE, WORST, recommend
from asyncrl.planning.described import Description, Modelled, changed, described, share
from asyncrl.planning.grid import Axes, search
from asyncrl.planning.plan import Measured, Plan, rate
from asyncrl.planning.predict import Machine
from asyncrl.planning.recorded import workload_of
from asyncrl.planning.runner import Question, Runner, Task, running
from asyncrl.planning.setting import POLICIES, Point, Policy
from asyncrl.planning.workload import Workload
from asyncrl.reports.page import require_page, write_page
from asyncrl.reports.run_data import RunData, load_run
from asyncrl.storage.folder import RunFolder

MOST_WARM_UP = 50
RESAMPLES = 5
FEW_ROLLOUTS, FEW_STEPS = 500, 20
"""Of a run: fewer say little of its tail."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planned for."""

    base: Config
    modelled: Modelled
    measured: Measured | None
    notes: tuple[str, ...]


def tune(arguments: argparse.Namespace) -> int:
    """Print the plan and write its page; returns the exit code.

    Raises:
        ConfigError: an option, the config or the description cannot be used.
        DataError: the run has nothing to learn from, or cannot be read.
    """
    axes = _axes(arguments)
    give = GIVE if arguments.give is None else share(arguments.give, "--give", "rate that you give for fresher tokens")
    worst = WORST if arguments.worst is None else arguments.worst
    _check_counts(arguments)
    description = Description(**{field.name: getattr(arguments, field.name) for field in fields(Description)})
    is_run = Path(arguments.target).is_dir()
    if not is_run and not Path(arguments.target).exists():
        raise ConfigError(f"there is no run folder and no config file {arguments.target}. Name one of them.")
    out = Path(arguments.out or (Path(arguments.target) / "tune.html" if is_run else "tune.html"))
    if arguments.out or not arguments.json:
        require_page(out)
    subject = (_of_run if is_run else _of_config)(arguments, description, axes)
    question = Question(
        subject.base, subject.modelled.machine, subject.modelled.workload, arguments.seed, arguments.steps
    )
    with _progress() as progress, running(question, arguments.jobs or _cores(), progress) as oracle:
        found = search(subject.base, axes, oracle, give=give, worst=worst)
        advice = recommend(found.points, give=give, worst=worst)
        notes = [*subject.notes, *(_how_sure(oracle, advice.point) if is_run else ())]
    plan = Plan(arguments.target, subject.base, subject.modelled, found, advice, subject.measured, tuple(notes))
    if arguments.json:
        print(json.dumps(plan.as_json(), indent=1, allow_nan=False))
    else:
        print_plan(plan, Console(highlight=False, emoji=False, markup=False))
    if arguments.out or not arguments.json:
        _write(plan, out)
    return 0


def _of_config(arguments: argparse.Namespace, description: Description, axes: Axes) -> Subject:
    base = load_config(arguments.target, arguments.rest)
    largest = max(axes.group, default=base.completions_per_prompt)
    return Subject(base, described(base, description, largest), None, ())


def _of_run(arguments: argparse.Namespace, description: Description, axes: Axes) -> Subject:
    run = load_run(arguments.target)
    base = load_config(RunFolder(run.root).config, arguments.rest)
    workload = workload_of(run)
    machine = Machine.of_run(run, workload)
    modelled = changed(base, workload, machine, description)
    learned = ("learned from", f"{workload.about}, in {len(run.steps):,} optimizer steps")
    shown = Modelled(modelled.workload, modelled.machine, (learned, *modelled.said))
    as_it_was = not modelled.said and not arguments.rest
    return Subject(base, shown, _measured(run) if as_it_was else None, _doubts(run, workload))


def _measured(run: RunData) -> Measured | None:
    """What the run did once it was under way: after its first fifth."""
    first = min(len(run.steps) // 5, MOST_WARM_UP)
    seconds, samples = run.steps["step_s"][first:], run.steps["samples"][first:]
    if not len(seconds) or not np.nansum(seconds):
        return None
    tokens, staleness = run.steps["loss_tokens"][first:], run.steps["staleness_mean"][first:]
    return Measured(
        samples_per_s=float(np.nansum(samples) / np.nansum(seconds)),
        staleness_mean=float(np.nansum(tokens * staleness) / max(np.nansum(tokens), 1)),
        steps=len(seconds),
    )


def _doubts(run: RunData, workload: Workload) -> tuple[str, ...]:
    rollouts, steps = workload.rollouts, len(run.steps)
    if rollouts >= FEW_ROLLOUTS and steps >= FEW_STEPS:
        return ()
    return (
        f"Only {rollouts:,} rollouts and {steps:,} steps to learn from: the slowest rollouts, which decide most, may "
        "not have been seen yet. Trust the order of the rows more than their numbers, and ask again later.",
    )


def _how_sure(oracle: Runner, point: Point) -> list[str]:
    """How much the recommended setting's numbers hang on the rollouts that happened to be seen."""
    tasks = [Task(point.setting, resample=seed) for seed in range(1, RESAMPLES + 1)]
    found = [one for one in oracle.predictions(tasks) if not isinstance(one, str)]
    if len(found) < RESAMPLES:
        return [f"With rollouts drawn anew from those of the run, {point.setting.name} may end early."]
    rates = [one.prediction.samples_per_s for one in found]
    ages = [one.prediction.staleness_mean for one in found]
    return [
        f"How sure: with rollouts drawn anew from those of the run, {RESAMPLES} times, {point.setting.name} gives "
        f"{rate(min(rates))} to {rate(max(rates))} samples/s and a mean staleness of {min(ages):.1f} to "
        f"{max(ages):.1f}."
    ]


def _write(plan: Plan, out: Path) -> None:
    from asyncrl.planning.frontier_page import frontier_page

    write_page(out, frontier_page(plan))
    sys.stdout.flush()
    print(f"\nThe frontier as a page: {out}", file=sys.stderr)


# Options


def _axes(arguments: argparse.Namespace) -> Axes:
    policies: list[Policy] = []
    for name in _parts(arguments.policy):
        policy = next((known for known in POLICIES if known == name), None)
        if policy is None:
            raise ConfigError(f"--policy has {name!r}. Expected some of {', '.join(POLICIES)}, separated by commas.")
        policies.append(policy)
    return Axes(
        max_staleness=_numbers(arguments.max_staleness, "--max-staleness", least=0),
        policy=tuple(dict.fromkeys(policies)),
        window=_numbers(arguments.window, "--window"),
        batch=_numbers(arguments.batch, "--batch"),
        group=_numbers(arguments.group, "--group"),
        sync=_numbers(arguments.sync, "--sync"),
    )


def _numbers(text: str | None, option: str, least: int = 1) -> tuple[int, ...]:
    values = []
    for part in _parts(text):
        if not part.isdecimal() or int(part) < least:
            raise ConfigError(
                f"{option} has {part!r}. Expected whole numbers from {least} up, separated by commas: {option} 1,2,4."
            )
        values.append(int(part))
    return tuple(sorted(set(values)))


def _parts(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]


def _check_counts(arguments: argparse.Namespace) -> None:
    for name, least in (("steps", 10), ("jobs", 1), ("replicas", 1), ("worst", 0), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and not value >= least:
            raise ConfigError(f"--{name} is {value:g}. Expected a number from {least} up.")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Settings done and time left, on the terminal; elsewhere a line as each stage of them begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield (
            lambda done, total: (
                None if done else console.print(f"simulating {total} {'setting' if total == 1 else 'settings'} ...")
            )
        )
        return
    columns = (TextColumn("simulating settings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            if done == 0:
                shown.reset(task, total=total)
            shown.update(task, completed=done)

        yield tell
