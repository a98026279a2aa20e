"""How the live view looks. No clock and no terminal here.

Each row has its place and one line, and what binds has as many as it may need: the panel keeps its height while a run
goes on, but for a row of evaluations once there are some. Four times a second it takes the interpreter from the
rollouts, so it is made of plain lines: rich's tables take ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.panel import Panel
from rich.text import Text

from asyncrl.metrics import rows
from asyncrl.metrics.progress import Progress

WIDTH = 120
"""Widest panel, in columns."""
NAMES = 11
"""Columns of the rows' names."""
LONGEST = 235
"""Characters of what binds, about; they take more lines in a narrow terminal."""
MOST_LINES = 6


def panel(progress: Progress, now: float) -> RenderableType:
    """The whole view: a headline with a bar, one row per question, and what binds."""
    framed = Panel(
        _Lines(progress, now),
        title=Text(progress.title, style="bold", overflow="ellipsis", no_wrap=True),
        title_align="left",
        border_style="dim",
        padding=(0, 1),
    )
    return Constrain(framed, WIDTH)


def plain_line(progress: Progress, now: float) -> str:
    """One step as one line, for logs."""
    shares, _ = progress.told()
    under_way = (rows.in_flight(progress), rows.ready(progress), rows.errors(progress))
    parts = [
        _steps(progress),
        f"reward {rows.shown(progress.last('reward_mean'))}",
        f"staleness {rows.shown(progress.last('staleness_mean'), 1)} (worst {progress.worst_staleness:.0f})",
        ", ".join(part for part in under_way if part),
        f"{rows.rounded(progress.rate('tokens_generated'))} tokens/s, "
        f"{rows.rounded(progress.rate('samples'))} samples/s",
        str(shares) if shares is not None else "",
        _clock(progress, now),
    ]
    return " | ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class _Lines:
    """The inside of the frame."""

    progress: Progress
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield self._headline(width)
        yield Text()
        for name, said in _rows(self.progress):
            yield Text.assemble((f"{name:{NAMES}}", "dim"), said, no_wrap=True, overflow="ellipsis")
        yield Text()
        yield from _block(rows.binding(self.progress), console, width)

    def _headline(self, width: int) -> Text:
        steps, clock = _steps(self.progress), _clock(self.progress, self.now)
        room = max(1, width - len(steps) - len(clock) - 2)
        done = " " * room, ""
        if self.progress.total_steps:
            full = min(room, room * self.progress.step // self.progress.total_steps)
            done = "━" * full, "━" * (room - full)
        return Text.assemble(
            (steps, "bold"),
            " ",
            (done[0], "green"),
            (done[1], "dim"),
            " ",
            (clock, "dim"),
            no_wrap=True,
            overflow="crop",
        )


def _rows(progress: Progress) -> Iterator[tuple[str, str | Text]]:
    yield "reward", rows.reward(progress)
    if held_out := rows.held_out(progress):
        yield "held-out", held_out
    yield "staleness", rows.staleness(progress)
    if "staleness_reason" in progress.gauges:
        yield "bound", str(progress.gauges["staleness_reason"])
    yield "now", rows.flow(progress)
    yield "window", rows.window(progress)
    yield "sampler", rows.sampler(progress)
    yield from rows.replicas(progress)
    yield "trainer", rows.trainer(progress)
    yield "weights", rows.weights(progress)
    errors = rows.errors(progress)
    yield "errors", Text(errors, style="yellow") if errors else Text("none")
    yield "time", rows.shares(progress)


def _block(text: Text, console: Console, width: int) -> Iterator[Text]:
    """The text over as many lines as the longest would take at this width."""
    height = min(MOST_LINES, -(-LONGEST // max(1, width - 6)))
    lines = list(text.wrap(console, width))
    if len(lines) > height:
        lines[height - 1].append(" " * width)
        lines[height - 1].truncate(width, overflow="ellipsis")
    yield from lines[:height]
    yield from (Text() for _ in range(height - len(lines)))


def _steps(progress: Progress) -> str:
    return f"step {progress.step}" + (f"/{progress.total_steps}" if progress.total_steps else "")


def _clock(progress: Progress, now: float) -> str:
    remaining = progress.remaining_s(now)
    spent = rows.duration(now - progress.started_at)
    return spent if remaining is None else f"{spent}, {rows.duration(remaining)} left"
