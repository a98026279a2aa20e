"""Forks the processes that are killed: it has imported everything, which takes longer than a whole run does.

consumes    one `Order` per line on stdin
produces    one `Outcome` per line on stdout
waits for   the process to end, or the instant at which it is killed
"""

from __future__ import annotations

import importlib
import json
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from asyncrl.storage import ledger_file

MARK = "ASYNCRL_TEST_VICTIM"
"""An environment variable: what a victim starts inherits it."""
IMPORTED = (
    "anyio._backends._asyncio",
    "asyncrl.agents.chat",
    "asyncrl.run",
    "asyncrl.sampling.transformers",
    "asyncrl.training.thread",
    "tests.durability.agent",
    "transformers.models.llama.modeling_llama",
)
"""All that takes long in the imports of a run."""
WRITES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
"""Audit events of what changes files: https://docs.python.org/3/library/audit_events.html"""


@dataclass(frozen=True, slots=True)
class Order:
    """One life of a run, and how it ends."""

    settings: dict[str, Any]
    """Of its config."""
    log: str
    """What the process prints is appended to it."""
    after_s: float | None = None
    """Kill it so long after its birth. None: never."""
    before_touch: int | None = None
    """It kills itself right before it touches the files of its checkpoints for the n-th time. None: never."""
    touching: str = ""
    """Counts only touches that contain this regular expression: `<event> <path inside the run folder>`."""
    whole_tree: bool = False
    """Everything in its session is killed, and not the process alone."""
    limit_s: float = 600.0
    """A run that takes longer hangs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a life ended."""

    pid: int
    """Also of its session, which is its own."""
    how: Literal["ended", "killed", "failed", "hung"]
    seconds: float
    touches: int
    """How often it changed the files of its checkpoints, where it came to its end."""


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"a process that forks must have one thread, and this one has {threads}"
    for line in sys.stdin:
        outcome = _live(Order(**json.loads(line)))
        print(json.dumps(asdict(outcome)), flush=True)


def _live(order: Order) -> Outcome:
    began = time.monotonic()
    told, tell = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(told)
        _be_victim(order, tell)
    os.close(tell)
    limit_s = order.limit_s if order.after_s is None else order.after_s
    process = os.pidfd_open(pid)
    ended = bool(select.select([process], [], [], limit_s)[0])
    os.close(process)
    if not ended:
        leads_group = order.whole_tree and os.getpgid(pid) == pid  # not yet, right after the fork
        (os.killpg if leads_group else os.kill)(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    # Not until its end: a process that the victim has left behind may hold the other end.
    touches = int(os.read(told, 32) or 0) if select.select([told], [], [], 0)[0] else 0
    os.close(told)
    if not ended and order.after_s is None:
        how: Literal["ended", "killed", "failed", "hung"] = "hung"
    else:
        how = {0: "ended", -signal.SIGKILL: "killed"}.get(status, "failed")
    return Outcome(pid, how, time.monotonic() - began, touches)


def _be_victim(order: Order, tell: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        os.environ[MARK] = order.log
        log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        touches = _Touches(order)
        if order.before_touch is not None:
            ledger_file.WRITE_EVERY_S = order.limit_s  # nothing of it is there but what a commit waited for
        _train(order.settings)
        os.write(tell, str(touches.count).encode())
        code = 0
    except BaseException:  # a test process must not go on as the nursery does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _train(settings: dict[str, Any]) -> None:
    import asyncrl
    from tests.durability.agent import HELD_OUT, ROWS, rollout

    asyncrl.train(
        rollout, dataset=ROWS, config=asyncrl.Config(**settings), evaluation=HELD_OUT, resume=True, view="plain"
    )


class _Touches:
    """Counts what this process does to the files of its checkpoints: every step of a commit is one."""

    def __init__(self, order: Order) -> None:
        self.count = 0
        self._run = order.settings["run_dir"] + "/"
        self._fatal = order.before_touch
        self._touching = re.compile(order.touching)
        sys.addaudithook(self._hear)
        os.fsync = self._before_fsync(os.fsync)

    def _before_fsync(self, fsync: Callable[[int], None]) -> Callable[[int], None]:
        def counted(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            self._touch("os.fsync", os.readlink(f"/proc/self/fd/{number}"))
            fsync(file)

        return counted

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in WRITES:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        place = arguments[0]
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # beside an open folder, as `rmtree` does it
            place = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), place)
        self._touch(event, os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else "")

    def _touch(self, event: str, path: str) -> None:
        place = path.removeprefix(self._run)
        if not place.startswith("checkpoints") or not self._touching.search(f"{event} {place}"):
            return
        self.count += 1
        if self.count == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
