"""`asyncrl report`: everything that runs have to say, as one HTML page."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np

from asyncrl import __version__
from asyncrl.errors import ConfigError
from asyncrl.metrics.bottleneck import where_time_went
from asyncrl.reports.browser import rollouts_block
from asyncrl.reports.charts import off_policy, reward, speed
from asyncrl.reports.curves import Curves, Entry
from asyncrl.reports.page import Block, Column, Model, Section, Tile, Tone, model, note, page, table, tiles, write_page
from asyncrl.reports.run_data import Records, RunData
from asyncrl.reports.selection import difference, rollouts_of, selection, sentence
from asyncrl.reports.settings import changed, differing, labels, said

SCRIPTS = ("rollouts.js",)
SILENT_S = 300.0
"""A run that has not been heard of for so long may have been killed: nobody wrote an end."""
ENDS = 10
"""The first and the last reward are means over this part of the steps."""


def write_report(runs: Sequence[RunData], out: Path, *, groups: Mapping[str, Sequence[str]] | None = None) -> None:
    """Write the report of `runs` to the file `out`.

    Args:
        runs: One, or several to be compared.
        out: An HTML file. It may exist if it is such a page.
        groups: Name -> runs, by their names (`RunData.name`) or folders, that are shown as one: their mean, in the
            band that they span. Runs that no group names stand for themselves.

    Raises:
        ConfigError: `out` cannot be written, or a group names a run that is not there.
        DataError: the log of the rollouts is damaged.
    """
    write_page(out, page(report(runs, groups=groups), scripts=SCRIPTS))


def report(runs: Sequence[RunData], *, groups: Mapping[str, Sequence[str]] | None = None, live: bool = False) -> Model:
    """What the page shows. Raises: as `write_report`."""
    entries = _entries(runs, groups)
    curves = Curves(entries)
    sections = [
        _overview(runs) if len(runs) == 1 else _comparison(entries),
        reward(curves),
        off_policy(curves),
        speed(curves),
        *([_selection(entries), Section("Rollouts", [rollouts_block(entries)])] if _rolls_out(runs) else []),
        _settings(runs),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    shown = [section for section in sections if section.blocks]
    over = all(run.state != "going on" for run in runs)
    subtitle = f"{', '.join(f'`{run.root}`' for run in runs)} · asyncrl {__version__}"
    return model(title, shown, subtitle=subtitle, state=_state(runs), live=live, over=over)


def _rolls_out(runs: Sequence[RunData]) -> bool:
    """Supervised training does not."""
    return any(run.ledger or run.timeline or "wait_s" in run.steps for run in runs)


def _entries(runs: Sequence[RunData], groups: Mapping[str, Sequence[str]] | None) -> list[Entry]:
    known = {run.name: run for run in runs} | {str(run.root): run for run in runs}
    for name, members in (groups or {}).items():
        if missing := [member for member in members if member not in known]:
            raise ConfigError(f"group {name!r} names the run {missing[0]!r}; there are {', '.join(known)}.")
    named = {name: [known[member] for member in members] for name, members in (groups or {}).items()}
    in_groups = [run for members in named.values() for run in members]
    shown = [(name, members) for name, members in named.items() if members]
    shown += [
        (label, [run]) for label, run in zip(labels(runs), runs, strict=True) if id(run) not in map(id, in_groups)
    ]
    return [Entry(name, color, members) for color, (name, members) in enumerate(shown)]


def _state(runs: Sequence[RunData]) -> str:
    if len(runs) > 1:
        going = sum(run.state == "going on" for run in runs)
        return f"{going} of {len(runs)} runs go on" if going else "all runs have ended"
    run = runs[0]
    if run.state != "going on" or run.heard_at is None:
        return run.state
    alive = run.state if time.time() - run.heard_at < SILENT_S else "going on, or killed"
    return f"{alive} · step {len(run.steps)} at {datetime.fromtimestamp(run.heard_at):%H:%M:%S}"


# One run


def _overview(runs: Sequence[RunData]) -> Section:
    run = runs[0]
    blocks: list[Block] = [tiles("numbers", _tiles(run))]
    if failed := _failed(run):
        blocks.append(note("error", failed, "warn"))
    if run.summary is not None and run.summary.get("ended_early"):
        blocks.append(note("early", f"The run ended early: {run.summary['ended_early']}", "warn"))
    if not len(run.steps) or _rolls_out(runs):
        blocks.append(note("bottleneck", _bound(run)))
    return Section("Overview", blocks)


def _failed(run: RunData) -> str:
    """With the error, over several lines; empty for a run that did not fail."""
    return f"The run failed: {run.summary['error']}" if run.state == "failed" and run.summary is not None else ""


def _bound(run: RunData) -> str:
    return where_time_went(run.account) if len(run.steps) else "No optimizer step has been taken yet."


def _tiles(run: RunData) -> Iterator[Tile]:
    wanted = run.settings.get("max_steps")
    yield Tile("optimizer steps", f"{len(run.steps):,}", f"of {wanted:,}" if isinstance(wanted, int) else "")
    if len(run.steps):
        yield Tile("time", _duration(float(run.steps["time_s"][-1])), "of training")
    if (ends := _reward_ends(run)) is not None:
        first, last = ends
        tone: Tone = "good" if last > first else "plain"
        yield Tile("reward in training", f"{first:.3g} → {last:.3g}", "first and last tenth of the steps", tone)
    if (measured := _evaluated(run)) is not None:
        yield measured
    if (worst := _most(run.steps["staleness_max"])) is not None:
        bound = run.settings.get("staleness.max_staleness")
        hard = run.settings.get("staleness.policy") == "wait"
        about = f"bound: {bound}" if hard else f"paced at {bound}, no bound"
        over = hard and isinstance(bound, int) and worst > bound
        mean = _mean_staleness(run.steps)
        about += f", mean {mean:.2g}" if mean is not None else ""
        yield Tile(
            "worst staleness", f"{worst:g} {'step' if worst == 1 else 'steps'}", about, "warn" if over else "plain"
        )
    if run.ledger:
        rest = ", ".join(
            f"{run.ledger[name]:,} {name}" for name in ("filtered", "rejected", "pending") if run.ledger[name]
        )
        yield Tile("groups trained", f"{run.ledger['trained']:,} of {run.ledger['admitted']:,}", rest)
    if len(run.steps) and "tokens_generated" in run.steps:
        seconds = float(np.nansum(run.steps["step_s"])) or float("nan")
        drawn = float(np.nansum(run.steps["tokens_generated"])) / seconds
        samples = float(np.nansum(run.steps["samples"])) / seconds
        yield Tile("throughput", f"{drawn:,.0f} tokens/s", f"drawn; {samples:,.3g} samples/s trained")


def _reward_ends(run: RunData) -> tuple[float, float] | None:
    rewards = run.steps["reward_mean"][np.isfinite(run.steps["reward_mean"])]
    if not len(rewards):
        return None
    part = max(1, len(rewards) // ENDS)
    return float(rewards[:part].mean()), float(rewards[-part:].mean())


def _evaluated(run: RunData) -> Tile | None:
    """The first and the last evaluation."""
    found = run.evaluations
    known = np.flatnonzero(np.isfinite(found["eval_reward"]))
    if not len(known):
        return None
    order = known[np.argsort(found["eval_version"][known], kind="stable")]
    first, last = order[0], order[-1]

    def interval(place: int) -> str:
        return f"{found['eval_reward_low'][place]:.3g}–{found['eval_reward_high'][place]:.3g}"

    values = float(found["eval_reward"][first]), float(found["eval_reward"][last])
    if first == last:
        return Tile("held-out reward", f"{values[0]:.3g}", f"95 % interval {interval(first)}")
    clear = found["eval_reward_low"][last] > found["eval_reward_high"][first]
    worse = found["eval_reward_high"][last] < found["eval_reward_low"][first]
    about = f"95 % intervals {interval(first)} and {interval(last)}"
    tone: Tone = "good" if clear else "warn" if worse else "plain"
    return Tile("held-out reward", f"{values[0]:.3g} → {values[1]:.3g}", about, tone)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# Several runs


def _comparison(entries: Sequence[Entry]) -> Section:
    columns = [
        *(Column("run", number=False), Column("state", number=False), Column("steps"), Column("time", "min")),
        *(Column("reward, first"), Column("reward, last"), Column("held-out, last"), Column("95 % interval")),
        *(Column("worst staleness"), Column("mean"), Column("drawn", "tokens/s"), Column("trainer waits")),
    ]
    joined = any(len(entry.runs) > 1 for entry in entries)
    about = "Each has its colour on the whole page. A click on a title sorts."
    if joined:
        columns.insert(1, Column("shown as", number=False))
        about += " Runs of one colour are shown as their mean, in a band from the lowest to the highest."
    rows, colors, told = [], [], []
    for entry in entries:
        for run in entry.runs:
            names = [run.name, entry.name] if joined else [entry.name]
            rows.append([*names, run.state, *_numbers(run)])
            told.append([names[0], " ".join(filter(None, [_failed(run).partition("\n")[0], _bound(run)]))])
            colors.append(entry.color)
    binds = [Column("run", number=False), Column("where the time went", number=False)]
    blocks = [
        table("runs", "Runs", columns, rows, about=about, colors=colors),
        table("bottlenecks", "What binds", binds, told, colors=colors),
    ]
    return Section("Overview", blocks)


def _numbers(run: RunData) -> list[float | str | None]:
    if not len(run.steps):
        return [0, *[None] * 9]
    first, last = _reward_ends(run) or (None, None)
    known = np.flatnonzero(np.isfinite(run.evaluations["eval_reward"]))
    held_out = interval = None
    if len(known):
        place = known[np.argmax(run.evaluations["eval_version"][known])]
        held_out = float(run.evaluations["eval_reward"][place])
        low, high = (float(run.evaluations[f"eval_reward_{end}"][place]) for end in ("low", "high"))
        interval = f"{low:.3g}–{high:.3g}"
    shares = run.account.shares()
    seconds = float(np.nansum(run.steps["step_s"])) or float("nan")
    return [
        *(len(run.steps), float(run.steps["time_s"][-1]) / 60, first, last, held_out, interval),
        *(_most(run.steps["staleness_max"]), _mean_staleness(run.steps)),
        float(np.nansum(run.steps["tokens_generated"])) / seconds,
        f"{shares.waiting:.0%}" if shares is not None else None,
    ]


def _most(values: np.ndarray) -> float | None:
    return float(np.nanmax(values)) if np.isfinite(values).any() else None


def _mean_staleness(steps: Records) -> float | None:
    """Over the tokens that were trained, as `asyncrl tune` has it: steps differ in size."""
    means, tokens = steps["staleness_mean"], np.nan_to_num(steps["loss_tokens"])
    known = np.isfinite(means) & (tokens > 0)
    return float(np.average(means[known], weights=tokens[known])) if known.any() else None


def _selection(entries: Sequence[Entry]) -> Section:
    """All of it for one entry; for several what their rollouts came to, one line each."""
    if len(entries) == 1:
        return selection(entries[0].runs)
    rows = []
    for entry in entries:
        rollouts = rollouts_of(entry.runs)
        found = [difference(rollouts, measure) for measure in ("tokens", "seconds", "reward")]
        told = [
            None if one is None else f"{one.value:+.3g}" if one.measure == "reward" else f"{one.value:+.1%}"
            for one in found
        ]
        share = f"{rollouts.trained.sum() / len(rollouts):.0%}" if len(rollouts) else None
        rows.append([entry.name, len(rollouts), share, *told, sentence(rollouts)])
    columns = [
        *(Column("run", number=False), Column("rollouts that ended"), Column("trained"), Column("length")),
        *(Column("duration"), Column("reward"), Column("in words", number=False)),
    ]
    about = "How the mean of what was trained differs from the mean of all rollouts that ended."
    colors = [entry.color for entry in entries]
    return Section("Selection", [table("selection", "Trained against all", columns, rows, about=about, colors=colors)])


def _settings(runs: Sequence[RunData]) -> Section:
    if len(runs) == 1:
        rows = [[f"`{name}`", said(value)] for name, value in changed(runs[0]).items()]
        columns = [Column("setting", number=False), Column("value", number=False)]
        chosen = [table("settings", "Settings that are no defaults", columns, rows)] if rows else []
        return Section("Settings", [*chosen, *_environment(runs[0])])
    rows = [[f"`{name}`", *(said(run.settings.get(name)) for run in runs)] for name in differing(runs)]
    columns = [Column("setting", number=False), *(Column(run.name, number=False) for run in runs)]
    about = "" if rows else "The runs have the same settings."
    return Section("Settings", [table("settings", "Settings in which the runs differ", columns, rows, about=about)])


def _environment(run: RunData) -> list[Block]:
    facts = {name: value for name, value in run.environment.items() if isinstance(value, str | int | float)}
    facts |= {f"{name} (package)": value for name, value in run.environment.get("packages", {}).items() if value}
    columns = [Column("", number=False), Column("value", number=False)]
    rows = [[name.replace("_", " "), str(value)] for name, value in facts.items()]
    return [table("environment", "Where it ran", columns, rows)] if rows else []
