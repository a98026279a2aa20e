"""Who waits for what: the tasks of an event loop and the threads of a process, down to the lines where they stand.

For reports of what has gone wrong. It changes nothing and waits for nothing, so any thread may ask.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import sys
import sysconfig
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any

STDLIB_DISTANCE = 3
SHOWN_ALIKE = 5
"""Of tasks that wait in the same place, so many are named."""
SHORT_PLACES = 6
_KINDS = (asyncio.Future, CoroutineType, GeneratorType, AsyncGeneratorType)
"""What a task can wait for; a task is a future too."""
_STDLIB = sysconfig.get_path("stdlib")
_ASYNCRL = f"{Path(__file__).parent}{os.sep}"


@dataclass(frozen=True, slots=True)
class Place:
    """A line of code that has not returned."""

    function: str
    file: str
    line: int
    task: str = ""
    """Where this is the outermost line of a task that another one waits for: its name."""

    @classmethod
    def of(cls, frame: FrameType, task: str = "") -> Place:
        return cls(frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno, task)

    def __str__(self) -> str:
        return f"{self.function} ({self.file}:{self.line})"

    @property
    def short(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


def distance(file: str) -> int:
    """How far code is from the user: 0 is theirs, 1 of a package, 2 of asyncrl, 3 of Python itself."""
    if file.startswith(_ASYNCRL):
        return 2
    if "site-packages" in file or "dist-packages" in file:
        return 1
    return STDLIB_DISTANCE if file.startswith((_STDLIB, "<frozen")) else 0


def places_of(task: asyncio.Task[Any]) -> list[Place]:
    """Where a task stands, outermost first; on through the tasks that it waits for."""
    places: list[Place] = []
    seen: set[int] = set()
    waiting: Any = task
    name = ""
    while waiting is not None and id(waiting) not in seen:
        seen.add(id(waiting))
        if isinstance(waiting, asyncio.Task):
            name = waiting.get_name() if places else ""
            waiting = waiting.get_coro()
            continue
        frame, waiting = _step(waiting)
        if frame is not None:
            places.append(Place.of(frame, name))
            name = ""
    return places


def where(task: asyncio.Task[Any]) -> str:
    """Where a task stands, in one line: the innermost lines of it that are not Python's own."""
    code = task.get_coro()
    if inspect.iscoroutine(code) and code.cr_running:
        return "nothing: it is running"
    places = places_of(task)
    told = [place.short for place in places if distance(place.file) < STDLIB_DISTANCE] or [p.short for p in places[-1:]]
    return " > ".join(told[-SHORT_PLACES:]) or "nothing: it is about to end"


def tasks_report(tasks: Iterable[asyncio.Task[Any]]) -> list[str]:
    """Every task, those that wait in the same place together."""
    alike: dict[tuple[Place, ...], list[str]] = defaultdict(list)
    for task in tasks:
        alike[tuple(places_of(task))].append(task.get_name())
    lines = []
    for places, names in sorted(alike.items(), key=lambda item: _rank(item[1])):
        names.sort(key=lambda name: (len(name), name))  # those that nobody named are numbered: the oldest first
        few = ", ".join(names[:SHOWN_ALIKE])
        lines.append(few if len(names) <= SHOWN_ALIKE else f"{len(names)} alike, the oldest of them {few}")
        lines += [f"    {f'[{place.task}] ' if place.task else ''}{place}" for place in places]
    return lines


def threads_report() -> list[str]:
    """Every thread of Python's, with its stack."""
    frames = sys._current_frames()
    lines = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        lines.append(thread.name)
        lines += [f"    {place}" for place in reversed(list(_stack(frame)))]
    return lines


def busy_threads() -> list[str]:
    """What those of asyncrl's own threads are at that have something to do, one line each."""
    frames = sys._current_frames()
    lines = []
    for thread in threading.enumerate():
        near = [p for p in _stack(frames.get(thread.ident or 0)) if distance(p.file) < STDLIB_DISTANCE]
        if thread.name.startswith("asyncrl") and len(near) > 1:  # one: where it waits for work
            lines.append(f"{thread.name}: " + " > ".join(place.short for place in reversed(near[:3])))
    return lines


def _rank(names: list[str]) -> tuple[bool, int]:
    """asyncrl's own first; then the most."""
    return not names[0].startswith("asyncrl"), -len(names)


def _stack(frame: FrameType | None) -> Iterator[Place]:
    """Innermost first, without what starts a thread."""
    while frame is not None and frame.f_code.co_name != "_bootstrap_inner":
        yield Place.of(frame)
        frame = frame.f_back


def _step(waiting: Any) -> tuple[FrameType | None, Any]:
    """The frame of what is waited for, and what that waits for in its turn; None at the end."""
    if inspect.iscoroutine(waiting):
        return waiting.cr_frame, waiting.cr_await
    if inspect.isgenerator(waiting):
        return waiting.gi_frame, waiting.gi_yieldfrom
    if inspect.isasyncgen(waiting):
        return waiting.ag_frame, waiting.ag_await
    if isinstance(waiting, asyncio.Future):
        return None, None
    # What wraps one of these (the step of an async generator, the iterator of a future) names it to the collector only.
    return None, next((held for held in gc.get_referents(waiting) if isinstance(held, _KINDS)), None)
