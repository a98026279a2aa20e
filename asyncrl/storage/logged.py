"""The rollout log, read again (rollouts.py writes it).

It may be gigabytes: it is read from its end, one group at a time.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asyncrl.errors import DataError

BLOCK_BYTES = 1 << 20
ROLE_MARK = re.compile(r"(?=<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|\[INST\]|<tool_response>)")
ROLE_NAME = re.compile(r"<(?:\|im_start\||\|start_header_id\||start_of_turn)>\s*(\w+)")
"""How the chat templates in use open a turn. Text of any other template is shown as `context`."""
TOLD_ELSEWHERE = {"messages", "finish_reason", "turns", "tool_calls", "tool_errors", "tool_seconds", "turn_seconds"}
"""Entries of `info` that need no line of their own where a rollout is shown."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout of the log."""

    group: Mapping[str, Any]
    """Its line: step, row, epoch, version, ... of all its members."""
    member: int
    reward: float
    advantage: float | None
    seconds: float | None
    """How long it took; None in logs that do not say."""
    samples: list[dict[str, Any]]
    """Its segments, as `storage.rollouts.describe` writes them."""

    @property
    def tokens(self) -> int:
        return sum(sample["tokens"] for sample in self.samples)

    @property
    def text(self) -> str:
        return "".join(stretch["text"] for sample in self.samples for stretch in sample["text"])

    @property
    def went_wrong(self) -> bool:
        """A tool call failed, or the rollout ended otherwise than by `stop`. Rollouts that do not say are fine."""
        infos = [sample.get("info", {}) for sample in self.samples]
        return any(info.get("tool_errors") or info.get("finish_reason") not in (None, "stop") for info in infos)


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """All rollouts of a log, the newest group first. A last line that is still being written is left out.

    Raises `DataError` for a line that is not the log's.
    """
    for start, line, whole in _lines_from_the_end(path):
        try:
            group = json.loads(line)
            rollouts = [
                Rollout(group, member, rollout["reward"], rollout["advantage"], rollout["seconds"], rollout["samples"])
                for member, rollout in enumerate(group.pop("rollouts"))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if not whole:
                continue
            raise DataError(
                f"{path}, byte {start}: this line is not a group of rollouts ({error!r}). "
                "Expected what a run writes; take the line out to read the rest."
            ) from None
        yield from rollouts


def _lines_from_the_end(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Where each line starts, the line, and whether it ends in a newline: only the last may not."""
    with path.open("rb") as file:
        position = file.seek(0, io.SEEK_END)
        whole, later = False, list[bytes]()  # `later`: the pieces of the line in hand, its end first
        while position:
            size = min(BLOCK_BYTES, position)
            position -= size
            file.seek(position)
            *before, rest = reversed(file.read(size).split(b"\n"))
            end = position + size
            for piece in before:
                start = end - len(piece)
                if line := b"".join([piece, *reversed(later)]):
                    yield start, line, whole
                whole, later, end = True, [], start - 1
            later.append(rest)
        if line := b"".join(reversed(later)):
            yield 0, line, whole


def timed_stretches(sample: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], float | None]]:
    """Each stretch of text, the policy's with the seconds it took to draw.

    The log has seconds for all turns of the conversation; those that another segment trains are its first ones.
    """
    seconds = sample.get("info", {}).get("turn_seconds") or []
    drawn = sum(stretch["kind"] == "policy" for stretch in sample["text"])
    times = iter(seconds[-drawn:] if 0 < drawn <= len(seconds) else [])
    for stretch in sample["text"]:
        yield stretch, next(times, None) if stretch["kind"] == "policy" else None


def turns_of(kind: str, text: str) -> Iterator[tuple[str, str]]:
    """Cut a stretch of context where its chat template opens a turn."""
    if kind == "policy":
        yield kind, text
        return
    for piece in ROLE_MARK.split(text):
        name = ROLE_NAME.match(piece)
        if piece.startswith("<tool_response>"):
            role = "tool"
        elif piece.startswith("[INST]"):
            role = "user"
        else:
            role = name[1] if name else "context"
        if piece.strip():
            yield role, piece


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call of a chat, as its messages tell of it."""

    name: Any
    arguments: Any
    result: Any
    """None: it was not run."""
    seconds: float | None

    @property
    def failed(self) -> bool:
        return str(self.result).startswith("Error")


def tool_calls(info: Mapping[str, Any]) -> Iterator[ToolCall]:
    """Those of a sample, from its `info`; none where it holds no messages."""
    messages = [message for message in info.get("messages") or () if isinstance(message, dict)]
    results = {message.get("tool_call_id"): message.get("content") for message in messages}
    times = iter(info.get("tool_seconds") or ())
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        result = results.get(call["id"])
        seconds = next(times, None) if result is not None else None
        yield ToolCall(call["function"]["name"], call["function"]["arguments"], result, seconds)
