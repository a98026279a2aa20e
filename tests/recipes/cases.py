"""A job that a tiny model learns in a second or two: say which animal a letter stands for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ANIMALS = {"a": "ant", "b": "bee", "c": "cat", "d": "dog", "e": "eel", "f": "fox"}
HELD_OUT = 5
"""Numbers that are multiples of it are only asked about after training."""


def question(rng: random.Random, *, held_out: bool) -> tuple[str, str]:
    """A letter behind a number that does not matter, and the animal it stands for."""
    number = rng.choice([n for n in range(10, 100) if (n % HELD_OUT == 0) == held_out])
    letter, animal = rng.choice(list(ANIMALS.items()))
    return f"{number}{letter}", animal


def chats(count: int, *, held_out: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed}/{held_out}")
    rows = []
    for _ in range(count):
        asked, animal = question(rng, held_out=held_out)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": animal}]
        rows.append({"messages": messages})
    return rows


def preferences(count: int, *, held_out: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(f"{seed}/{held_out}")
    rows = []
    for _ in range(count):
        asked, animal = question(rng, held_out=held_out)
        wrong = rng.choice([other for other in ANIMALS.values() if other != animal])
        rows.append({"prompt": [{"role": "user", "content": asked}], "chosen": animal, "rejected": wrong})
    return rows


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
