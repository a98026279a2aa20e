"""`asyncrl sweep CONFIG.toml NAME=VALUE,VALUE ... [--out DIR] [--jobs N] [--section.field VALUE ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from asyncrl.assemble import steps_at_most
from asyncrl.cli.config import load_config
from asyncrl.cli.sweep_view import SweepView
from asyncrl.cli.train import require_dataset
from asyncrl.data import load_rows
from asyncrl.errors import ConfigError, DataError
from asyncrl.exits import FAILED, FINISHED
from asyncrl.interrupt import Interrupt, stop_on_signals
from asyncrl.reports.run_data import flat, load_run
from asyncrl.reports.settings import PLACES
from asyncrl.storage.folder import RunFolder, make_folder, write_json
from asyncrl.sweeps.processes import Job, Runner
from asyncrl.sweeps.results import Group, Result, group_results, has_finished, read_result, target_of
from asyncrl.sweeps.trials import Axis, Trial, make_trials, parse_axis

UNDER_WAY = ("checkpoint.init_from", *PLACES)
"""Settings that a run may settle for itself, so that they differ from those that were asked for."""
NUMBERS = ("steps", "seconds", "final", "best", "held_out", "samples_per_s", "worst_staleness")
"""Of a result, in sweep.json."""


def sweep(config_file: str, axes: Sequence[str], rest: Sequence[str], out: str | None, jobs: int) -> int:
    """Train every combination that is not trained yet, compare them, and return the exit code."""
    folder = Path(out or f"sweeps/{Path(config_file).stem}")
    shared, more_axes = _sorted_out(rest)
    swept = [parse_axis(text) for text in (*axes, *more_axes)]
    _refuse_contradictions(shared, swept)
    trials = make_trials(swept, lambda given: load_config(config_file, given), folder, shared)
    totals = _check_data(trials)
    work = [_job(trial) for trial in trials]
    make_folder(folder, "--out")
    console = Console(highlight=False)
    console.print(f"sweep of {len(work)} runs in {folder}", soft_wrap=True)
    runner = Runner(work, lambda trial: _command(config_file, trial), at_once=jobs)
    interrupt = Interrupt()
    interrupt.stop = runner.stop
    with SweepView(work, totals, console) as view, stop_on_signals(interrupt, at_once=runner.kill):
        runner.on_change = view.changed
        runner.run(view.look)
    _conclude(swept, work, folder, console)
    interrupt.raise_if_requested()
    return FAILED if any(job.state == "failed" for job in work) else FINISHED


def _sorted_out(rest: Sequence[str]) -> tuple[list[str], list[str]]:
    """Settings with their values, and axes that stand behind one."""
    settings, axes, words = [], [], iter(rest)
    for word in words:
        if not word.startswith("--"):
            axes.append(word)
        elif "=" in word:
            settings.append(word)
        else:
            settings += [word, *islice(words, 1)]
    return settings, axes


def _refuse_contradictions(shared: Sequence[str], swept: Sequence[Axis]) -> None:
    for word in shared:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in [axis.setting for axis in swept]:
            raise ConfigError(f"--{name} is given, and swept too. Leave one of them out.")
        if word.startswith("--") and name == "run_dir":
            raise ConfigError("--run_dir: each run of a sweep has its own folder. --out names the one they are in.")


def _check_data(trials: Sequence[Trial]) -> dict[str, int]:
    """Steps of each trial, by its name. Raises `UserError` for data that cannot be used."""
    rows = {path: len(load_rows(path)) for path in {require_dataset(trial.config.dataset) for trial in trials}}
    for trial in trials:
        if trial.config.evaluation.dataset is not None:
            require_dataset(trial.config.evaluation.dataset, "evaluation.dataset")
        if trial.config.rollout_fn is None:
            raise ConfigError("rollout_fn: this setting is needed: a sweep runs `asyncrl train`, which takes it.")
    return {trial.name: steps_at_most(trial.config, rows[str(trial.config.dataset)]) for trial in trials}


def _job(trial: Trial) -> Job:
    """What is left to do for a trial. Raises `ConfigError` where its folder holds a run of other settings."""
    folder = RunFolder(trial.folder)
    if not folder.exists():
        return Job(trial)
    before = dict(flat(load_config(folder.config).model_dump(mode="json")))
    now = dict(flat(trial.config.model_dump(mode="json")))
    names = [name for name in {**before, **now} if name not in UNDER_WAY and before.get(name) != now.get(name)]
    if names:
        found = ", ".join(f"{name} {before.get(name)!r}, now {now.get(name)!r}" for name in names[:3])
        raise ConfigError(
            f"{trial.folder} holds a run of other settings ({found}). A sweep goes on with what it finds: name another "
            "folder with --out, or remove this one."
        )
    return Job(trial, "finished" if has_finished(trial.folder) else "waiting", resumed=True)


def _command(config_file: str, trial: Trial) -> list[str]:
    return [sys.executable, "-m", "asyncrl", "train", config_file, "--resume", "latest", *trial.overrides]


# What is said at the end


def _conclude(axes: Sequence[Axis], jobs: Sequence[Job], folder: Path, console: Console) -> None:
    results = {job.trial.name: read_result(job.trial.folder) for job in jobs if job.state in ("finished", "stopped")}
    finished = [job for job in jobs if job.state == "finished"]
    target = target_of([results[job.trial.name] for job in finished])
    by_group: dict[str, list[Result]] = {}
    for job in finished:
        by_group.setdefault(job.trial.group, []).append(results[job.trial.name])
    groups = group_results(by_group, target)
    if groups:
        reward = "held-out reward" if all(result.held_out for result in results.values()) else "training reward"
        console.print(f"mean ± standard deviation over repetitions; {reward}", soft_wrap=True)
        console.print(_table(groups, target))
    write_json(folder / "sweep.json", _as_json(axes, jobs, results, groups, target))
    report = _report(finished, folder, console)
    for job in jobs:
        if job.state == "failed":
            console.print(f"{job.trial.name} failed: {job.error} (all of it: {job.log})", soft_wrap=True, markup=False)
    left = sum(job.state in ("waiting", "stopped") for job in jobs)
    if left or len(finished) < len(jobs):
        console.print(
            f"{len(finished)} of {len(jobs)} runs have finished. The same command goes on with the others.",
            soft_wrap=True,
        )
    console.print(f"results: {folder / 'sweep.json'}" + (f"; report: {report}" if report else ""), soft_wrap=True)


def _table(groups: Sequence[Group], target: float | None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    table.add_column("settings", overflow="fold")
    time_to = f"s to {target:.3g}" if target is not None else "s to -"
    for column in ("runs", "final", "best", time_to, "samples/s", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    for group in groups:
        table.add_row(
            group.name,
            str(group.runs),
            str(group.final),
            str(group.best),
            _time_to(group),
            str(group.samples_per_s),
            "-" if group.worst_staleness is None else str(group.worst_staleness),
        )
    table.caption = "worst: staleness of any trained token, in steps"
    table.caption_justify = "left"
    return table


def _time_to(group: Group) -> str:
    """With how many runs got there, where not all did."""
    if group.reached == group.runs or not group.reached:
        return str(group.seconds_to_target)
    return f"{group.seconds_to_target} ({group.reached}/{group.runs})"


def _as_json(
    axes: Sequence[Axis],
    jobs: Sequence[Job],
    results: dict[str, Result],
    groups: Sequence[Group],
    target: float | None,
) -> dict[str, object]:
    def of(job: Job) -> dict[str, object]:
        result = results.get(job.trial.name)
        return {
            "name": job.trial.name,
            "folder": str(job.trial.folder),
            "values": dict(job.trial.values),
            "state": job.state,
            "error": job.error or None,
            **{name: getattr(result, name, None) for name in NUMBERS},
            "seconds_to_target": result.seconds_to(target) if result and target is not None else None,
        }

    return {
        "axes": {axis.setting: list(axis.values) for axis in axes},
        "target_reward": target,
        "groups": [group.as_json() for group in groups],
        "runs": [of(job) for job in jobs],
    }


def _report(finished: Sequence[Job], folder: Path, console: Console) -> Path | None:
    """The comparison of all that have finished; None where it cannot be made."""
    if not finished:
        return None
    from asyncrl.reports.report import write_report

    groups: dict[str, list[str]] = {}
    for job in finished:
        groups.setdefault(job.trial.group, []).append(str(job.trial.folder))
    try:
        write_report([load_run(job.trial.folder) for job in finished], folder / "report.html", groups=groups)
    except (ConfigError, DataError) as error:
        console.print(f"warning: there is no report: {error}", soft_wrap=True, markup=False)
        return None
    return folder / "report.html"
