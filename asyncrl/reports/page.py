"""The shell of every HTML page: one file that holds its data, its styles and plotly.js, and asks no network for more.

    sections = [Section("Speed", [chart("tps", "Throughput", x=Axis("optimizer step"), y=Axis("tokens", "tokens/s"),
                                        series=[Series("sampler", steps, tokens_per_s)])])]
    write_page(out, model("My run", sections))

What is shown is data: a model of sections and blocks (`chart`, `table`, `note`, `tiles`) as JSON, which assets/page.js
draws, in the light or the dark, and draws again when the data changes (`live`). No text of a run becomes HTML: the
script sets texts, never markup, and a content security policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from asyncrl.errors import ConfigError
from asyncrl.private import hide_secrets, private

Block = Mapping[str, Any]
"""Something on the page, made by a function of this module: `kind`, `id`, and what its kind needs."""
Model = Mapping[str, Any]
"""All that a page shows."""
Tone = Literal["plain", "good", "warn"]
Kind = Literal["line", "points", "line+points", "bars", "steps"]
MARK = '<meta name="generator" content="asyncrl">'
"""In every page: what has it may be written over."""
DIGITS = 5
"""Of a number on a chart: more than an eye sees, and a third of the bytes."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Of a chart."""

    title: str
    unit: str = ""
    """Stands behind the title, in parentheses. Leave it empty where the title says it: "optimizer step"."""
    log: bool = False
    low: float | None = None
    """Where it begins; None: as the data says."""
    high: float | None = None
    names: bool = False
    """The values are names, not numbers."""
    share: bool = False
    """The values are shares of 1, shown in percent."""


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, cloud or row of bars. Series of a chart with the same name share their entry of the legend."""

    name: str
    x: Iterable[Any]
    y: Iterable[Any]
    kind: Kind = "line"
    """`steps` is a line that moves at right angles: a histogram."""
    color: int | None = None
    """Number in the palette; None: its place in the chart."""
    shade: float | None = None
    """In place of a color: 0 to 1 on a scale from pale to strong, for series that have an order."""
    dash: int = 0
    """0: drawn through; 1, 2, 3: dashed."""
    low: Iterable[Any] | None = None
    """With `high`: the ends of an interval at each x, a band behind a line and bars at points."""
    high: Iterable[Any] | None = None
    faint: bool = False
    """Drawn thin and pale: what another series is the mean of."""
    labels: Sequence[str] | None = None
    """What the pointer shows at each point, besides its numbers; lines are separated by newlines."""
    texts: Sequence[str] | None = None
    """What is written beside each point."""
    big: bool = False
    """Its points are stars, to be seen first."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page, with an entry in its navigation."""

    title: str
    blocks: Sequence[Block]
    about: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """Of a table. A click on its title sorts by it."""

    title: str
    unit: str = ""
    number: bool = True
    """Its cells are set to the right. A cell that is no number is shown as it is."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One number to see first."""

    label: str
    value: str
    about: str = ""
    tone: Tone = "plain"


def chart(
    key: str,
    title: str,
    *,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    about: str = "",
    stacked: bool = False,
) -> Block:
    """A chart. Series without points are left out.

    Args:
        key: What tells it from other blocks of the page.
        about: Stands under the title: how to read it. Words in `backticks` are set as code, here as everywhere.
        stacked: Series stand on top of each other.
    """
    drawn = [_series(place, one) for place, one in enumerate(series)]
    shown = [one for one in drawn if any(value is not None for value in one["y"])]
    axes = {"x": _axis(x), "y": _axis(y)}
    return {
        **{"kind": "chart", "id": key, "title": title, "about": about, **axes},
        **{"series": shown, "stacked": stacked},
    }


def table(
    key: str,
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[Any]],
    *,
    about: str = "",
    colors: Sequence[int] | None = None,
) -> Block:
    """A table. `rows`: a str, number or None per column. `colors`: of the palette, a mark at the head of each row."""
    heads = [asdict(column) for column in columns]
    cells = [[number(cell) if isinstance(cell, float) else cell for cell in row] for row in rows]
    return {
        **{"kind": "table", "id": key, "title": title, "about": about, "columns": heads, "rows": cells},
        **({"colors": list(colors)} if colors is not None else {}),
    }


def note(key: str, text: str, tone: Tone = "plain") -> Block:
    """A paragraph; `warn` is for what the reader must not miss."""
    return {"kind": "note", "id": key, "text": text, "tone": tone}


def tiles(key: str, shown: Iterable[Tile]) -> Block:
    """Numbers side by side."""
    return {"kind": "tiles", "id": key, "tiles": [asdict(tile) for tile in shown]}


def model(
    title: str,
    sections: Iterable[Section],
    *,
    subtitle: str = "",
    state: str = "",
    live: bool = False,
    over: bool = True,
) -> Model:
    """What a page shows. `state` stands at its top. `live`: the page asks the server that it came from for newer data,
    again and again, until it is `over`."""
    used: set[str] = set()

    def once(wanted: str) -> str:
        """Ids of sections and blocks, each once: from them the page knows what it is that has changed."""
        name, count = wanted, 1
        while name in used:
            count += 1
            name = f"{wanted}-{count}"
        used.add(name)
        return name

    shown = [
        {
            "id": once("section-" + "-".join(section.title.lower().split())),
            **{"title": section.title, "about": section.about},
            "blocks": [{**block, "id": once(block["id"])} for block in section.blocks],
        }
        for section in sections
    ]
    return {"title": title, "subtitle": subtitle, "state": state, "live": live, "over": over, "sections": shown}


def page(shown: Model, *, scripts: Sequence[str] = ()) -> str:
    """The HTML of a page. `scripts`: files of assets/ that draw more kinds of blocks.

    Raises `ConfigError` where plotly is not installed.
    """
    code = [plotly_js(), *(asset(name) for name in ("page.js", *scripts))]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in code)
    source = "'self'" if shown["live"] else "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {source}; base-uri 'none'; form-action 'none'"
    )
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
{MARK}
<title>{escape(shown["title"])}</title>
<link rel="icon" href="data:,">
<style>{asset("page.css")}</style>
</head>
<body>
<noscript>This page draws its charts with JavaScript, which is turned off. Nothing is loaded from anywhere.</noscript>
<script type="application/json" id="model">{to_json(shown)}</script>
"""
    return head + "".join(f"<script>{script}</script>\n" for script in code) + "</body>\n</html>\n"


def write_page(out: Path, html: str) -> None:
    """Write a page; whoever reads it meanwhile never sees half of it. Only its user can read it.

    Raises `ConfigError` where it cannot be written, or another file stands there.
    """
    require_page(out)
    beside = out.with_name(f".{out.name}.unfinished")
    try:
        with open(beside, "w", encoding="utf-8", errors="backslashreplace", opener=private) as file:
            file.write(html)
        beside.replace(out)
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written: {error.strerror}. Name a file that you may write (--out)."
        ) from None


def require_page(out: Path) -> None:
    """Raises `ConfigError` where a page cannot be written: to be asked before much work is done for it."""
    if out.is_dir():
        raise ConfigError(f"{out} is a folder. Name a file, such as {out / 'page.html'} (--out).")
    if not out.parent.is_dir():
        raise ConfigError(f"there is no folder {out.parent}. Make it, or name another file (--out).")
    if out.is_file() and not _is_page(out):
        raise ConfigError(f"{out} is another file, and no page of asyncrl. Name one that does not exist (--out).")


def _is_page(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return MARK in file.read(4096)


def to_json(shown: Any) -> str:
    """JSON that cannot end the script element that it stands in, nor begin a comment, and holds no secret."""
    text = json.dumps(shown, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hide_secrets(text).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def number(value: Any) -> float | int | None:
    """As it stands in the model: few digits, and None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


@cache
def asset(name: str) -> str:
    """A file of assets/."""
    return files("asyncrl.reports").joinpath("assets", name).read_text(encoding="utf-8")


@cache
def plotly_js() -> str:
    """The script that draws charts, from the installed plotly. Raises `ConfigError` where there is none."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"pages with charts need plotly, which cannot be imported ({error}). Install it with: pip install plotly"
        ) from error
    return str(get_plotlyjs()).replace("</script", "<\\/script")


def _series(place: int, one: Series) -> dict[str, Any]:
    made: dict[str, Any] = {
        **{"name": one.name, "kind": one.kind, "color": place if one.color is None else one.color},
        **{"x": _values(one.x), "y": _values(one.y)},
    }
    if one.low is not None and one.high is not None:
        made |= {"low": _values(one.low), "high": _values(one.high)}
    if one.labels is not None:
        made["labels"] = list(one.labels)
    if one.texts is not None:
        made["texts"] = list(one.texts)
    extra = {"shade": one.shade, "dash": one.dash or None, "faint": one.faint or None, "big": one.big or None}
    return made | {name: value for name, value in extra.items() if value is not None}


def _axis(axis: Axis) -> dict[str, Any]:
    title = f"{axis.title} ({axis.unit})" if axis.unit else axis.title
    return {
        **{"title": title, "log": axis.log, "low": number(axis.low), "high": number(axis.high)},
        **{"names": axis.names, "share": axis.share},
    }


def _values(values: Iterable[Any]) -> list[Any]:
    """Numpy's numbers become Python's."""
    listed = values.tolist() if isinstance(values, np.ndarray) else values
    return [value if isinstance(value, str) else number(value) for value in listed]


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode("ascii")
