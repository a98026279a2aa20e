"""What a sweep shows while it runs: a table in a terminal, one line per beginning and end elsewhere."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from asyncrl.metrics.rows import duration, shown
from asyncrl.storage.folder import RunFolder
from asyncrl.sweeps.processes import Job, State
from asyncrl.terminal import visible

MOST_ROWS = 16
"""Runs in the table; of more, those that run, failed, or ended last."""
TAIL_BYTES = 1 << 14
"""The last record of a run's steps is in the last so many bytes."""
STYLES: Mapping[State, str] = {"running": "bold", "finished": "green", "failed": "red", "waiting": "dim"}
ORDER: Sequence[State] = ("running", "failed", "stopped", "finished", "waiting")


class SweepView:
    """Owns what is shown. `look` and `changed` are called by whoever runs the jobs."""

    def __init__(self, jobs: Sequence[Job], totals: Mapping[str, int], console: Console) -> None:
        self._jobs = jobs
        self._totals = totals
        self._console = console
        self._records: dict[str, Mapping[str, Any]] = {}
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> SweepView:
        for job in self._jobs:
            if job.state == "finished":
                self.changed(job)
        if self._live is not None:
            self._live.start()
            self.look()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def look(self) -> None:
        """Draw how things stand."""
        if self._live is not None:
            for job in self._jobs:
                if job.state == "running":
                    self._records[job.trial.name] = last_record(job.trial.folder)
            self._live.update(self.render(time.monotonic()))

    def changed(self, job: Job) -> None:
        """A job has begun or ended: a line that stays, where it matters."""
        record = self._records[job.trial.name] = last_record(job.trial.folder)
        if self._live is None or job.state == "failed":
            place = f"[{list(self._jobs).index(job) + 1}/{len(self._jobs)}]"
            line = f"{place} {job.trial.name}: {_told(job, record, time.monotonic())}"
            self._console.print(escape(visible(line)), soft_wrap=True)

    def render(self, now: float) -> RenderableType:
        table = Table(
            title=_counts(self._jobs),
            title_justify="left",
            title_style="",
            caption_justify="left",
            box=None,
            pad_edge=False,
        )
        table.add_column("run", overflow="ellipsis", no_wrap=True)
        table.add_column("state", no_wrap=True, min_width=max(map(len, ORDER)))
        for name in ("step", "reward", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        for job in chosen(self._jobs):
            record = self._records.get(job.trial.name, {})
            total = self._totals[job.trial.name]
            table.add_row(
                Text(job.trial.name),
                Text("resumed" if job.resumed and job.state == "running" else job.state, STYLES.get(job.state, "")),
                f"{record['step']}/{total}" if "step" in record else "-",
                shown(record.get("reward_mean")),
                "-" if (seconds := job.seconds(now)) is None else duration(seconds),
            )
        hidden = len(self._jobs) - len(chosen(self._jobs))
        table.caption = f"and {hidden} more" if hidden else None
        return table


def chosen(jobs: Sequence[Job]) -> list[Job]:
    """Those that are shown, in their order."""
    first = sorted(jobs, key=lambda job: (ORDER.index(job.state), -(job.ended_at or 0.0)))[:MOST_ROWS]
    return [job for job in jobs if job in first]


def last_record(folder: Path) -> Mapping[str, Any]:
    """The newest whole line of `metrics.jsonl`; empty where there is none."""
    try:
        with RunFolder(folder).metrics.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        found = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):  # not there yet; or a line longer than any
        return {}
    return found if isinstance(found, dict) else {}


def _told(job: Job, record: Mapping[str, Any], now: float) -> str:
    if job.state == "running":
        return "goes on where it had stopped" if job.resumed else "begins"
    if job.state == "failed":
        return f"failed: {job.error}"
    seconds = job.seconds(now)
    if seconds is None:
        return "has finished before"
    reward = f", reward {shown(record.get('reward_mean'))}" if "reward_mean" in record else ""
    return f"{job.state} after {record.get('step', 0)} steps in {duration(seconds)}{reward}"


def _counts(jobs: Sequence[Job]) -> str:
    states = Counter(job.state for job in jobs)
    return f"{len(jobs)} runs: " + ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
