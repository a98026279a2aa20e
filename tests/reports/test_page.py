from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from asyncrl.errors import ConfigError
from asyncrl.reports.page import (
    Axis,
    Column,
    Section,
    Series,
    Tile,
    chart,
    model,
    note,
    number,
    page,
    table,
    tiles,
    to_json,
    write_page,
)

if TYPE_CHECKING:
    from tests.reports.conftest import Tab

EVIL = "</script><img src=x onerror='document.hacked = 1'><b>bold</b> <a href='javascript:document.hacked = 2'>x</a>"


def shown(word: str = "plain", values: Any = (1.0, 2.0, 4.0)) -> Any:
    """A page of every kind of block, with `word` wherever a word can be."""
    x, y = [1, 2, 3], list(values)
    series = [Series(word, x, y), Series("other", x, y[::-1], low=[0, 0, 0], high=[5, 5, 5])]
    blocks = [
        tiles("tiles", [Tile(word, word, word)]),
        note("note", f"{word} and `{word}`", "warn"),
        chart("lines", word, x=Axis(word, word), y=Axis(word, low=-1.0), series=series, about=word),
        chart("bars", "Bars", x=Axis("run", names=True), y=Axis("time", "s"), stacked=True,
              series=[Series(word, [word, "b"], [1, 2], "bars"), Series("c", [word, "b"], [1, 2], "bars", shade=0.5)]),
        chart("points", "Points", x=Axis("x", log=True), y=Axis("share", share=True),
              series=[Series(word, x, y, "line+points", low=y, high=y, labels=[word] * 3),
                      Series("q", x, y, "points")]),
        table("table", word, [Column(word, word), Column("n")], [[word, 3], ["b", 1.5], [None, 2]], colors=[0, 1, 2]),
        chart("empty", "Empty", x=Axis("x"), y=Axis("y"), series=[Series("none", [1], [float("nan")])]),
    ]  # fmt: skip
    return model(word, [Section(word, blocks, word), Section(word, [note("note", "again")])])


def test_numbers_are_short_and_finite() -> None:
    assert [number(value) for value in (1.0, 0.123456789, 123456789.0, float("nan"), float("inf"), None)] == [
        *(1, 0.12346, 123460000),
        *(None, None, None),
    ]
    block = chart("c", "t", x=Axis("x"), y=Axis("y", "s"), series=[Series("a", np.arange(2), np.array([np.nan, 2e-9]))])
    assert block["series"][0]["x"] == [0, 1]
    assert block["series"][0]["y"] == [None, 2e-9]
    assert block["y"]["title"] == "y (s)"


def test_blocks_of_one_name_get_ids_of_their_own() -> None:
    made = shown()
    ids = [block["id"] for section in made["sections"] for block in section["blocks"]]
    assert len(set(ids)) == len(ids)
    assert [section["id"] for section in made["sections"]] == ["section-plain", "section-plain-2"]


def test_data_cannot_leave_its_script_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "a-secret-that-nobody-may-see")
    html = page(model(EVIL, [Section("s", [note("n", f"{EVIL}<!--<script> a-secret-that-nobody-may-see \u2028")])]))
    data = re.search(r'id="model">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    assert "<" not in data[1]
    assert json.loads(data[1])["sections"][0]["blocks"][0]["text"] == f"{EVIL}<!--<script> *** \u2028"
    assert "<title>&lt;/script&gt;&lt;img" in html
    assert to_json({"a": "\ud800"})  # half a pair, which a model can write


def test_a_page_is_private_and_replaces_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    html = page(shown())
    write_page(out, html)
    write_page(out, html)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    other = tmp_path / "thesis.html"
    other.write_text("mine")
    with pytest.raises(ConfigError, match="is another file"):
        write_page(other, html)
    assert other.read_text() == "mine"
    with pytest.raises(ConfigError, match="there is no folder"):
        write_page(tmp_path / "none" / "page.html", html)


def test_it_opens_without_a_network_in_the_light_and_the_dark(open_page: Callable[..., Tab], tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page(shown()))
    tab = open_page(tmp_path / "page.html", dark=True)
    assert tab.traces() == {"block-lines": 4, "block-bars": 4, "block-points": 2}
    drawn_from = tab.page.evaluate("document.querySelector('#block-lines .plot')._fullLayout.yaxis.range[0]")
    assert drawn_from == -1, "where the axis was said to begin"
    assert tab.page.inner_text("#block-empty .about") == "Nothing to show yet."
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "dark"
    ink = "getComputedStyle(document.querySelector('#block-lines .ytick text')).fill"
    dark = tab.page.evaluate(ink)
    tab.page.click("#theme")
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "light"
    assert tab.page.evaluate(ink) != dark
    tab.page.reload()
    assert tab.page.evaluate("document.documentElement.dataset.theme") == "light"  # it is kept
    assert (tab.requests, tab.errors) == ([], [])


def test_hostile_texts_stay_texts(open_page: Callable[..., Tab], tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page(shown(EVIL)))
    tab = open_page(tmp_path / "page.html")
    tab.traces()
    plot = tab.page.locator("#block-points .plot")
    plot.scroll_into_view_if_needed()
    plot.hover()  # the hover label holds the text too
    tab.page.wait_for_timeout(200)
    assert tab.page.evaluate("document.hacked") is None
    assert tab.page.locator("main img, main b, main a, nav img").count() == 0
    assert tab.page.locator("h1").inner_text() == EVIL
    assert tab.page.locator("#block-lines .xtitle").text_content() == f"{EVIL} ({EVIL})"
    assert (tab.requests, tab.errors) == ([], [])


def test_no_script_of_another_hand_runs(open_page: Callable[..., Tab], tmp_path: Path) -> None:
    """Whatever gets into the page against all that is done above: its policy lets nothing of it run or load."""
    html = page(shown()).replace("</body>", "<script>document.hacked = 1</script><img src='https://a.test/x'></body>")
    (tmp_path / "page.html").write_text(html)
    tab = open_page(tmp_path / "page.html")
    tab.page.evaluate("fetch('https://a.test/y').catch(() => null)")
    assert tab.page.evaluate("document.hacked") is None
    assert tab.requests == []
    assert len(tab.errors) >= 3  # each is refused in the console


def test_a_legend_hides_and_a_title_sorts(open_page: Callable[..., Tab], tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", page(shown()))
    tab = open_page(tmp_path / "page.html")
    assert tab.traces()["block-lines"] == 4
    tab.page.click("#block-lines .legend button:has-text('other')")
    assert tab.page.locator("#block-lines .scatterlayer .trace").count() == 1
    tab.page.click("#block-lines .legend button:has-text('other')")
    assert tab.page.locator("#block-lines .scatterlayer .trace").count() == 4
    cells = "[...document.querySelectorAll('#block-table tbody tr')].map(row => row.cells[1].textContent)"
    assert tab.page.evaluate(cells) == ["3", "1.5", "2"]
    tab.page.click("#block-table th:nth-child(2) button")
    assert tab.page.evaluate(cells) == ["1.5", "2", "3"]
    tab.page.click("#block-table th:nth-child(2) button")
    assert tab.page.evaluate(cells) == ["3", "2", "1.5"]
