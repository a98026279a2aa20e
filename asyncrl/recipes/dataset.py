"""From rows to what an optimizer step is made of, tokenised once, and what became of each row.

A *unit* is what one row teaches: the example of a conversation (several where the chat template rewrites history),
or the chosen and the rejected example of a pair. A batch is so many units.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asyncrl.data import Cursor, Rows
from asyncrl.errors import DataError, ModelError
from asyncrl.recipes.examples import Example
from asyncrl.recipes.settings import OnTooLong

START = Cursor()

Unit = tuple[Example, ...]
Encode = Callable[[Mapping[str, Any]], Sequence[Unit]]
"""The units of a row; an empty unit is one that teaches nothing: all its weights are 0, or a tie."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How rows become units."""

    encode: Encode
    pairs: bool
    """A unit is of use only as a whole."""
    max_tokens: int
    on_too_long: OnTooLong


@dataclass(slots=True)
class Units:
    """What a dataset teaches."""

    units: list[Unit] = field(default_factory=list)
    rows: int = 0
    """That were read."""
    skipped: int = 0
    """Units that were too long."""
    truncated: int = 0
    """Units that were cut to the longest allowed length."""
    empty: int = 0
    """Units without anything to learn: all weights 0, or two answers that are equal or equally good."""

    def counts(self) -> dict[str, int]:
        """For `summary.json`."""
        return {
            "rows": self.rows,
            "units": len(self.units),
            "skipped": self.skipped,
            "truncated": self.truncated,
            "empty": self.empty,
        }

    def lost(self) -> str | None:
        """What the user should know, in words."""
        found = {
            "too long, left out": self.skipped,
            "too long, cut": self.truncated,
            "nothing to learn, left out": self.empty,
        }
        parts = [f"{count} {what}" for what, count in found.items() if count]
        return f"{self.rows} rows: {'; '.join(parts)}; {len(self.units)} left" if parts else None


def encode_rows(
    rows: Rows, encoding: Encoding, count: int, watch: Callable[[range], Iterable[int]], name: str = "dataset"
) -> Units:
    """Tokenise the first `count` rows of the dataset called `name`. `watch` shows how far it is.

    Raises:
        DataError: a row that cannot be used, with its number; or nothing is left of all rows.
        ModelError: the tokenizer cannot be used.
    """
    found = Units()
    for index in watch(range(count)):
        try:
            row = rows[index]
            if not isinstance(row, Mapping):
                raise DataError(f"found a {type(row).__name__}. Expected a mapping.")
            for unit in encoding.encode(row):
                _take(found, unit, encoding)
        except DataError as error:
            raise DataError(f"row {index} of the {name}: {error}") from None
        except ModelError as error:
            raise ModelError(f"row {index} of the {name}: {error}") from None
        found.rows += 1
    if not found.units:
        raise DataError(
            f"none of the {found.rows} rows of the {name} can be used: {found.skipped} are longer than max_seq_len="
            f"{encoding.max_tokens} tokens, and {found.empty} have nothing to learn (all weights 0, or two answers "
            "that are equal or equally good)."
        )
    return found


def _take(found: Units, unit: Unit, encoding: Encoding) -> None:
    if not unit or not all(example.trained for example in unit):
        found.empty += 1
        return
    longest, limit = max(len(example.tokens) for example in unit), encoding.max_tokens
    if longest <= limit:
        found.units.append(unit)
        return
    if encoding.on_too_long == "error":
        raise DataError(
            f"it is {longest} tokens long, but max_seq_len is {limit}. Raise it, or set on_too_long to 'skip' or "
            "'truncate'."
        )
    cut = tuple(example.cut(limit) for example in unit)
    left = tuple(example for example in cut if example.trained)
    if encoding.on_too_long == "skip" or not left or (encoding.pairs and len(left) < len(unit)):
        found.skipped += 1
    else:
        found.truncated += 1
        found.units.append(left)


def steps_of(units: int, batch_size: int, epochs: int, start: Cursor = START) -> int:
    """Optimizer steps from `start` to the end: a smaller batch at the end of each epoch counts."""
    this_epoch = -(-(units - start.position) // batch_size)
    return this_epoch + -(-units // batch_size) * (epochs - start.epoch - 1)


def batches(
    units: Sequence[Unit], *, batch_size: int, epochs: int, shuffle: bool, seed: int, start: Cursor = START
) -> Iterator[tuple[Cursor, list[Unit]]]:
    """The units of each step from `start` on, and where the data stand after it. Each epoch is shuffled anew from
    (seed, epoch)."""
    for epoch in range(start.epoch, epochs):
        order = list(range(len(units)))
        if shuffle:
            random.Random(f"{seed}/{epoch}").shuffle(order)
        for place in range(start.position if epoch == start.epoch else 0, len(order), batch_size):
            batch = [units[index] for index in order[place : place + batch_size]]
            yield Cursor(epoch, place + len(batch)), batch
