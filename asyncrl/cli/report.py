"""`asyncrl report RUN [RUN ...]`: everything that runs have to say, as one HTML page, or as one that is served."""

from __future__ import annotations

import asyncio
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.reports.page import Model
from asyncrl.reports.report import report, write_report
from asyncrl.reports.run_data import RunData, load_run
from asyncrl.reports.serve import serve
from asyncrl.reports.settings import by_seed

NAME = "report.html"


def report_runs(runs: Sequence[str], out: str | None = None, *, join_seeds: bool = False, show: bool = False) -> int:
    """Write the page and say where it is; returns the exit code.

    `out`: None is `report.html`: in the run folder, or in the current folder for several runs.
    `join_seeds`: runs that differ in their seed alone are shown as one. `show`: open it in a browser.

    Raises:
        ConfigError: there is no such run, or the file cannot be written.
        DataError: a file of a run cannot be read.
    """
    _require_different(runs)
    loaded = [load_run(run) for run in runs]
    path = Path(out) if out is not None else (loaded[0].root if len(loaded) == 1 else Path()) / NAME
    if path.is_dir():
        path /= NAME
    write_report(loaded, path, groups=_groups(loaded, join_seeds=join_seeds))
    print(f"report: {path}  ({path.stat().st_size / 1e6:.1f} MB, opens without a network)")
    if show:
        webbrowser.open(path.absolute().as_uri())
    return 0


def serve_report(runs: Sequence[str], *, join_seeds: bool = False, show: bool = False, port: int = 0) -> int:
    """Serve the page until Ctrl-C; returns the exit code.

    Raises:
        ConfigError: there is no such run, or the port is taken.
        DataError: a file of a run cannot be read.
    """
    _require_different(runs)

    def make() -> Model:
        loaded = [load_run(run) for run in runs]
        return report(loaded, groups=_groups(loaded, join_seeds=join_seeds), live=True)

    def ready(address: str) -> None:
        print(f"report: {address}\nIt follows the run. Ctrl-C ends it.", flush=True)
        if show:
            webbrowser.open(address)

    try:
        asyncio.run(serve([Path(run) for run in runs], make, ready, port=port))
    except KeyboardInterrupt:
        print()
    return 0


def _require_different(runs: Sequence[str]) -> None:
    """One run shown twice would be called by one name."""
    folders = [Path(run).resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"{run} is named twice. Name each run once.")


def _groups(runs: Sequence[RunData], *, join_seeds: bool) -> Mapping[str, Sequence[str]] | None:
    return by_seed(runs) if join_seeds and len(runs) > 1 else None
