"""The report of runs, in a real browser without a network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.reports.report import report, write_report
from asyncrl.reports.run_data import load_run
from asyncrl.reports.serve import serve
from tests.reports.runs import make_run, rollout_group, rollout_log, step_record

if TYPE_CHECKING:
    from tests.reports.conftest import Tab

EVIL = "</script><img src=x onerror='document.hacked = 1'>\x1b[2J\u202eevil"


def test_it_opens_at_any_width(run: Path, open_page: Callable[..., Tab], tmp_path: Path) -> None:
    write_report([load_run(run)], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 10_000_000
    tab = open_page(tmp_path / "report.html", width=390, dark=True)
    traces = tab.traces()
    assert len(traces) > 15
    assert all(traces.values())
    ticks = [float(text) for text in tab.page.locator("#block-grad_norm .ytick text").all_text_contents()]
    assert ticks == sorted(set(ticks)), "of a logarithmic axis each is a number by itself"
    fits(tab, 390, 800, 1400)
    for name in ("concurrency", "loop_lag_s"):
        low = tab.page.evaluate(f"document.querySelector('#block-{name} .plot')._fullLayout.yaxis.range[0]")
        assert low == 0, f"{name} begins at 0"
    tab.page.click("#theme")
    fits(tab, 1400)
    assert (tab.requests, tab.errors) == ([], [])


def test_no_button_of_a_chart_sends_it_away(run: Path, open_page: Callable[..., Tab], tmp_path: Path) -> None:
    write_report([load_run(run)], tmp_path / "report.html")
    tab = open_page(tmp_path / "report.html", width=1400)
    tab.page.hover("#block-reward .plot")
    titles = "[...document.querySelectorAll('#block-reward .modebar-btn')].map(b => b.dataset.title)"
    tab.until(f"{titles}.length > 0")
    assert tab.page.evaluate(titles) == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]


def test_several_runs_fit_too(run: Path, open_page: Callable[..., Tab], tmp_path: Path) -> None:
    """With the longest names that a legend has to hold."""
    others = [make_run(tmp_path / f"{'a-long-name-' * 5}{place}", steps=40, level=place / 4) for place in range(4)]
    write_report([load_run(root) for root in [run, *others]], tmp_path / "report.html")
    tab = open_page(tmp_path / "report.html", width=800)
    assert all(tab.traces().values())
    fits(tab, 800, 390)
    assert (tab.requests, tab.errors) == ([], [])


def fits(tab: Tab, *widths: int) -> None:
    """Charts follow the width of the window a moment later."""
    for width in widths:
        tab.page.set_viewport_size({"width": width, "height": 900})
        tab.until(
            "[...document.querySelectorAll('.plot')].every(p => p.hidden || "
            "Math.abs(p.querySelector('.main-svg').clientWidth - p.clientWidth) < 2)"
        )
        assert (width, tab.overflow(), tab.overlaps()) == (width, 0, [])


def test_rollouts_are_browsed(run: Path, open_page: Callable[..., Tab], tmp_path: Path) -> None:
    write_report([load_run(run)], tmp_path / "report.html")
    page = open_page(tmp_path / "report.html").page
    assert page.locator(".rollouts tbody tr").count() == 81
    assert page.locator(".reader h4").inner_text() == "Step 40, row 5 of epoch 0, rollout 1"
    trained = page.locator(".reader .trained pre")
    assert trained.all_inner_texts() == ["<tool_call>2+2", "four 40"]
    assert page.locator(".reader .role").all_inner_texts() == ["user", "policy", "tool", "policy"]
    assert 'calculator {"expression": "2+2"} → 4 0.25 s' in page.locator(".reader .call").inner_text()
    page.focus(".rollouts .scroll")
    page.keyboard.press("ArrowDown")
    assert "rollout 2" in page.locator(".reader h4").inner_text()
    page.keyboard.press("End")
    assert page.locator(".reader h4").inner_text().startswith("Step 1,")
    assert page.evaluate("document.querySelector('.rollouts .scroll').scrollTop") > 0
    page.fill(".bar input", "FOUR 3")
    assert page.locator(".rollouts tbody tr").count() == 22  # steps 3 and 30 to 39
    page.select_option(".bar select", "evaluation")
    assert page.locator(".bar .count").inner_text() == "0 of 81"
    page.fill(".bar input", "")
    page.click(".rollouts tbody tr")
    assert page.locator(".reader h4").inner_text() == "Evaluation at step 40, row 0"
    page.select_option(".bar select", "above 0")
    page.click(".rollouts th:has-text('reward') button")
    assert page.locator(".bar .count").inner_text() == "41 of 81"


def test_a_hostile_rollout_is_harmless(open_page: Callable[..., Tab], tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=2, says=EVIL)
    write_report([load_run(root)], tmp_path / "report.html")
    tab = open_page(tmp_path / "report.html")
    said = tab.page.locator(".reader .trained pre").nth(1).inner_text()
    assert said == "</script><img src=x onerror='document.hacked = 1'>\\x1b[2J\\u202eevil 2"
    assert tab.page.evaluate("document.hacked") is None
    assert (tab.requests, tab.errors) == ([], [])


@contextmanager
def served(root: Path) -> Iterator[str]:
    """The address of a live report, served by another thread."""
    addresses: list[str] = []
    ready = threading.Event()
    loop = asyncio.new_event_loop()

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    def make() -> Any:
        return report([load_run(root)], live=True)

    task = loop.create_task(serve([root], make, on_ready))

    def run_loop() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            pass
        finally:
            loop.close()

    thread = threading.Thread(target=run_loop)
    thread.start()
    try:
        assert ready.wait(30)
        yield addresses[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)


def test_a_live_page_follows_the_run_and_leaves_the_reader_alone(tmp_path: Path, open_page: Callable[..., Tab]) -> None:
    root = make_run(tmp_path / "run", steps=40)
    (root / "summary.json").unlink()
    with served(root) as address:
        tab = open_page(address)
        page = tab.page
        tab.traces()
        page.evaluate("Plotly.relayout(document.querySelector('#block-ess .plot'), {'xaxis.range': [5, 15]})")
        page.locator(".rollouts tbody tr").nth(7).click()
        reading = page.locator(".reader h4").inner_text()
        page.evaluate("scrollTo(0, 1500)")
        log = rollout_log(root)
        log.write(41, [rollout_group(41, "new")])
        log.close()
        with JsonlFile(root / "metrics.jsonl") as metrics:
            metrics.write(step_record(41))
        tab.until("document.querySelector('#block-ess .plot').data[0].x.at(-1) === 41")
        assert "step 41" in page.locator("#state").inner_text()
        assert page.evaluate("document.querySelector('#block-ess .plot').layout.xaxis.range") == [5, 15]
        assert page.locator(".reader h4").inner_text() == reading
        assert page.evaluate("scrollY") == 1500
        page.fill(".bar input", "new 41")
        assert page.locator(".bar .count").inner_text() == "2 of 83", "what was typed finds what came since"
        page.focus(".rollouts .scroll")
        page.keyboard.press("Home")
        assert page.locator(".reader h4").inner_text().startswith("Step 41,")
        (root / "summary.json").write_text('{"steps": 41}')
        tab.until("document.getElementById('state').textContent === 'ended'")
        assert (tab.requests, tab.errors) == ([], [])
