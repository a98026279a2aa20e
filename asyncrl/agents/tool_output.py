"""What a model reads of a tool's result: text, of a bounded length, at a cost that does not grow with the result."""

from __future__ import annotations

import numbers
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json

from asyncrl.errors import first_failure


def as_text(result: Any, most_chars: int) -> str:
    """Text as it is, bytes as UTF-8, anything else as JSON; of what is longer than `most_chars`, the beginning.

    What follows the cut is not even looked at, so neither a result of 100 MB nor an endless generator holds up
    the event loop, with which a thread would share the interpreter's lock.
    """
    if isinstance(result, (bytes, bytearray, memoryview)):
        return _cut(bytes(result[: 4 * most_chars + 4]).decode(errors="replace"), most_chars, None)
    if isinstance(result, str):
        text = str.__str__(result)  # a subclass may mean something else by `len` and slices
        return _cut(text, most_chars, len(text))
    return _cut(to_json(_Shortened(most_chars).of(result), fallback=_plain).decode(), most_chars, None)


def error_text(error: BaseException, most_chars: int) -> str:
    """An exception as a model reads it; of a group, the one that came first."""
    if isinstance(error, BaseExceptionGroup):
        error = first_failure(error)
    try:
        said = str.__str__(str(error))
    except BaseException as worse:  # a user's `__str__` may raise anything; the model is to read of the first fault
        said = f"(its message cannot be read: {type(worse).__name__})"
    text = f"Error: {type(error).__name__}{': ' if said else ''}{said}"
    return _cut(text, most_chars, len(text))


def _plain(value: Any) -> int | float | str:
    """What JSON does not know: the numbers of numpy and the like as numbers, anything else in its own words."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else str(value)


def _cut(text: str, most_chars: int, length: int | None) -> str:
    """The text if it is short enough, else its beginning and a note. Half a surrogate pair, which no tokenizer takes,
    becomes a question mark."""
    kept = text[:most_chars].encode(errors="replace").decode()
    if len(text) <= most_chars:
        return kept
    return f"{kept}\n[cut: {most_chars} of {length if length is not None else 'more'} characters]"


class _Shortened:
    """A copy of a value as far as `most_chars` of its JSON can show it: no item takes less than one character."""

    def __init__(self, most_chars: int) -> None:
        self._most_chars = most_chars
        self._left = most_chars + 1

    def of(self, value: Any) -> Any:
        self._left -= 1
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, (bytes, bytearray)):
            return self._text(value[: 4 * self._most_chars + 4].decode(errors="replace"))
        if isinstance(value, BaseModel):
            return self.of(value.model_dump(mode="json"))
        if is_dataclass(value) and not isinstance(value, type):
            return self._mapping((field.name, getattr(value, field.name)) for field in fields(value))
        if isinstance(value, Mapping):
            return self._mapping(value.items())
        if isinstance(value, (list, tuple, set, frozenset, deque, Iterator)):
            return self._list(value)
        return value

    def _text(self, value: str) -> str:
        text = str.__str__(value)[: self._most_chars + 1].encode(errors="replace").decode()
        self._left -= len(text)
        return text

    def _mapping(self, items: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        short: dict[Any, Any] = {}
        for key, value in items:
            short[self._text(key) if isinstance(key, str) else key] = self.of(value)
            if self._left < 0:
                break
        return short

    def _list(self, items: Iterable[Any]) -> list[Any]:
        short: list[Any] = []
        for value in items:
            short.append(self.of(value))
            if self._left < 0:
                break
        return short
