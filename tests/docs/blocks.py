"""The fenced code blocks of a Markdown page, and what a comment in front of one says about it.

    <!-- file: rollout.py -->        the reader saves the block under this name
    <!-- not run: needs a GPU -->    why nothing here can run it

Neither is seen on the page.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROSE = ("", "text", "mermaid")
"""Languages of blocks that nobody types: formulas, drawings, what a program prints."""
FENCE = re.compile(r"^( *)(`{3,}|~{3,})([\w+-]*)")
MARKER = re.compile(r"^ *<!-- (file|not run): (.*?) *-->$")
COMMAND = re.compile(r"^(\$ |asyncrl |pip |make |python |uv |git )")


@dataclass(frozen=True, slots=True)
class Block:
    line: int
    """Of its first line of code in the page, counted from 1."""
    language: str
    text: str
    file: str | None
    """Under which name the reader saves it."""
    not_run: str | None
    """Why it is not run."""


def pages() -> list[Path]:
    """README and all of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """In the order of the page. Raises `ValueError` for a fence that is not closed."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opened = FENCE.match(lines[at])
        at += 1
        if opened is None:
            continue
        indent, fence, language = opened.groups()
        end = next((i for i in range(at, len(lines)) if lines[i].strip() == fence), None)
        if end is None:
            raise ValueError(f"line {at}: a code block begins here and never ends")
        said = dict(_markers(lines, at - 2))
        code = textwrap.dedent("\n".join(line.removeprefix(indent) for line in lines[at:end]))
        yield Block(at + 1, language, code + "\n", said.get("file"), said.get("not run"))
        at = end + 1


def _markers(lines: list[str], at: int) -> Iterator[tuple[str, str]]:
    while at >= 0 and (found := MARKER.match(lines[at])):
        yield found[1], found[2]
        at -= 1


def commands_in_prose(text: str) -> list[int]:
    """Lines that a reader would type, in blocks that are not run because their language says so, or that are
    only indented."""
    prose = [block for block in blocks(text) if block.language in PROSE]
    fenced = [
        block.line + n for block in prose for n, line in enumerate(block.text.splitlines()) if COMMAND.match(line)
    ]
    indented = [
        n for n, line in enumerate(text.splitlines(), 1) if line.startswith("    ") and COMMAND.match(line.strip())
    ]
    inside = {n for block in blocks(text) for n in range(block.line, block.line + block.text.count("\n"))}
    return sorted({*fenced, *(n for n in indented if n not in inside)})


def prose(text: str) -> list[str]:
    """The lines that are in no fenced block."""
    inside = {n for block in blocks(text) for n in range(block.line - 1, block.line + block.text.count("\n") + 1)}
    return [line for n, line in enumerate(text.splitlines(), 1) if n not in inside]
