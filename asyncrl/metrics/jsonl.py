"""JSON lines that any reader opens: one object per line, no NaN, no secret, flushed so that `tail -f` follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from asyncrl.private import hide_secrets, private

NUMBERS = (float, int, bool)
"""A record of nothing else, as those of steps are, holds no secret, and need not be searched for one."""
DEEPEST = 40
"""Levels of what is written; below stands what contains itself, or a tree that nobody reads."""


def encode(value: Any) -> str:
    """One line of strict JSON, whatever the value holds. NaN and infinities become null; what JSON has no word for
    becomes its `str`."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_word)
    except Exception:  # numbers that JSON cannot hold, keys that are not text, what contains itself: rare, so it is
        return json.dumps(_plain(value, DEEPEST), ensure_ascii=False, allow_nan=False)  # only now walked


def _plain(value: Any, levels: int) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 64 else _word(value)  # Python prints no number of more than 4,300 digits
    if levels == 0:
        return "..."
    try:
        if isinstance(value, Mapping):
            return {_word(key): _plain(inner, levels - 1) for key, inner in dict(value).items()}
        if isinstance(value, list | tuple):
            return [_plain(inner, levels - 1) for inner in tuple(value)]
    except Exception:  # of somebody else's container, or one that changes meanwhile
        return f"<{type(value).__name__} that cannot be read>"
    return _word(value)


def _word(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # of somebody else's class
        return f"<{type(value).__name__} without a str>"


def open_to_append(path: Path) -> TextIO:
    """Line by line. Half of a pair of UTF-16, which a model can write and UTF-8 has no bytes for, is written as its
    escape, which JSON reads back."""
    return open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1, opener=private)


class JsonlFile:
    """Appends objects to a file, one flushed line each. Only its user can read it."""

    def __init__(self, path: Path) -> None:
        self._file = open_to_append(path)

    def write(self, value: Mapping[str, Any]) -> None:
        line = encode(value)
        if not all(type(found) in NUMBERS for found in value.values()):
            line = hide_secrets(line)
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
