"""Runs trials as processes, `jobs` at a time: what becomes of one is no concern of the others.

    consumes    trials
    produces    a state for each
    waits for   processes
    woken by    a look at them, 4 times a second

Each runs under `sampling/guard.py`, which holds the other end of a pipe: when this process ends, killed or not, the
guard asks its training to end cleanly, and ends it if it does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from asyncrl.exits import CUT_SHORT
from asyncrl.private import private
from asyncrl.sampling.server import GUARD
from asyncrl.sweeps.trials import Trial

State = Literal["waiting", "running", "finished", "failed", "stopped"]
POLL_S = 0.25
GRACE_S = 30.0
"""Beyond `stop_timeout_s`, within which a training ends by itself."""
LOG_BYTES = 1 << 16
"""How far back a cause is looked for."""


@dataclass(slots=True)
class Job:
    """A trial and what became of it."""

    trial: Trial
    state: State = "waiting"
    error: str = ""
    """Of one that failed."""
    began_at: float | None = None
    ended_at: float | None = None
    slot: int = -1
    process: subprocess.Popen[str] | None = None
    resumed: bool = False
    """There was a run in its folder that had not finished."""

    @property
    def log(self) -> Path:
        """What its process said."""
        return self.trial.folder.with_name(f"{self.trial.folder.name}.log")

    def seconds(self, now: float) -> float | None:
        return None if self.began_at is None else (self.ended_at or now) - self.began_at


@dataclass(slots=True)
class Runner:
    """Owns the processes."""

    jobs: Sequence[Job]
    command: Callable[[Trial], Sequence[str]]
    """How a trial is trained."""
    at_once: int = 1
    """More than there are to run is as many as there are: devices and cores are shared out by it."""
    on_change: Callable[[Job], None] = lambda job: None
    """Called when a job begins and when it ends."""
    stopping: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        self.at_once = max(1, min(self.at_once, sum(job.state == "waiting" for job in self.jobs)))

    def run(self, look: Callable[[], None] = lambda: None) -> None:
        """Until all have ended, or those that ran when `stop` was called. `look` is called 4 times a second."""
        try:
            while True:
                for job in self.running():
                    self._see(job)
                for job in self._startable():
                    self._start(job)
                look()
                if not any(self.running()):
                    return
                time.sleep(POLL_S)
        finally:
            self.kill()

    def stop(self) -> None:
        """Start nothing more; what runs finishes its step and saves it."""
        self.stopping = True
        for job in self.running():
            if job.process is not None and job.process.stdin is not None:
                job.process.stdin.close()  # the guard passes it on

    def kill(self) -> None:
        """End what still runs at once."""
        for job in self.running():
            if job.process is not None:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(job.process.pid, signal.SIGKILL)

    def running(self) -> Iterator[Job]:
        return (job for job in self.jobs if job.state == "running")

    def _startable(self) -> list[Job]:
        if self.stopping:
            return []
        room = self.at_once - sum(1 for _ in self.running())
        return [job for job in self.jobs if job.state == "waiting"][:room]

    def _start(self, job: Job) -> None:
        taken = {other.slot for other in self.running()}
        job.slot = next(slot for slot in range(self.at_once) if slot not in taken)
        grace_s = job.trial.config.stop_timeout_s + GRACE_S
        job.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(job.log, "a", encoding="utf-8", opener=private) as log:
            job.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARD), str(grace_s), "", *self.command(job.trial)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**self.environment, **share_of_devices(self.environment, job.slot, self.at_once)},
                start_new_session=True,
                text=True,
            )
        _pin(job.process.pid, job.slot, self.at_once)
        job.state, job.began_at = "running", time.monotonic()
        self.on_change(job)

    def _see(self, job: Job) -> None:
        process = job.process
        assert process is not None
        if process.poll() is None:
            return
        assert process.stdout is not None
        said = process.stdout.read().strip()
        process.stdout.close()
        if process.stdin is not None:
            process.stdin.close()
        code = int(said) if said else -signal.SIGKILL
        job.ended_at = time.monotonic()
        if code == 0:
            job.state = "finished"
        elif self.stopping and (code > 128 or code in (CUT_SHORT, -signal.SIGTERM)):  # or it had only begun
            job.state = "stopped"
        else:
            job.state, job.error = "failed", cause_of(code, job.log)
        self.on_change(job)


def share_of_devices(environment: Mapping[str, str], slot: int, at_once: int) -> dict[str, str]:
    """Runs beside each other get devices of their own, where `CUDA_VISIBLE_DEVICES` names enough of them."""
    devices = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    share = len(devices) // at_once
    if at_once == 1 or share == 0:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(devices[slot * share : (slot + 1) * share])}


def _pin(pid: int, slot: int, at_once: int) -> None:
    """Likewise cores: threads of two trainings that spin for the same core slow both down many times over."""
    if at_once == 1 or sys.platform != "linux":
        return
    cores = sorted(os.sched_getaffinity(0))
    if share := len(cores) // at_once:
        with suppress(OSError):  # it has ended already, or the system forbids it
            os.sched_setaffinity(pid, cores[slot * share : (slot + 1) * share])


def cause_of(code: int, log: Path) -> str:
    """Why a training ended: the last error in what it said, without the traceback."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
    begins = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    said = lines[begins[-1] :] if begins else lines[-1:]
    told = [line for line in said if not line.startswith((" ", "Traceback"))]
    return f"{how}: {' '.join(told).removeprefix('error: ') or 'it said nothing'}"
