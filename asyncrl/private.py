"""What is nobody else's business: files that only their user can read, and secrets that are kept out of them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SECRET_NAME = re.compile(r"(?:^|[-_.])(?:key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
"""How a variable or an option is called that holds one: `OPENAI_API_KEY`, `--hf-token`."""
SHORTEST_SECRET = 8
"""Characters. A shorter value stands in too many words by chance."""
HIDDEN = "***"

# Each begins with what it is found by: that is a fast search, and an alternation of them is not.
_IN_URL = re.compile(r"(://)[^\s/@:\"']*:[^\s/@\"']+(?=@)")
_BEARER = re.compile(r"(Bearer )[\w.~+/=-]{8,}")
_KEYS = tuple(re.compile(rf"{start}[\w-]{{16,}}") for start in ("sk-", "hf_", "ghp_", "glpat-", "xoxb-"))
"""As the keys of OpenAI, Anthropic, Hugging Face, and those of asyncrl's endpoint begin."""


def private(path: str, flags: int) -> int:
    """The `opener` of `open` for files that only their user may read, whatever the umask says."""
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Such a file, whole or not at all: a reader never sees half of it, nor does a power cut leave that."""
    beside = path.with_name(f".{path.name}.unfinished")
    try:
        with open(beside, "w", encoding="utf-8", errors="backslashreplace", opener=private) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink()
        raise


def hide_secrets(text: str) -> str:
    """`text` without the values of secret environment variables, passwords in URLs, and what looks like an API key."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and value in text and SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    text = _BEARER.sub(rf"\1{HIDDEN}", _IN_URL.sub(rf"\1{HIDDEN}", text))
    for key in _KEYS:
        text = key.sub(_hide_word, text)
    return text


def _hide_word(found: re.Match[str]) -> str:
    """`task-...` has no key in it."""
    inside = found.start() > 0 and found.string[found.start() - 1].isalnum()
    return found[0] if inside else HIDDEN


def hide_secret_options(arguments: Sequence[str]) -> list[str]:
    """A command line without the values of `--api-key VALUE` and `--api-key=VALUE`."""
    shown: list[str] = []
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if shown and shown[-1].startswith("-") and SECRET_NAME.search(shown[-1]):
            shown.append(HIDDEN)
        elif equals and SECRET_NAME.search(option):
            shown.append(f"{option}={HIDDEN}")
        else:
            shown.append(hide_secrets(argument))
    return shown
