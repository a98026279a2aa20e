"""Text of others on its way to a terminal. What a model, a tool or a server writes may not move the cursor, change the
title or colours, or overwrite what stands there."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """`text` with its control characters written out, but for tabs and newlines: `\\x1b[2J` clears nothing."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
