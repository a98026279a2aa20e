"""A run to report of; and a real browser, without a head and without a network."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.reports.runs import make_run

QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@dataclass
class Tab:
    """An open page, and what it did that a report must not."""

    page: Any
    requests: list[str] = field(default_factory=list)
    """Addresses other than the page's own."""
    errors: list[str] = field(default_factory=list)

    def traces(self) -> dict[str, int]:
        """Block -> curves that its chart has drawn."""
        self.page.evaluate("page.drawAll()")
        found = self.page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.plot')].filter(p => p.data)"
            ".map(p => [p.closest('.block').id, p.querySelectorAll('.trace, .bars .points').length || p.data.length]))"
        )
        return dict(found)

    def until(self, condition: str) -> None:
        """Wait for an expression to be true. Playwright's own way to wait is one that the page's policy forbids."""
        for _ in range(300):
            if self.page.evaluate(condition):
                return
            self.page.wait_for_timeout(100)
        raise TimeoutError(condition)

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def overlaps(self) -> list[Any]:
        """Pairs of blocks, or of parts of one, of which one lies over the other; and what sticks out of its block."""
        return list(self.page.evaluate(OVERLAPS))


OVERLAPS = """() => {
  const box = (node) => node.getBoundingClientRect();
  const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const called = (node) => node.id || node.getAttribute('class') || node.textContent;
  const found = [];
  const check = (nodes) => nodes.forEach((a, i) => nodes.slice(i + 1).forEach((b) => {
    if (!a.contains(b) && box(a).height && box(b).height && over(box(a), box(b))) found.push([called(a), called(b)]);
  }));
  check([...document.querySelectorAll('.block')]);
  const parts = 'h3, .about, .legend button, .plot, .scroll, .reader, .bar > *, .tile > *';
  for (const block of document.querySelectorAll('.block')) {
    check([...block.querySelectorAll(parts)]);
    for (const part of block.querySelectorAll(parts))
      if (box(part).right > box(block).right + 1) found.push([block.id, 'lets out', called(part)]);
    const level = (node) => node.textContent && !(node.getAttribute('transform') || '').match(/rotate\\((?!0)/);
    check([...block.querySelectorAll('.xtick text, .xtitle')].filter(level));
    check([...block.querySelectorAll('.ytick text')].filter(level));
  }
  return found;
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("report") / "run", steps=40)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for the tests of a file."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = own if Path(own).exists() else shutil.which("chromium") or shutil.which("google-chrome")
        if path is None:
            pytest.skip("there is no Chromium: playwright install chromium")
        browser = playwright.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """Opens a file or an address; all requests elsewhere are refused and recorded."""
    contexts = []

    def open_page(address: Path | str, *, width: int = 1400, dark: bool = False) -> Tab:
        url = address.absolute().as_uri() if isinstance(address, Path) else address
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        tab = Tab(context.new_page())

        def guard(route: Any) -> None:
            if route.request.url.startswith(url):
                route.continue_()
            else:
                tab.requests.append(route.request.url)
                route.abort()

        context.route(lambda asked: not asked.startswith("data:"), guard)
        tab.page.on("console", lambda said: tab.errors.append(said.text) if said.type in ("error", "warning") else None)
        tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
        tab.page.goto(url)
        tab.page.wait_for_selector(".block")
        return tab

    yield open_page
    for context in contexts:
        context.close()
