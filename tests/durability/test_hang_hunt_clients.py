"""No await of the sampler's clients, or of a whole run, can hang it: each time it ends, and says where it waited.

Ten of them here. All: `python tests/durability/hang_hunt_clients.py`, which takes a quarter of an hour.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.durability.client_verdicts import verdict

HUNT = Path(__file__).with_name("hang_hunt_clients.py")
LIMIT_S = 400.0
POINTS = 10
"""As many as hang at once."""


def test_whatever_hangs_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(HUNT), "--json", "--part", str(POINTS)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    verdicts = {f"{outcome['run']}, {outcome['point']}": verdict(outcome) for outcome in outcomes}
    wrong = [f"{point}: {found}" for point, found in verdicts.items() if found.startswith("wrong")]
    assert not wrong, "\n".join(wrong)
    assert len(verdicts) == POINTS
    hung = [found for found in verdicts.values() if found in ("watchdog", "limit", "next request", "harmless")]
    assert len(hung) >= POINTS / 3, "many of them lie on the way of these runs"
