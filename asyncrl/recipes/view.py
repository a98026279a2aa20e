"""How a run without rollouts shows itself: a bar in a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Mode = Literal["auto", "bar", "quiet"]
"""`bar`: without the notes; `quiet`: nothing at all."""

LINE_INTERVAL_S = 5.0
SHOWN = ("loss", "reward_accuracy", "reward_margin", "grad_norm")
"""Metrics of a step that are worth a look each time."""


class RunView:
    """Shows a run while it goes on. Use it as a context manager."""

    def __init__(self, title: str, mode: Mode, console: Console | None = None) -> None:
        self._title, self._mode = title, mode
        self._console = console or Console(highlight=False)
        self._draws = self._console.is_terminal and mode != "quiet"
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._draws,
        )
        self._stack = ExitStack()
        self._last_line_at = time.monotonic()

    def __enter__(self) -> RunView:
        self._stack.enter_context(self._bars)
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._mode == "auto":
            self._bars.console.print(escape(text), soft_wrap=True)

    def watch(self, what: str, items: range) -> Iterator[int]:
        """Go through `items`, showing how far it is."""
        task = self._bars.add_task(what, total=len(items), note="")
        for item in items:
            yield item
            self._bars.advance(task)
        self._bars.remove_task(task)

    def steps(self, total: int, records: Iterable[Mapping[str, float]]) -> Iterator[Mapping[str, float]]:
        """Go through the records of the steps as they are made, showing each."""
        task = self._bars.add_task(self._title, total=total, note="")
        for record in records:
            note = " ".join(f"{name} {record[name]:.4g}" for name in SHOWN if name in record)
            self._bars.update(task, completed=int(record["step"]), note=note)
            self._line(f"{self._title}: step {int(record['step'])}/{total} {note}", last=record["step"] == total)
            yield record

    def _line(self, text: str, *, last: bool) -> None:
        now = time.monotonic()
        if self._mode != "quiet" and not self._draws and (last or now - self._last_line_at >= LINE_INTERVAL_S):
            self._last_line_at = now
            self._console.print(escape(text), soft_wrap=True)
