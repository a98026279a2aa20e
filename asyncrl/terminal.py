"""Text of others on its way to a terminal. What a model, a tool or a server writes may not move the cursor, change the
title or colours, overwrite what stands there, or end the program that prints it."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, but for tabs and newlines; and halves of pairs of UTF-16, which no terminal can be sent."""


def visible(text: str) -> str:
    """`text` with what cannot be printed written out: `\\x1b[2J` clears nothing."""
    return _UNPRINTABLE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
