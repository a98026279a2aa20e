"""Links of README and docs lead somewhere, and commands in running text exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))
from blocks import pages, prose  # noqa: E402

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"")
COMMAND = re.compile(r"`(asyncrl [a-z][^`]*)`")
FLAG = re.compile(r"--[a-z][a-z-]*")


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {anchor(line.lstrip("#")) for line in prose(page.read_text()) if line.startswith("#")}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for line in prose(page.read_text()):
        for found in LINK.finditer(line):
            link = found[1] or found[2]
            name, _, heading = link.partition("#")
            if "://" in link:
                continue
            target = (page.parent / name).resolve() if name else page
            if not target.exists() or (heading and heading not in anchors(target)):
                dead.append(link)
    assert not dead


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    from asyncrl.cli.main import _parser

    actions = next(action for action in _parser()._actions if action.dest == "command")
    known = dict(actions.choices or {})
    wrong = []
    for line in prose(page.read_text()):
        for said in COMMAND.findall(line):
            name = said.split()[1].rstrip(".,:;")
            if name not in known:
                wrong.append(said)
                continue
            options = {flag for action in known[name]._actions for flag in action.option_strings}
            flags = set(FLAG.findall(said.replace("--section.field", "").replace("--field", "")))
            settings = known[name].get_default("takes_settings")
            wrong += [f"{said}: no {flag}" for flag in flags - options if not settings]
    assert not wrong


def test_every_page_is_reached_from_readme() -> None:
    """Whoever begins at README finds everything."""
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen or page.suffix != ".md" or not page.exists():
            continue
        seen.add(page)
        names = [
            (found[1] or found[2]).partition("#")[0] for found in LINK.finditer("\n".join(prose(page.read_text())))
        ]
        left += [(page.parent / name).resolve() for name in names if name and "://" not in name]
    assert set(pages()) <= seen, sorted(str(page.relative_to(ROOT)) for page in set(pages()) - seen)


def test_anchors_are_those_of_github() -> None:
    assert anchor(" What `async` costs: 2 %, or less?") == "what-async-costs-2--or-less"
    assert anchor("A [link](there.md)") == "a-link"
