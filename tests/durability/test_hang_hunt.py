"""No await can hang a run: each one is made never to return, and the run ends and says where it waited."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HUNT = Path(__file__).with_name("hang_hunt.py")
LIMIT_S = 240.0

NOBODY_WAITS_FOR_IT = {
    "Engine._watch_load",  # the window of concurrency stays as it is
    "Scheduler._sweep",  # limits rollouts that run too long, of which there are none
    "Guests.acquire",  # the evaluation is given up, by name
    "Scheduler._attempt",  # the pause before a rollout is drawn again: the rollout has a limit
    "_Measurement._attempt.drawn",  # likewise in an evaluation
}
"""A run that hangs here goes on, and loses nothing."""
LIMITED = {
    "Publication.hot_load": "the hot-load of version",
    "Publication.check_canary": "the hot-load of version",
    "Checkpointer._write": "a checkpoint was not on the disk",
    "Scheduler._run": "rollout",
    "Scheduler._draw": "rollout",
    "Scheduler._attempt": "rollout.timeout_s",
    "Scheduler._call": "rollout.timeout_s",
    "Policy.generate": "rollout.timeout_s",
    "Evaluator.run": "the evaluation of version",
    "Evaluation.rollouts": "the evaluation of version",
    "Evaluations._ask": "the evaluation of version",
    "Evaluations._limited": "the evaluation of version",
    "_Measurement.one": "the evaluation of version",
    "_Measurement._draw": "the evaluation of version",
    "_Measurement._attempt": "the evaluation of version",
    "call": "the evaluation of version",
}
"""These have a limit of their own, shorter than the watchdog's: what its error says."""


def test_whatever_hangs_is_named() -> None:
    done = subprocess.run(
        [sys.executable, str(HUNT)], capture_output=True, text=True, timeout=LIMIT_S, cwd=HUNT.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({outcome["point"] for outcome in outcomes}) > 60
    wrong = [f"{outcome['point']}: {fault}" for outcome in outcomes if (fault := what_is_wrong(outcome))]
    assert not wrong, "\n".join(wrong)
    hung = [outcome for outcome in outcomes if outcome["reached"]]
    assert len(hung) > 0.8 * len(outcomes), "most of them lie on the way of this run"


def what_is_wrong(outcome: dict[str, Any]) -> str | None:
    function, error = outcome["function"], outcome["error"]
    if not outcome["reached"] or (outcome["whole"] and not error):
        if not outcome["whole"]:
            return f"not reached, and yet the run is not whole: {error}"
        return None if not outcome["reached"] or function in NOBODY_WAITS_FOR_IT else "the run went on without it"
    if error.startswith("StallError"):
        place = f":{outcome['line']})"
        return None if place in outcome["report"] else f"its line is not in the report:\n{error}"
    if function in LIMITED and LIMITED[function] in error:
        return None
    return f"ended by {error[:300] or 'nothing'}"
