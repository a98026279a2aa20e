"""`asyncrl trace`: the timeline of a run as a file that trace viewers open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from asyncrl.errors import ConfigError, EngineError
from asyncrl.reports.recorded import Recorded, Window, read_recorded
from asyncrl.reports.trace import Drawn, write_trace

MOST_EVENTS = 400_000
"""Some 50 MB of JSON, for which a viewer takes about 1 GB and 10 s. More is drawn for those who ask for it."""


def trace_run(run: str, start: float | None, end: float | None, steps: tuple[int, int] | None, out: str | None) -> int:
    """Write the trace of a run, of `start` to `end` (s), or of the first to the last of `steps`."""
    recorded = read_recorded(run)
    asked = start is not None or end is not None or steps is not None
    window = _window(recorded, start, end, steps) if asked else recorded.newest(MOST_EVENTS)
    path = Path(out) if out is not None else Path(run) / "trace.json.gz"
    if path.is_dir():
        raise ConfigError(f"--out: {path} is a folder. Name a file, such as {path / 'trace.json.gz'}.")
    try:
        drawn = write_trace(recorded, window, path)
    except FileNotFoundError:
        raise ConfigError(f"--out: there is no folder {path.parent}. Make it, or name another file.") from None
    except PermissionError:
        raise ConfigError(f"{path} cannot be written. Name another file with --out.") from None
    except OSError as error:
        raise EngineError(f"{path} cannot be written: {error.strerror}.") from error
    print("\n".join(_said(recorded, drawn, path, asked=asked)))
    return 0


def _window(recorded: Recorded, start: float | None, end: float | None, steps: tuple[int, int] | None) -> Window:
    whole = recorded.times
    if steps is not None:
        window = recorded.window_of(*steps)
    else:
        window = Window(whole.start if start is None else start, whole.end if end is None else end)
    if window.start > window.end or not window.holds(whole.start, whole.end):
        raise ConfigError(
            f"there is nothing from {window.start:g} s to {window.end:g} s: the run was recorded from "
            f"{whole.start:.1f} s to {whole.end:.1f} s."
        )
    return replace(window, start=max(window.start, whole.start), end=min(window.end, whole.end))


def _said(recorded: Recorded, drawn: Drawn, path: Path, *, asked: bool) -> list[str]:
    window, whole = drawn.window, recorded.times
    of_evaluations = f", {drawn.evaluated:,} rollouts of evaluations" if drawn.evaluated else ""
    lines = [
        f"{path} ({drawn.events:,} events, {path.stat().st_size / 1e6:.1f} MB)",
        f"{window.start:,.1f} s to {window.end:,.1f} s of {whole.end:,.1f} s: {drawn.steps:,} "
        f"{'step' if drawn.steps == 1 else 'steps'}, {drawn.rollouts:,} rollouts, at most {drawn.lanes:,} at once"
        f"{of_evaluations}",
    ]
    if recorded.undone:
        lines.append(f"left out: {recorded.undone:,} rollouts that a resume has taken back")
    if not asked and window != whole:
        lines.append(
            f"the end of the run, as much as a viewer takes with ease ({MOST_EVENTS:,} events). Another part: --from "
            "and --to in seconds, or --step N:M"
        )
    if asked and drawn.events > MOST_EVENTS:
        lines.append(f"a viewer takes about {drawn.events / 4e5:.0f} GB of memory for it; a shorter part takes less")
    lines.append("Open it in https://ui.perfetto.dev: it stays on your machine.")
    return lines
