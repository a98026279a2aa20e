"""The live view of a run: a few lines in a terminal, one plain line per step elsewhere.

with LiveView("gsm8k", total_steps=200) as view:
    view.gauges({"in_flight": 61, "window": 64})    # a few times a second
    view.step(record)                               # once per optimizer step
    view.note("saved to runs/...")                  # a line that stays
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from asyncrl.metrics.names import StepRecord
from asyncrl.metrics.panel import panel, plain_line
from asyncrl.metrics.progress import TRAINING, Progress
from asyncrl.terminal import visible

Mode = Literal["auto", "live", "plain", "quiet"]

PLAIN_INTERVAL_S = 5.0
"""Shortest time from one plain line to the next: a log of a fast run stays readable."""


class LiveView:
    """Shows a run while it goes on.

    `auto` is `live` in a terminal and `plain` in a pipe, a file or CI. `quiet` shows notes only.
    A thread of rich's redraws 4 times a second; `step` and `gauges` store and return at once.
    """

    def __init__(
        self,
        title: str,
        total_steps: int | None = None,
        *,
        mode: Mode = "auto",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._mode = ("live" if _can_draw(self._console) else "plain") if mode == "auto" else mode
        self._clock = clock
        self.doing: Callable[[], str] = lambda: TRAINING
        """What the run does, by the names of its phases: it loads, trains, evaluates, saves."""
        self._progress = Progress(title, total_steps, clock())
        self._last_line_at: float | None = None
        self._last_line_step = 0
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        self._progress.started_at = self._clock()
        if self._mode == "live":
            self._live = Live(console=self._console, get_renderable=self.render, refresh_per_second=4, transient=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self.catch_up()

    def render(self) -> Any:
        """The panel as it would be drawn now."""
        self._progress.doing = self.doing()
        return panel(self._progress, self._clock())

    def step(self, record: StepRecord) -> None:
        """Take the record of an optimizer step."""
        self._progress.add(record)
        now = self._clock()
        due = self._last_line_at is None or now - self._last_line_at >= PLAIN_INTERVAL_S
        if self._mode == "plain" and (due or self._progress.step == self._progress.total_steps):
            self._print_line()

    def catch_up(self) -> None:
        """Print the line of the last step now, before what is said about the end of the run."""
        if self._mode == "plain" and self._last_line_step < self._progress.step:
            self._print_line()

    def gauges(self, values: Mapping[str, Any]) -> None:
        """Take what is true now: `in_flight`, `window`, `queue_groups`, ... by the names of docs/metrics.md, and for
        people `phase`, `window_reason`, `staleness_reason`, and lists with an entry for each replica."""
        self._progress.observe(dict(values), self._clock())

    def evaluated(self, record: StepRecord) -> None:
        """Take what an evaluation found."""
        self._progress.evaluations.append(record)

    def note(self, text: str) -> None:
        """Print a line that stays, above the panel."""
        self._console.print(escape(visible(text)), soft_wrap=True)

    def _print_line(self) -> None:
        self._last_line_at, self._last_line_step = self._clock(), self._progress.step
        self._console.print(escape(plain_line(self._progress, self._last_line_at)), soft_wrap=True)


def _can_draw(console: Console) -> bool:
    """A real terminal with bars in its character set. Variables that force colours (CI sets them) do not count."""
    return console.file.isatty() and not console.is_dumb_terminal and console.encoding.lower().startswith("utf")
