"""PLACEHOLDER OF THE LEAD, so that resume can be tried: helper H3 replaces this whole file by the real codec."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from asyncrl.types import Group, RolloutRun, RolloutSample


def encode_groups(groups: Sequence[Group]) -> bytes:
    return json.dumps([asdict(group) for group in groups], default=list).encode()


def decode_groups(data: bytes) -> list[Group]:
    found = []
    for group in json.loads(data):
        runs = [RolloutRun([RolloutSample(**sample) for sample in run["segments"]]) for run in group.pop("runs")]
        found.append(Group(runs=runs, **group))
    return found


class SampleRecorder:
    def __init__(self, path: Path, *, after_step: int) -> None:
        pass

    def write(self, step: int, chunks: Sequence[Sequence[Group]], failed: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass
