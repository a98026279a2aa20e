"""The pictures of docs/tuning.md, as SVG that can be read on light and on dark pages.

    python benchmarks/plot_tuning.py [--frontier tune.json]

`life.svg` is a small run of the real scheduler in virtual time. `price.svg` and `harm.svg` are the tables of
docs/benchmarks.md, so a table that is measured again is drawn again. `frontier.svg` is what `asyncrl tune
--json` printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from asyncrl import Config, Prompt, RolloutSample
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.rollout.batch import Batch
from asyncrl.testing.clock import run_virtual
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import SamplingParams

DOCS = Path(__file__).parents[1] / "docs"
BOUNDS = (0, 1, 2, 4, 8, 16)
INK, FAINT = "#848d97", "#848d9755"
BLUE, AMBER, GREEN, RED, VIOLET = "#2f81f7", "#bf8700", "#2da44e", "#e5534b", "#986ee2"
FONT = "font-family='-apple-system,Segoe UI,Helvetica,Arial,sans-serif' font-size='12'"


@dataclass(slots=True)
class Picture:
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def line(self, points: Iterable[tuple[float, float]], colour: str, width: float = 2, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashed = f" stroke-dasharray='{dash}'" if dash else ""
        self.parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='{width}'"
            f" stroke-linejoin='round'{dashed}/>"
        )

    def dot(self, x: float, y: float, colour: str, radius: float = 3.5, opacity: float = 1) -> None:
        self.parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius}' fill='{colour}' opacity='{opacity}'/>")

    def bar(self, x: float, y: float, width: float, height: float, colour: str, edge: str = "none") -> None:
        self.parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(width, 0.5):.1f}' height='{height:.1f}' rx='1.5'"
            f" fill='{colour}' stroke='{edge}' stroke-width='2'/>"
        )

    def text(self, x: float, y: float, said: str, colour: str = INK, anchor: str = "start", weight: str = "") -> None:
        bold = f" font-weight='{weight}'" if weight else ""
        self.parts.append(
            f"<text x='{x:.1f}' y='{y:.1f}' fill='{colour}' text-anchor='{anchor}'{bold}>{escape(said)}</text>"
        )

    def save(self, name: str, title: str) -> None:
        head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' {FONT} role='img'>"
        body = "\n".join([head, f"<title>{escape(title)}</title>", *self.parts, "</svg>"])
        (DOCS / "images" / name).write_text(body + "\n", encoding="utf-8")
        print(f"docs/images/{name}")


@dataclass(frozen=True, slots=True)
class Axes:
    """A panel of a picture: numbers -> places."""

    picture: Picture
    left: float
    top: float
    width: float
    height: float
    x: Callable[[float], float]
    """A value -> 0 to 1."""
    y_max: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + self.x(x) * self.width, self.top + self.height * (1 - y / self.y_max)

    def frame(self, title: str, x_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float], unit: str) -> None:
        picture = self.picture
        picture.text(self.left, self.top - 14, title, weight="600")
        for y in y_ticks:
            place = self.at(x_ticks[0], y)[1]
            picture.line([(self.left, place), (self.left + self.width, place)], FAINT, 1)
            picture.text(self.left - 6, place + 4, f"{y:g}{unit}", anchor="end")
        for x in x_ticks:
            picture.text(self.at(x, 0)[0], self.top + self.height + 17, f"{x:g}", anchor="middle")
        picture.text(self.left + self.width / 2, self.top + self.height + 36, x_label, anchor="middle")

    def series(self, points: Sequence[tuple[float, float]], colour: str, dash: str = "") -> None:
        placed = [self.at(x, y) for x, y in points]
        self.picture.line(placed, colour, dash=dash)
        for place in placed:
            self.picture.dot(*place, colour)


def by_place(values: Sequence[float]) -> Callable[[float], float]:
    """An axis on which these values have equal distances."""
    return lambda value: (values.index(value) + 0.5) / len(values)


def legend(picture: Picture, left: float, top: float, entries: Sequence[tuple[str, str, str]]) -> None:
    for place, (said, colour, dash) in enumerate(entries):
        y = top + 19 * place
        picture.line([(left, y - 4), (left + 20, y - 4)], colour, dash=dash)
        picture.text(left + 26, y, said)


# The life of groups


@dataclass(slots=True)
class Lives:
    """What happened in a small run, in seconds."""

    rollouts: list[tuple[float, float, int]] = field(default_factory=list)
    """Began, ended, dataset row."""
    trained: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Dataset row -> version that began it, step that trained it."""
    taken: dict[int, float] = field(default_factory=dict)
    """Step -> when its batch was complete."""
    live: list[float] = field(default_factory=list)
    """When versions 1, 2, ... were live."""


SLOTS, GROUPS, MEMBERS, BOUND = 16, 4, 4, 2


def small_run(until_s: float) -> Lives:
    """16 slots, steps of 4 groups of 4, rollouts of lognormal(0, 0.8) seconds, `wait` with a bound of 2."""
    lives, stop = Lives(), until_s + 10

    async def rollout(prompt: Prompt) -> RolloutSample:
        loop = asyncio.get_running_loop()
        drawn = await prompt.policy.generate([0], max_tokens=1)
        began = loop.time()
        await asyncio.sleep(min(prompt.rng.lognormvariate(0, 0.8), 7))
        lives.rollouts.append((began, loop.time(), prompt.index))
        tokens, mask = [0, *drawn.tokens], [0] + [1] * len(drawn.tokens)
        return RolloutSample(tokens, [0.0, *drawn.logprobs], mask, prompt.rng.random(), [0, *drawn.versions])

    async def main() -> None:
        def on_step(record: Any, batch: Batch) -> None:
            lives.trained |= {group.row: (group.version, batch.step) for group in batch.trained}
            lives.live.append(asyncio.get_running_loop().time())

        config = Config(
            model="none",
            completions_per_prompt=MEMBERS,
            prompt_groups_per_step=GROUPS,
            staleness={"max_staleness": BOUND},
            concurrency={"min_window": SLOTS, "max_window": SLOTS},
            data={"shuffle": False},
        )
        sampler = ScriptedSampler(publish_s=lambda: 0.1)
        context = PolicyContext(
            sampler, params=SamplingParams(max_tokens=1), max_seq_len=1 << 20, load_tokenizer=lambda: None
        )
        async with sampler, CountingTrainer(step_s=lambda: 0.8) as trainer:
            engine = assemble(
                config,
                rollout,
                [{"row": row} for row in range(400)],
                sampler=sampler,
                trainer=trainer,
                make_policy=lambda session, version: Policy(context, session, version),
                on_step=on_step,
            )
            asyncio.get_running_loop().call_later(stop, engine.stop)
            await engine.run()

    run_virtual(main())
    return lives


def draw_life(until_s: float = 17.0) -> None:
    lives = small_run(until_s)
    left, top, height = 58, 66, 14
    picture = Picture(860, top + SLOTS * height + 92)
    scale = (picture.width - left - 16) / until_s
    colours = (BLUE, AMBER, RED)
    shown = max(
        (row for row, (version, step) in lives.trained.items() if version and step - version == BOUND),
        key=lambda row: sum(end - began for began, end, of in lives.rollouts if of == row and end < until_s - 3),
    )
    free = [0.0] * SLOTS
    for began, ended, row in sorted(lives.rollouts):
        if began >= until_s:
            continue
        lane = min(range(SLOTS), key=lambda slot: (free[slot] > began + 1e-9, slot))
        free[lane] = ended
        version, step = lives.trained.get(row, (0, -1))
        colour = colours[step - version] if step >= 0 else FAINT
        width = (min(ended, until_s) - began) * scale - 1.5
        edge = INK if row == shown else "none"
        picture.bar(left + began * scale, top + lane * height + 2, width, height - 4, colour, edge)
    bottom = top + SLOTS * height
    for version, time in enumerate(lives.live, 1):
        if time < until_s:
            x = left + time * scale
            picture.line([(x, top - 6), (x, bottom + 6)], INK, 1, "3 3")
            picture.text(x, top - 11, str(version), anchor="middle")
    picture.text(left, top - 48, "Sixteen slots of a run: a bar is a rollout, a group is four of them", weight="600")
    picture.text(left, top - 29, "dashed: an optimizer step is done, and its version of the weights goes live")
    picture.text(left - 8, top + SLOTS * height / 2, "slots", anchor="end")
    for second in range(0, int(until_s) + 1, 2):
        picture.text(left + second * scale, bottom + 22, f"{second} s" if second == 0 else str(second), anchor="middle")
    version, step = lives.trained[shown]
    for place, (said, colour) in enumerate(zip(("0", "1", "2 steps when trained"), colours, strict=True)):
        x = left + 70 + 44 * place
        picture.bar(x, bottom + 37, 14, 10, colour)
        picture.text(x + 19, bottom + 46, said)
    picture.text(left, bottom + 46, "staleness")
    picture.bar(left + 330, bottom + 37, 14, 10, "none", INK)
    picture.text(
        left + 350,
        bottom + 46,
        f"one group: begun by version {version}, trained in the step after {step} others: staleness {step - version}",
    )
    picture.text(left, bottom + 70, f"prompt_groups_per_step = {GROUPS}, max_staleness = {BOUND}, policy = wait")
    picture.save("life.svg", "Rollouts of a run over time, coloured by their staleness when they were trained")


# Tables of docs/benchmarks.md


def table(header: str) -> list[list[str]]:
    """The rows of the table whose header begins like this."""
    lines = (DOCS / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    at = next(place for place, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def draw_price() -> None:
    rows = table("| policy | O | mean of 8 seeds |")
    found = {kind: [row for row in rows if row[0] == kind] for kind in ("wait", "pace")}
    picture = Picture(860, 300)
    share = Axes(picture, 58, 44, 330, 190, by_place(BOUNDS), 100)
    share.frame("share of the ideal rate", "max_staleness, steps", BOUNDS, (0, 25, 50, 75, 100), " %")
    worst = Axes(picture, 490, 44, 330, 190, by_place(BOUNDS), 24)
    worst.frame("oldest token that was trained, steps", "max_staleness, steps", BOUNDS, (0, 4, 8, 16, 24), "")
    for kind, colour in (("wait", BLUE), ("pace", AMBER)):
        share.series([(int(row[1]), 100 * float(row[2])) for row in found[kind]], colour)
        worst.series([(int(row[1]), float(row[5])) for row in found[kind]], colour)
    legend(picture, 276, 178, [("wait", BLUE, ""), ("pace", AMBER, "")])
    legend(picture, 510, 62, [("wait", BLUE, ""), ("pace", AMBER, "")])
    picture.save("price.svg", "Rate and worst staleness over max_staleness, for wait and pace")


OBJECTIVES = {
    "decoupled, TIS": ("the default", BLUE, ""),
    "clip at the sampler": ('loss.anchor = "rollout"', GREEN, ""),
    "gspo": ('gspo, anchor = "rollout"', VIOLET, "6 3"),
    "cispo": ('cispo, anchor = "rollout"', AMBER, "2 3"),
    "no correction": ("no correction", RED, ""),
}


def draw_harm() -> None:
    rows = table("| setting | bound | accuracy, each seed |")
    picture = Picture(860, 330)
    end = Axes(picture, 58, 44, 330, 190, by_place(BOUNDS), 1)
    end.frame("held-out accuracy after 40 steps", "max_staleness, steps", BOUNDS, (0, 0.25, 0.5, 0.75, 1), "")
    way = Axes(picture, 490, 44, 330, 190, by_place(BOUNDS), 1)
    way.frame("mean reward over the whole run", "max_staleness, steps", BOUNDS, (0, 0.25, 0.5, 0.75, 1), "")
    for name, (_, colour, dash) in OBJECTIVES.items():
        own = [row for row in rows if row[0] == name]
        end.series([(int(row[1]), float(row[3])) for row in own], colour, dash)
        way.series([(int(row[1]), float(row[4])) for row in own], colour, dash)
        for row in own:
            for seed in row[2].split():
                picture.dot(*end.at(int(row[1]), float(seed)), colour, 2, 0.45)
    for place, (said, colour, dash) in enumerate(OBJECTIVES.values()):
        legend(picture, 58 + 262 * (place % 3), 298 + 20 * (place // 3), [(said, colour, dash)])
    picture.save("harm.svg", "Accuracy and mean reward over max_staleness, for five corrections")


# What `asyncrl tune` said


def draw_frontier(path: Path) -> None:
    told = json.loads(path.read_text(encoding="utf-8"))
    rows = [{**point["setting"], **point} for point in told["points"]]
    picture = Picture(860, 330)
    highest = max(row["staleness_mean"] for row in rows)
    mean = Axes(picture, 58, 44, 330, 200, lambda value: value / (1.08 * highest), 100)
    oldest = max(row["staleness_worst"] for row in rows)
    worst = Axes(picture, 490, 44, 330, 200, lambda value: value / (1.08 * oldest), 100)
    ticks = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64)
    ys = (0, 25, 50, 75, 100)
    mean.frame("share of the ideal rate", "mean staleness, steps", [t for t in ticks if t <= highest * 1.05], ys, " %")
    worst.frame("share of the ideal rate", "worst staleness, steps", [t for t in ticks if t <= oldest * 1.05], ys, " %")
    styles = {"wait": (BLUE, ""), "pace": (AMBER, ""), "mask": (VIOLET, "5 3")}
    for kind, (colour, dash) in styles.items():
        own = sorted((row for row in rows if row["policy"] == kind), key=lambda row: row["max_staleness"])
        mean.series([(row["staleness_mean"], 100 * row["share"]) for row in own], colour, dash)
        worst.series([(row["staleness_worst"], 100 * row["share"]) for row in own], colour, dash)
    for place, (kind, (colour, dash)) in enumerate(styles.items()):
        legend(picture, 58 + 100 * place, 316, [(kind, colour, dash)])
    picture.save("frontier.svg", "Rate against mean and worst staleness, as asyncrl tune predicts them")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frontier", type=Path, metavar="tune.json", help="what `asyncrl tune --json` printed")
    options = parser.parse_args()
    draw_life()
    draw_price()
    draw_harm()
    if options.frontier is not None:
        draw_frontier(options.frontier)


if __name__ == "__main__":
    main()
