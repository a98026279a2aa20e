"""Makes every await of the sampler's clients and of a whole run never return, one after the other. In real time.

    python tests/durability/hang_hunt_clients.py [--only sampler|run] [--part N] [--json]

Each hang has a process of its own, forked from this one, which has imported everything with its fault points; so have
the stubs of vLLM servers. `hang_hunt.py` is the same for the engine, in virtual time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fault_points import POINTS, REACHED, Point, arm, instrument

ROOT = Path(__file__).parents[2]
FIRST = ("aiohttp.web", "anyio._backends._asyncio", "peft", "torch", "transformers.models.llama.modeling_llama")
"""What takes long to import, and has no fault points."""
MODULES = {
    "sampler": tuple(
        f"asyncrl.sampling.{name}"
        for name in ("connect", "endpoint", "fleet", "live", "replica", "scoring", "server", "supervisor", "vllm")
    ),
    "run": (
        "asyncrl.agents.endpoint.server",
        "asyncrl.checkpointing",
        "asyncrl.ends",
        "asyncrl.rollout.factory",
        "asyncrl.run",
        "asyncrl.sampling.transformers",
        "asyncrl.storage.ledger",
        "asyncrl.storage.ledger_file",
        "asyncrl.storage.samples",
        "asyncrl.training.thread",
        "asyncrl.training_run",
    ),
}
PREFIX = {"sampler": "vllm", "run": "embedded"}
AT_ONCE = 8
"""They mostly wait."""
LIMIT_S = 60.0
"""A process that has not ended by then hangs."""
LEFT_LIMIT_S = 5.0
MARK = "ASYNCRL_TEST_HUNT"
"""An environment variable: what a run starts inherits it."""


@dataclass(frozen=True, slots=True)
class Case:
    run: str
    point: Point | None
    """None: nothing hangs."""
    at_call: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of one hang."""

    run: str
    point: str
    function: str
    line: int
    at_call: int
    code: int
    """Of the process; None: it hung."""
    seconds: float
    error: str = ""
    """Of the run; empty: it finished."""
    report: str = ""
    stderr: str = ""
    whole: bool = False
    """Every step was trained, and every prompt has ended."""
    left: tuple[str, ...] = ()
    """Processes that were left behind."""


class Hunt:
    """Owns the processes, and the folder in which they work."""

    def __init__(self, shared: Path) -> None:
        from tests.durability.client_runs import STAND_IN_SOCKET

        self._shared = shared
        self._stubs: set[int] = set()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(shared / STAND_IN_SOCKET))
        self._listening.listen(64)
        self._number = 0

    def go(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome, Counter[int]]]:
        """All of them, some at once, in the order in which they end; and how often each await was reached."""
        waiting = list(reversed(cases))
        running: dict[int, tuple[Case, int, Path, float]] = {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                case = waiting.pop()
                self._number += 1
                folder = self._shared / f"case-{self._number}"
                folder.mkdir()
                pid = self._fork(case, folder)
                running[os.pidfd_open(pid)] = case, pid, folder, time.monotonic()
            ready = select.select([*running, self._listening], [], [], 0.5)[0]
            if self._listening in ready:
                self._fork_stub()
            self._stubs = {pid for pid in self._stubs if not os.waitpid(pid, os.WNOHANG)[0]}
            for process, (case, pid, folder, began) in list(running.items()):
                seconds = time.monotonic() - began
                if process in ready or seconds > LIMIT_S:
                    del running[process]
                    os.close(process)
                    yield self._ended(case, pid, folder, seconds)

    def prepare(self) -> None:
        from tests.durability.client_runs import prepare

        pid = os.fork()
        if not pid:
            _quietly(self._shared / "prepared.log")
            prepare(self._shared)
            raise SystemExit
        assert os.waitpid(pid, 0)[1] == 0, (self._shared / "prepared.log").read_text()

    def _ended(self, case: Case, pid: int, folder: Path, seconds: float) -> tuple[Case, Outcome, Counter[int]]:
        from tests.durability.client_runs import left_behind

        hung = seconds > LIMIT_S
        if hung:
            os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        deadline = time.monotonic() + LEFT_LIMIT_S
        while (left := left_behind(str(folder))) and time.monotonic() < deadline:
            time.sleep(0.05)
        told = folder / "told.json"
        found = json.loads(told.read_text()) if told.exists() else {"error": "", "whole": False, "reached": {}}
        report = folder / "run" / "stalled.txt"
        point = case.point
        outcome = Outcome(
            run=case.run,
            point=str(point),
            function=point.function if point is not None else "",
            line=point.line if point is not None else 0,
            at_call=case.at_call,
            code=code,
            seconds=round(seconds, 1),
            error="hung" if hung else found["error"],
            report=report.read_text() if report.exists() else "",
            stderr=(folder / "log").read_text(),
            whole=found["whole"],
            left=tuple(left),
        )
        shutil.rmtree(folder)
        return case, outcome, Counter({int(number): count for number, count in found["reached"].items()})

    def _fork(self, case: Case, folder: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        os.environ[MARK] = str(folder)
        _quietly(folder / "log")
        arm(case.point, case.at_call)
        live(case.run, self._shared, folder)
        raise SystemExit  # as a user's process ends, with all that its end waits for

    def _fork_stub(self) -> None:
        """For a stand-in that asks: it ends with the stub, and the stub with it."""
        asked, _ = self._listening.accept()
        port, key = asked.makefile("r").readline().split()
        pid = os.fork()
        if pid:
            self._stubs.add(pid)
            asked.close()
            return
        import asyncio

        from tests.sampling.stub_vllm import StubVllm

        def end_with_stand_in() -> None:
            with suppress(OSError):
                asked.recv(1)
            os._exit(0)

        async def serve() -> None:
            await StubVllm(key).start(int(port))
            await asyncio.Event().wait()

        threading.Thread(target=end_with_stand_in, daemon=True).start()
        try:
            asyncio.run(serve())
        finally:
            os._exit(1)


def _quietly(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def live(run: str, shared: Path, folder: Path) -> None:
    from asyncrl.errors import AsyncRLError
    from tests.durability.client_runs import RUNS, STEPS

    error, whole = "", False
    try:
        result = RUNS[run](shared, folder / "run")
        whole = result.steps == STEPS
    except AsyncRLError as found:
        error = f"{type(found).__name__}: {found}"
    except BaseException as found:  # a fault of ours: reported as it is
        traceback.print_exc()
        error = f"not one of ours: {found!r}"
    told = {"error": error, "whole": whole, "reached": dict(REACHED)}
    (folder / "told.json").write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(MODULES), action="append")
    parser.add_argument("--part", type=int, help="so many hangs, drawn evenly from all modules")
    parser.add_argument("--point", help="only those whose name contains this")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each hang")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads than one could not be forked
    kinds = options.only or list(MODULES)
    for name in FIRST:
        __import__(name)
    instrument([name for kind in kinds for name in MODULES[kind]])
    from tests.durability.client_runs import RUNS, shorten_limits

    shorten_limits()
    with shared_folder() as folder:
        hunt = Hunt(folder)
        hunt.prepare()
        runs = {run: kind for kind in kinds for run in RUNS if run.startswith(PREFIX[kind])}
        reached: dict[str, Counter[int]] = {}
        for case, outcome, found in hunt.go([Case(run, None) for run in runs]):
            assert outcome.whole, f"{case.run} without any hang: {outcome.error}\n{outcome.stderr}"
            reached[case.run] = found
            print(case.run, "takes", outcome.seconds, "s", file=sys.stderr)
        cases = [
            Case(run, point, at_call)
            for number, point in enumerate(POINTS)
            if options.point is None or options.point in str(point)
            for run, kind in runs.items()
            if point.module in MODULES[kind]
            for at_call in calls(reached[run][number])
        ]
        if options.part:
            cases = random.Random(options.part).sample(cases, options.part)
        for _, outcome, _ in hunt.go(cases):
            print(json.dumps(asdict(outcome)), flush=True)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Gone when this process leaves the block, and not when one does that was forked in it."""
    owner, folder = os.getpid(), Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder)


def calls(reached: int) -> Iterator[int]:
    """The first time that an await is come to, and one in the middle."""
    if reached:
        yield 1
    if reached > 1:
        yield reached // 2 + 1


if __name__ == "__main__":
    main()
