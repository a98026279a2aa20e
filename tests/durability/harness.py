"""Kills runs with SIGKILL, resumes them until they end, and looks whether anything of it shows.

    Nursery     a process that forks the victims (nursery.py)
    Reference   a run that nobody disturbed
    Trial       a run folder, the kills that it lived through, and what is wrong with it in the end

What must not show: the audit is clean, every draw has ended once, every step is in the metrics once, each resume went
on from the newest checkpoint, nothing half-written and no process is left; and in deterministic mode the weights are
those of the reference, bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from asyncrl.storage.audit_run import audit_run
from asyncrl.storage.checkpoints import Checkpoints
from asyncrl.storage.ledger_file import read_ledger
from tests.durability.agent import ROWS, SETTINGS
from tests.durability.nursery import MARK, Order, Outcome

ROOT = Path(__file__).parents[2]
ORPHANS_END_S = 30.0
"""A server that has lost its owner may take this long to end."""
ENDS = ("trained", "filtered", "rejected")
LEFT_BEHIND = ("checkpoints/.*", "weights", "*.tmp")
"""Of a run that has ended, nothing of these may be there."""


class Nursery:
    """Owns the process that forks the victims, as long as the block lasts."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.durability.nursery"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # more threads than one could not be forked
        )
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:  # closes its pipes, and waits
            pass

    def live(self, order: Order) -> Outcome:
        """One life, to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the nursery ended with exit code {self._process.wait()}; its last words are on stderr"
        return Outcome(**json.loads(answer))


@dataclass(frozen=True, slots=True)
class Kill:
    """When a life ends."""

    after_s: float | None = None
    before_touch: int | None = None
    whole_tree: bool = False

    def __str__(self) -> str:
        if self.before_touch is not None:
            return f"touch {self.before_touch}"
        return f"{self.after_s:.2f} s{', tree' if self.whole_tree else ''}"


NEVER = Kill()


@dataclass(slots=True)
class Trial:
    """A run folder and what it goes through."""

    folder: Path
    """Of the trial; the run's is `folder / "run"`."""
    settings: dict[str, Any]
    kills: list[str] = field(default_factory=list)
    """When each came, and what it hit."""
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    touches: int = 0
    """Of the life that came to its end."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def live(self, nursery: Nursery, kill: Kill = NEVER) -> Outcome:
        """One life. What is wrong after it is added to `faults`."""
        newest = Checkpoints(self.run).latest()
        heard = self.log.stat().st_size if self.log.exists() else 0
        settings = self.settings | {"run_dir": str(self.run)}
        outcome = nursery.live(Order(settings, str(self.log), **asdict(kill)))
        self.seconds += outcome.seconds
        self.touches = outcome.touches
        said = self.log.read_text(encoding="utf-8")[heard:]
        resumed = re.search(r"resumed at step (\d+)", said)
        expected = newest.step if newest is not None else None
        if resumed is not None and int(resumed[1]) != expected:
            self.faults.append(f"went on from step {resumed[1]}, but the newest checkpoint is of step {expected}")
        if outcome.how == "killed":
            self.kills.append(f"{kill}: {_hit(self.run, said, resumed is not None)}")
        elif outcome.how != "ended":
            self.faults.append(f"a life {outcome.how}: {' | '.join(said.strip().splitlines()[-3:])}")
        self.faults += [f"left behind: {orphan}" for orphan in _orphans(outcome.pid, str(self.log))]
        return outcome

    def live_on(self, nursery: Nursery, rng: random.Random, *, length_s: float, most: int) -> None:
        """Resumed and killed at random instants until it ends; after `most` kills it is left in peace."""
        for _ in range(most):
            outcome = self.live(nursery, Kill(after_s=rng.uniform(0, length_s), whole_tree=rng.random() < 0.5))
            if outcome.how != "killed":
                return
        self.live(nursery)

    def examine(self, reference: Trial | None) -> None:
        """What is wrong with the run now that it has ended. `reference`: its weights and records must be the same."""
        if self.faults:
            return
        audit = audit_run(self.run)
        self.faults += [f"audit: {fault.kind}: {fault.what}" for fault in audit.faults]
        if not audit.data_ended:
            self.faults.append("audit: the data has not come to its end")
        self.faults += _coverage(self.run, self.settings)
        steps = [record["step"] for record in lines(self.run / "metrics.jsonl")]
        if steps != list(range(1, len(steps) + 1)):
            self.faults.append(f"metrics.jsonl has the steps {steps}")
        measured = Counter(record["eval_version"] for record in lines(self.run / "evaluations.jsonl"))
        if measured and max(measured.values()) > 1:
            self.faults.append(f"evaluations.jsonl has versions more than once: {dict(measured)}")
        self.faults += [f"left behind: {path}" for pattern in LEFT_BEHIND for path in self.run.glob(pattern)]
        if reference is not None:
            self.faults += _differences(self.run, reference.run)


def _hit(run: Path, said: str, resumed: bool) -> str:
    """In words, what a life was doing when it was killed."""
    if any(run.glob("checkpoints/.*.unfinished")):
        return "writing a checkpoint"
    if any(run.glob("checkpoints/.*.removed")):
        return "removing a checkpoint"
    if not said:
        return "before its first word"
    if "checkpoints" not in {path.name for path in run.glob("*")}:
        return "before the first checkpoint"
    if "finished after" in said:
        return "after its last word"
    return "training" if resumed or "step " in said else "opening or resuming"


def _coverage(run: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Every draw ends once: counted here without the audit, which is under test too."""
    with read_ledger(run / "ledger.db") as ledger:
        ends = Counter((e.epoch, e.row) for e in ledger.events() if e.state in ENDS and not e.undone)
    draws = {(epoch, row) for epoch in range(settings["data"]["epochs"]) for row in range(len(ROWS))}
    if ends != Counter(draws):
        yield f"draws without an end: {sorted(draws - ends.keys())}; with several: {sorted((ends - Counter(draws)))}"


def _differences(run: Path, reference: Path) -> Iterator[str]:
    """From the run that nobody disturbed."""
    if digest(run) != digest(reference):
        yield "the weights are others than those of the undisturbed run"
    for name in ("steps", "rollouts", "ledger", "after"):
        found, expected = (json.loads((root / "summary.json").read_text())[name] for root in (run, reference))
        if found != expected:
            yield f"summary.json says {name}: {found}, and that of the undisturbed run {expected}"


def digest(run: Path) -> str:
    """Of the trained weights."""
    (file,) = (run / "model").glob("*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; none where it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _orphans(session: int, mark: str) -> list[str]:
    """Processes that outlive the one that was killed, by its session or its environment."""
    deadline = time.monotonic() + ORPHANS_END_S
    while (found := list(_alive(session, mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _alive(session: int, mark: str) -> Iterator[str]:
    marked = f"{MARK}={mark}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            ours = int(its_session) == session or marked in (process / "environ").read_bytes() + b"\0"
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (OSError, ValueError):  # it has just ended, or is somebody else's
            continue
        if ours and state != "Z":
            yield f"process {process.name}: {command[:120]}"


@contextmanager
def nursery() -> Iterator[Nursery]:
    with Nursery() as opened:
        yield opened


def settings_of(model: Path, **changed: Any) -> dict[str, Any]:
    """Of a run of the agent that is killed."""
    return SETTINGS | {"model": str(model), "record_samples": False} | changed


ASYNCHRONOUS: dict[str, Any] = {"deterministic": False, "staleness": {"max_staleness": 2}}
"""Settings of a run whose weights depend on time: only its accounts are compared."""
