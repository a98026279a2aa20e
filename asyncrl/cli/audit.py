"""`asyncrl audit RUN [RUN ...]`: proves that every prompt of a run is accounted for, or says what is off."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncrl.errors import ConfigError, DataError
from asyncrl.storage.audit import Fault, LifeTally
from asyncrl.storage.audit_run import Audit, audit_run
from asyncrl.storage.folder import RunFolder, existing_run
from asyncrl.storage.ledger_file import Event, Life, read_ledger
from asyncrl.terminal import visible

CLEAN, OFF, NO_LEDGER = 0, 1, 2
"""Exit codes; that of several runs is the highest."""
MOST_SHOWN = 10
"""Faults of one kind, and reasons of rejections."""
LONGEST_REASON = 300
"""Characters."""


def audit_runs(runs: Sequence[str], row: int | None = None) -> int:
    """Print what became of the prompts of each run, and what is off; or the history of one row. Returns the exit code.

    Raises:
        DataError: there is one run, and it has no ledger that can be read.
        ConfigError: there is one run, and no such folder.
    """
    console = Console(highlight=False, emoji=False, markup=False)
    code = CLEAN
    for run in runs:
        try:
            root = existing_run(run)
            code = max(code, _audit(root, console) if row is None else _show_row(root, row, console))
        except (ConfigError, DataError) as error:
            if len(runs) == 1:
                raise
            console.print(Text.assemble((f"{run}: ", "bold"), (str(error), "red")), soft_wrap=True)
            code = NO_LEDGER
    return code


def _audit(root: Path, console: Console) -> int:
    audit = audit_run(root)
    verdict = ("clean", "bold green") if not audit.faults else (f"off ({len(audit.faults)})", "bold red")
    console.print(Text.assemble((f"{root}: ", "bold"), verdict, f" · {_how_it_stands(audit)}"), soft_wrap=True)
    if audit.lives:
        console.print(_lives(audit))
    for line in [*_counts(audit), *_faults(audit.faults)]:
        console.print(line, soft_wrap=True)
    console.print()
    return OFF if audit.faults else CLEAN


def _how_it_stands(audit: Audit) -> str:
    if not audit.lives:
        return "nothing has happened"
    if audit.lives[-1].ended_at is None:
        last = audit.account.last_at
        since = f", last heard of at {_time(last)}" if last is not None else ""
        return f"running, or killed{since}"
    return "its data came to the end: each draw ended once" if audit.data_ended else "ended"


def _lives(audit: Audit) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for name in ("life", "started", "ended", "went on from", "steps", "events", "undone"):
        table.add_column(name, justify="right" if name in ("events", "undone") else "left", no_wrap=True)
    steps = {0: 0} | {number: tally.step for number, tally in audit.account.tallies.items()}
    for life in audit.lives:
        tally = audit.account.by_life.get(life.life, LifeTally())
        table.add_row(
            str(life.life),
            _time(life.started_at),
            _time(life.ended_at) if life.ended_at is not None else "-",
            _origin(life, steps),
            "-" if tally.steps is None else "-".join(map(str, dict.fromkeys(tally.steps))),
            f"{tally.events:,}",
            f"{tally.undone:,}",
        )
    return table


def _origin(life: Life, steps: dict[int, int]) -> str:
    if not life.resumed_from:
        return "the start"
    step = steps.get(life.resumed_from)
    return f"step {step}" if step is not None else f"event {life.resumed_from:,}"


def _counts(audit: Audit) -> list[str]:
    counts, account = audit.account.summary(), audit.account
    ends = " + ".join(f"{counts[end]:,} {end}" for end in ("trained", "filtered", "rejected", "pending"))
    lines = [f"{counts['admitted']:,} admitted = {ends}"]
    again = [f"{account.counts[state]:,} {state}" for state in ("requeued", "restarted") if account.counts[state]]
    if again:
        lines.append(f"rolled out again: {', '.join(again)}")
    lines += [f"rejected {count:,} x: {_line(why)}" for why, count in account.reasons.most_common(MOST_SHOWN)]
    return lines


def _faults(faults: list[Fault]) -> list[Text]:
    lines = []
    for kind, alike in groupby(sorted(faults, key=lambda fault: fault.kind), key=lambda fault: fault.kind):
        found = list(alike)
        lines += [Text.assemble((f"{kind}: ", "red"), fault.what) for fault in found[:MOST_SHOWN]]
        if len(found) > MOST_SHOWN:
            lines.append(Text.assemble((f"{kind}: ", "red"), f"... and {len(found) - MOST_SHOWN:,} more"))
    return lines


def _show_row(root: Path, row: int, console: Console) -> int:
    """The history of one dataset row, over all epochs and lives."""
    with read_ledger(RunFolder(root).ledger) as ledger:
        events = list(ledger.events(row))
    console.print(Text(f"{root}: row {row}", "bold"), soft_wrap=True)
    if not events:
        console.print("It has not been admitted.")
        return CLEAN
    table = Table(box=None, pad_edge=False, header_style="bright_black")
    for name in ("time", "event", "life", "epoch", "group", "state", ""):
        table.add_column(name, no_wrap=bool(name), overflow="fold")
    for event in events:
        place = [str(number) for number in (event.id, event.life, event.epoch, event.sequence)]
        style = "bright_black" if event.undone else None
        table.add_row(_time(event.time), *place, event.state, _details(event), style=style)
    console.print(table)
    return CLEAN


def _details(event: Event) -> str:
    details = ["undone"] if event.undone else []
    if event.step is not None:
        details.append(f"step {event.step}")
    if event.version is not None:
        details.append(f"version {event.version}")
    if event.rewards is not None:
        rewards = Counter(f"{reward:g}" for reward in json.loads(event.rewards))
        details.append("rewards " + ", ".join(f"{n} x {reward}" if n > 1 else reward for reward, n in rewards.items()))
    if event.reason is not None:
        details.append(_line(event.reason))
    return ", ".join(details)


def _line(reason: str) -> str:
    """It may hold what an exception said."""
    return visible(" ".join(reason.split()))[:LONGEST_REASON]


def _time(seconds: float) -> str:
    """As the user's clock shows it."""
    return f"{datetime.fromtimestamp(seconds):%b %d %H:%M:%S}"
