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
SAME_METRICS = ("loss", "grad_norm", "learning_rate", "reward_trained_mean", "train_tokens")
LEFT_BEHIND = ("checkpoints/.*", "weights", ".*.unfinished")
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
        self._process.kill()  # it has nothing to bring to an end
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
class Instant:
    """When a life ends: some time after its birth, or right before it changes files of its checkpoints once more."""

    after_s: float | None = None
    before_touch: int | None = None
    touching: str = ""
    whole_tree: bool = False
    """Everything in its session is killed, and not the process alone."""

    def __str__(self) -> str:
        if self.before_touch is not None:
            return f"touch {self.before_touch}{f' of {self.touching}' if self.touching else ''}"
        return f"{self.after_s:.2f} s{', tree' if self.whole_tree else ''}"


NEVER = Instant()


@dataclass(frozen=True, slots=True)
class Span:
    """What the instants are drawn from: an undisturbed life."""

    seconds: float
    touches: int

    def instant(self, rng: random.Random) -> Instant:
        """Every second one by the clock, the others among the steps of writing checkpoints, which take little time."""
        if rng.random() < 0.5:
            return Instant(after_s=rng.uniform(0, self.seconds), whole_tree=rng.random() < 0.5)
        return Instant(before_touch=rng.randint(1, self.touches))


@dataclass(frozen=True, slots=True)
class Kill:
    """One that came before its life had ended."""

    at: Instant
    hit: str
    """In words, what the process was doing."""

    def __str__(self) -> str:
        return f"{self.at}: {self.hit}"


@dataclass(slots=True)
class Trial:
    """A run folder and what it goes through."""

    folder: Path
    """Of the trial; the run's is `folder / "run"`."""
    settings: dict[str, Any]
    kills: list[Kill] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Of all its lives."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def live(self, nursery: Nursery, end: Instant = NEVER) -> Outcome:
        """One life. What is wrong after it is added to `faults`."""
        newest = Checkpoints(self.run).latest()
        heard = self.log.stat().st_size if self.log.exists() else 0
        settings = self.settings | {"run_dir": str(self.run)}
        outcome = nursery.live(Order(settings, str(self.log), **asdict(end)))
        self.seconds += outcome.seconds
        said = self.log.read_text(encoding="utf-8")[heard:]
        resumed = re.search(r"resumed at step (\d+)", said)
        expected = newest.step if newest is not None else None
        if resumed is not None and int(resumed[1]) != expected:
            self.faults.append(f"went on from step {resumed[1]}, but the newest checkpoint is of step {expected}")
        if outcome.how == "killed":
            self.kills.append(Kill(end, _hit(self.run, said, expected)))
        elif outcome.how != "ended":
            self.faults.append(f"a life {outcome.how}: {' | '.join(said.strip().splitlines()[-3:])}")
        self.faults += [f"left behind: {orphan}" for orphan in _orphans(outcome.pid, str(self.log))]
        return outcome

    def live_on(self, nursery: Nursery, rng: random.Random, span: Span, most: int) -> None:
        """Killed at random instants and resumed until it ends; after `most` kills it is left in peace."""
        for _ in range(most):
            if self.live(nursery, span.instant(rng)).how != "killed":
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


def _hit(run: Path, said: str, stood_at: int | None) -> str:
    """What a life was doing that began at step `stood_at` and had said so much."""
    if "sampler:" not in said:
        return "opening the run folder"
    if stood_at is not None and "resumed at" not in said:
        return "loading the checkpoint"
    if any(run.glob("checkpoints/.*.unfinished")):
        return "writing a checkpoint"
    if any(run.glob("checkpoints/.*.removed")):
        return "removing a checkpoint"
    if (run / "summary.json").exists():
        return "closing"
    return "training" if any(run.glob("checkpoints/step-*")) else "before the first checkpoint"


def _coverage(run: Path, settings: dict[str, Any]) -> Iterator[str]:
    """Every draw ends once: counted here without the audit, which is under test too."""
    with read_ledger(run / "ledger.db") as ledger:
        ends = Counter((e.epoch, e.row) for e in ledger.events() if e.state in ENDS and not e.undone)
    draws = {(epoch, row) for epoch in range(settings["data"]["epochs"]) for row in range(len(ROWS))}
    if ends != Counter(draws):
        yield f"draws without an end: {sorted(draws - ends.keys())}; with several: {sorted(ends - Counter(draws))}"


def _differences(run: Path, reference: Path) -> Iterator[str]:
    """From the run that nobody disturbed."""
    if digest(run) != digest(reference):
        yield "the weights are others than those of the undisturbed run"
    summary, undisturbed = (json.loads((root / "summary.json").read_text()) for root in (run, reference))
    for name in ("steps", "ledger", "reward_before", "reward_after"):
        if summary[name] != undisturbed[name]:
            yield f"summary.json says {name}: {summary[name]}, and that of the undisturbed run {undisturbed[name]}"
    for record, expected in zip(lines(run / "metrics.jsonl"), lines(reference / "metrics.jsonl"), strict=False):
        if different := [name for name in SAME_METRICS if record[name] != expected[name]]:
            yield f"step {record['step']} has others than the undisturbed run in {', '.join(different)}"


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
    while (found := list(alive(session, mark))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def alive(session: int, mark: str) -> Iterator[str]:
    """The processes of this session, and those that were started with this mark."""
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


def settings_of(model: Path, **changed: Any) -> dict[str, Any]:
    """Of a run of the agent that is killed."""
    return SETTINGS | {"model": str(model)} | changed


ASYNCHRONOUS: dict[str, Any] = {"deterministic": False, "staleness": {"max_staleness": 2}}
"""Settings of a run whose weights depend on time: only its accounts are compared."""
VLLM: dict[str, Any] = {**ASYNCHRONOUS, "sampler": {"kind": "vllm"}, "lora": {"rank": 4}}
"""Settings of a run with processes of its own."""
