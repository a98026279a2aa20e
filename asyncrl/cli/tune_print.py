"""A plan on the terminal: what was simulated, the grid, and the recommendation."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncrl.planning.grid import AS_FAST
from asyncrl.planning.plan import FIXED, Plan, rate
from asyncrl.planning.setting import Point
from asyncrl.terminal import visible

MOST_ROWS = 40
"""Of the grid. A larger one shows what is on the frontiers; the page has all."""
EXTRA = {"window": "window", "groups_per_step": "batch", "group_size": "group", "sync_interval": "sync"}


def print_plan(plan: Plan, console: Console) -> None:
    start = Table.grid(padding=(0, 2))
    start.add_column(style="bright_black", no_wrap=True)
    for what, how in plan.modelled.said:
        start.add_row(what, visible(how))
    console.print(start)
    console.print()
    console.print(_ideal(plan))
    if (agreement := plan.agreement()) is not None:
        console.print(agreement, style="" if plan.agrees else "yellow")
    for line in plan.notes:
        console.print(Text(line, "yellow"))
    console.print()
    console.print(_table(plan))
    console.print(Text("* on the frontier of rate and mean staleness   o of rate and worst staleness", "bright_black"))
    for trouble in plan.troubles():
        console.print(Text(visible(trouble), "yellow"))
    console.print()
    console.print(Text("Recommended", "bold green"))
    for sentence in plan.advice.reasons:
        console.print(sentence)
    console.print()
    if plan.toml:
        console.print("To take it, put this into the config:", style="bright_black")
        console.print(Text(plan.toml, "green"), soft_wrap=True)
        if plan.fixes_window:
            console.print(Text(f"\n{FIXED}", "bright_black"))
    else:
        console.print("The config has it already.")


def _ideal(plan: Plan) -> str:
    most = max(found for _, found in plan.search.windows)
    window = min(window for window, found in plan.search.windows if found >= AS_FAST * most)
    return (
        f"The ideal rate, without any bound on staleness, is {rate(plan.search.ideal)} samples/s; a window of "
        f"{window:,} rollouts at once is enough for it."
    )


def _table(plan: Plan) -> Table:
    extra = {name: title for name, title in EXTRA.items() if plan.varies(name)}
    table = Table(box=None, pad_edge=False, header_style="bright_black", collapse_padding=True)
    table.add_column("", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    table.add_column("max\nstale", justify="right")
    for title in extra.values():
        table.add_column(title, justify="right")
    table.add_column("samples\nper s", justify="right", no_wrap=True)
    table.add_column("of\nideal", justify="right", no_wrap=True)
    table.add_column("mean\nsteps", justify="right", no_wrap=True)
    table.add_column("worst\nsteps", justify="right", no_wrap=True)
    table.add_column("trainer\nwaits", justify="right", no_wrap=True)
    if lost := any(point.lost >= 0.005 for point in plan.search.points):
        table.add_column("tokens\nlost", justify="right", no_wrap=True)
    table.add_column("limited\nby", no_wrap=True)
    by_mean, by_worst = plan.by_mean, plan.by_worst

    def add(point: Point, mark: str, style: str | None) -> None:
        setting = point.setting
        varied = [getattr(setting, name) for name in extra]
        table.add_row(
            mark,
            setting.policy,
            str(setting.max_staleness),
            *("auto" if value is None else f"{value:,}" for value in varied),
            rate(point.samples_per_s),
            f"{point.share:.0%}",
            f"{point.staleness_mean:.1f}",
            f"{point.staleness_worst:.0f}",
            f"{point.wait_share:.0%}",
            *([f"{point.lost:.0%}"] if lost else []),
            point.binds,
            style=style,
        )

    if plan.now is not None:
        add(plan.now, "now", "bright_black")
    points = plan.ordered()
    if len(points) > MOST_ROWS:
        points = [point for point in points if point in by_mean or point in by_worst or point is plan.advice.point]
    for point in points:
        mark = ("*" if point in by_mean else "") + ("o" if point in by_worst else "")
        chosen = point is plan.advice.point
        add(point, f"{mark} <-" if chosen else mark, "bold green" if chosen else None)
    return table
