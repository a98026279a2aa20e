"""Records of the rollout side."""

from __future__ import annotations

import json
from pathlib import Path


def rollouts_before(folder: Path) -> int:
    """The rollouts that earlier lives of a run had finished, by the last record that they left."""
    path = folder / "producer.jsonl"
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    return int(json.loads(lines[-1])["rollouts_ended"]) if lines else 0
